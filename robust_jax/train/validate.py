"""Clean and robust accuracy on the validation set: what chooses the best checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax import data, losses, margins
from robust_jax.devices import parallel
from robust_jax.keys import fold_in_each

Validate = Callable[[Any], dict[str, float]]


def make_validation(
    network: Callable,
    attack: Callable,
    split: data.Split,
    *,
    batch_size: int,
    key: jax.Array,
    method: parallel.Method,
    margins_of: data.Split | None = None,
) -> Validate:
    """validate(variables) -> {clean_accuracy, robust_accuracy, cross_entropy} over the whole split.

    And, of the split margins_of, if there is one: minimum_margin, average_margin and the quantiles
    margin_q10, margin_q50 and margin_q90, first-order in the input space (exact for a linear
    network), l2, in pixel units, negative where misclassified, of the examples whose gradient does
    not vanish; none where all do. minimum_distance and average_distance are those from the
    predicted class, which are never negative; for a linear network they are the margins of arXiv
    1907.11780, which has a CLEVER-like estimate for others.

    network(variables, x) -> logits. attack(logits_fn, x, y, keys) -> x_adv; an example is robust
    where both the example and its x_adv are classified right.
    """

    def measure(logits_fn, batch, key_data):
        key = jax.random.wrap_key_data(key_data)
        x, y = data.to_pixels(batch["image"]), batch["label"]
        x_adv = attack(logits_fn, x, y, fold_in_each(key, batch["index"]))
        logits = logits_fn(x)
        clean = losses.correct(logits, y)
        return {
            "clean_accuracy": clean,
            "robust_accuracy": clean * losses.correct(logits_fn(x_adv), y),
            "cross_entropy": losses.cross_entropy(logits, y),
        }

    # The key is an argument of the compiled program, which serves every seed.
    run_key_data = np.asarray(jax.random.key_data(key))

    def measure_margins(logits_fn, batch):
        x = data.to_pixels(batch["image"])
        predicted = jnp.argmax(logits_fn(x), -1).astype(batch["label"].dtype)
        return {
            name: margins.first_order(logits_fn, x, y, norm="l2")
            for name, y in (("margin", jnp.maximum(batch["label"], 0)), ("distance", predicted))
        }

    lift = parallel.lifted(network, method, batch_size=batch_size)
    mapped, mapped_margins = lift(measure), lift(measure_margins)

    def validate(variables):
        rows = data.rows_of(split, np.arange(split.size))
        values = mapped(variables, split.size, *rows, run_key_data)
        found = {name: float(v.mean(dtype=np.float64)) for name, v in values.items()}
        if margins_of is not None:
            rows = data.rows_of(margins_of, margins_of.labeled)
            for name, values in mapped_margins(variables, len(margins_of.labeled), *rows).items():
                values = values[np.isfinite(values)]  # infinite where the gradient vanishes
                if len(values):
                    found[f"minimum_{name}"] = float(values.min())
                    found[f"average_{name}"] = float(values.mean(dtype=np.float64))
                    # The minimum is one example's, and a few far ones move the average.
                    for q in (10, 50, 90) if name == "margin" else ():
                        found[f"margin_q{q}"] = float(np.percentile(values, q))
        return found

    return validate
