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
    size = np.linalg.norm(one, axis=-1) + 1e-10
    return bool((np.linalg.norm(one - two, axis=-1) / size > 1e-4).any())


def change_with_the_batch(logits_fn: Callable, x: Float[np.ndarray, "n ..."]) -> float:
    """How much of the logits' size changes where each example is alone in its batch."""
    together = _logits(_traced(logits_fn, x, len(x)), x)
    alone = _logits(_traced(logits_fn, x, 1), x)
    change = np.abs(together - alone).max() / (np.abs(alone).max() + 1e-30)
    return float(np.nan_to_num(change, nan=np.inf))


def _traced(logits_fn, x, batch_size) -> Network:
    return as_network(logits_fn, x.shape[1:], x.dtype, batch_size=batch_size)


def _logits(network, x) -> np.ndarray:
    return np.asarray(_evaluated(network, x))


@jax.jit
def _evaluated(network, x):
    return network(x)
