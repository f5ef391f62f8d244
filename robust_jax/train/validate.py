"""Clean and robust accuracy on the validation set: what chooses the best checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from robust_jax import data, losses
from robust_jax.keys import fold_in_each
from robust_jax.train import parallel

Validate = Callable[[Any], dict[str, float]]


def make_validation(
    network: Callable,
    attack: Callable,
    split: data.Split,
    *,
    batch_size: int,
    key: jax.Array,
    method: parallel.Method,
) -> Validate:
    """validate(variables) -> {clean_accuracy, robust_accuracy, cross_entropy} over the whole split.

    network(variables, x) -> logits. attack(logits_fn, x, y, keys) -> x_adv; an example is robust
    where both the example and its x_adv are classified right.
    """

    def measure(variables, batch, key_data):
        key = jax.random.wrap_key_data(key_data)

        def logits_fn(x):
            return network(variables, x)

        x, y = data.to_pixels(batch["image"]), batch["label"]
        x_adv = attack(logits_fn, x, y, fold_in_each(key, batch["index"]))
        logits = logits_fn(x)
        clean = losses.correct(logits, y)
        return {
            "clean_accuracy": clean,
            "robust_accuracy": clean * losses.correct(logits_fn(x_adv), y),
            "cross_entropy": losses.cross_entropy(logits, y),
        }

    mapped = parallel.map_split(measure, method, batch_size=batch_size)
    # The key is an argument of the compiled program, which serves every seed.
    run_key_data = np.asarray(jax.random.key_data(key))

    def validate(variables):
        values = mapped(variables, split, np.arange(len(split.labels)), run_key_data)
        return {name: float(v.mean(dtype=np.float64)) for name, v in values.items()}

    return validate
