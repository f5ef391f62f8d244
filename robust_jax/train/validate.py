"""Accuracy on the validation set, which chooses the best checkpoint, and margins in training."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax import data, losses, margins
from robust_jax.attacks import fab
from robust_jax.devices import parallel
from robust_jax.keys import fold_in_each

Validate = Callable[[Any], dict[str, float]]


class Tracked(NamedTuple):
    """How many training examples have their margins estimated at each validation, by estimate.

    num_steps: of the minimum-norm attack (FAB). num_samples: of the CLEVER-like estimate.
    """

    first_order: int = 0
    minimum_norm: int = 0
    clever: int = 0
    num_steps: int = 100
    num_samples: int = 1024


NOT_TRACKED = Tracked()


def make_validation(
    network: Callable,
    attack: Callable,
    split: data.Split,
    *,
    batch_size: int,
    key: jax.Array,
    method: parallel.Method,
    tracked: Tracked = NOT_TRACKED,
    margins_of: data.Split | None = None,
) -> Validate:
    """validate(variables) -> {clean_accuracy, robust_accuracy, cross_entropy} over the whole split.

    Also minimum_… and average_… of l2 margins, in pixel units, over as many of the first labelled
    examples of margins_of as are tracked. Infinite margins are left out; if all are infinite, the
    number is left out too. margin is first-order (exact for a linear network), from the label, and
    negative where misclassified. distance is first-order, from the predicted class, and never
    negative: for a linear network it is the margin of arXiv 1907.11780. Both have quantiles, as in
    margin_q10, margin_q50 and margin_q90. margin_attack is also from the label, by a minimum-norm
    attack, and never smaller in magnitude than the true margin. distance_clever (at most 5) is that
    paper's margin for other networks.

    network(variables, x) -> logits. attack(logits_fn, x, y, keys) -> x_adv; an example is robust
    if both the example and its x_adv are classified correctly.
    """

    # The keys are arguments of the compiled programs, which thus serve every seed.
    of_attack, of_margins = (
        np.asarray(jax.random.key_data(k)) for k in (key, jax.random.fold_in(key, 1))
    )
    lift = parallel.lifted(network, method, batch_size=batch_size)

    def measure(logits_fn, batch, key_data):
        x, y = data.to_pixels(batch["image"]), batch["label"]
        x_adv = attack(logits_fn, x, y, _keys(batch, key_data))
        logits = logits_fn(x)
        clean = losses.correct(logits, y)
        return {
            "clean_accuracy": clean,
            "robust_accuracy": clean * losses.correct(logits_fn(x_adv), y),
            "cross_entropy": losses.cross_entropy(logits, y),
        }

    estimates = [
        (lift(estimate), _rows(margins_of, min(count, margins_of.size)))
        for estimate, count in (
            (_first_order, tracked.first_order),
            (partial(_by_attack, num_steps=tracked.num_steps), tracked.minimum_norm),
            (partial(_clever, num_samples=tracked.num_samples), tracked.clever),
        )
        if margins_of is not None and count
    ]
    mapped = lift(measure)

    def validate(variables):
        values = mapped(variables, *_rows(split, split.size), of_attack)
        found = {name: float(v.mean(dtype=np.float64)) for name, v in values.items()}
        for estimate, rows in estimates:
            for name, values in estimate(variables, *rows, of_margins).items():
                found |= _summary(name, values[np.isfinite(values)])
        return found

    return validate


def _rows(split: data.Split, count: int) -> tuple[int, int, Callable]:
    return count, *data.rows_of(split, np.arange(count))


def _keys(batch, key_data) -> jax.Array:
    return fold_in_each(jax.random.wrap_key_data(key_data), batch["index"])


def _first_order(logits_fn, batch, key_data):
    x = data.to_pixels(batch["image"])
    predicted = jnp.argmax(logits_fn(x), -1).astype(batch["label"].dtype)
    return {
        name: margins.first_order(logits_fn, x, y, norm="l2")
        for name, y in (("margin", batch["label"]), ("distance", predicted))
    }


def _by_attack(logits_fn, batch, key_data, *, num_steps):
    x, y, keys = data.to_pixels(batch["image"]), batch["label"], _keys(batch, key_data)
    attack = partial(fab, num_steps=num_steps)
    return {"margin_attack": margins.minimum_norm(logits_fn, x, y, keys, norm="l2", attack=attack)}


def _clever(logits_fn, batch, key_data, *, num_samples):
    x, keys = data.to_pixels(batch["image"]), _keys(batch, key_data)
    return {"distance_clever": margins.clever(logits_fn, x, keys, num_samples=num_samples)}


def _summary(name: str, values: np.ndarray) -> dict[str, float]:
    """The minimum and the mean of the values, and the quantiles of first-order margins."""
    if not len(values):
        return {}
    # The minimum depends on one example, and a few distant ones move the average.
    quantiles = (10, 50, 90) if name in ("margin", "distance") else ()
    return {
        f"minimum_{name}": float(values.min()),
        f"average_{name}": float(values.mean(dtype=np.float64)),
        **{f"{name}_q{q}": float(np.percentile(values, q)) for q in quantiles},
    }
