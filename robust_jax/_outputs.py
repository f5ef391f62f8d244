"""What the outputs of a network give away: probabilities, randomness, a look at the whole batch."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from robust_jax._network import Network, as_network


def are_probabilities(logits: Float[np.ndarray, "n k"]) -> bool:
    """Whether outputs look like the result of a softmax: in [0,1], with rows that sum to 1."""
    if not len(logits):
        return False
    in_range = logits.min() > -1e-5 and logits.max() < 1 + 1e-5
    return bool(in_range and np.allclose(logits.sum(-1), 1, atol=1e-4))


def is_random(logits_fn: Callable, x: Float[np.ndarray, "n ..."]) -> bool:
    """Whether two calls on the same examples differ.

    Each call is traced for itself: what Python draws at random is part of the trace.
    """
    one, two = (_logits(_traced(logits_fn, x, len(x)), x) for _ in range(2))
    return bool((_change(one, two).max(-1) > 1e-4).any())


def change_with_the_batch(logits_fn: Callable, x: Float[np.ndarray, "n ..."]) -> float:
    """How much of the logits' size changes where each example is alone in its batch."""
    together = _logits(_traced(logits_fn, x, len(x)), x)
    alone = _logits(_traced(logits_fn, x, 1), x)
    return float(_change(alone, together).max())


def _change(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The difference over the largest of the logits: 0 for the same infinities, inf for others."""
    finite = np.isfinite(one) & np.isfinite(two)
    size = np.abs(np.where(finite, one, 0)).max() + 1e-30
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    difference = np.abs(np.where(finite, one, 0) - np.where(finite, two, 0))
    return np.where(finite, difference / size, np.where(same, 0.0, np.inf))


def _traced(logits_fn, x, batch_size) -> Network:
    return as_network(logits_fn, x.shape[1:], x.dtype, batch_size=batch_size)


def _logits(network, x) -> np.ndarray:
    return np.asarray(_evaluated(network, x))


@jax.jit
def _evaluated(network, x):
    return network(x)
