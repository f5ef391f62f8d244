"""What a network's outputs reveal: probabilities, randomness, dependence on the whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from robust_jax._network import as_network

# How many examples the checks use that call the network again.
FEW = 16
# How much logits may change, relative to their size, when an example is alone in its batch.
MOST_CHANGE = 1e-2


def are_probabilities(logits: Float[np.ndarray, "n k"]) -> bool:
    """Whether outputs look like the result of a softmax: in [0,1], with rows that sum to 1."""
    if not len(logits):
        return False
    in_range = logits.min() > -1e-5 and logits.max() < 1 + 1e-5
    rounding = max(1e-4, 2 * float(jnp.finfo(logits.dtype).eps))
    return bool(in_range and np.allclose(logits.sum(-1, dtype=np.float32), 1, atol=rounding))


def is_random(logits_fn: Callable, x: Float[np.ndarray, "n ..."]) -> bool:
    """Whether two calls on the same examples differ.

    Each call has its own trace, since what Python draws at random is part of the trace.
    """
    one, two = (_logits(logits_fn, x, len(x)) for _ in range(2))
    return bool((_change(one, two).max(-1) > 1e-4).any())


def change_with_the_batch(logits_fn: Callable, x: Float[np.ndarray, "n ..."]) -> float:
    """The relative change of the logits when each example is alone in its batch.

    A single example shares the batch with its negative.
    """
    x = x if len(x) > 1 else np.concatenate([x, 1 - x])
    together, alone = _logits(logits_fn, x, len(x)), _logits(logits_fn, x, 1)
    return float(_change(alone, together).max())


def doubts(logits_fn, x, logits, is_randomised: bool = False) -> list[str]:
    """Warnings about the outputs that cast doubt on any result."""
    warnings = []
    if strange := int(are_strange(logits).sum()):
        warnings.append(
            f"{strange} of {len(logits)} points have logits that are NaN or infinite: they count "
            "as misclassified, and gradients near them mean little"
        )
    if ruled_out := int(np.isneginf(logits).any(-1).sum()):
        warnings.append(
            f"{ruled_out} of {len(logits)} points have logits of -inf, at which DLR losses are not "
            "defined: leave those classes out, or give a number such as -100 instead"
        )
    if are_probabilities(logits):
        warnings.append(
            "the outputs are probabilities: give logits, or gradients vanish where they saturate"
        )
    if is_randomised:
        return warnings
    if is_random(logits_fn, x[:FEW]):
        warnings.append('the network is randomised: use version="rand"')
    elif (change := change_with_the_batch(logits_fn, x[:FEW])) > MOST_CHANGE:
        warnings.append(
            f"the logits change by {change:.1g} of their size when an image is alone in its batch: "
            "use running statistics (train=False)"
        )
    return warnings


def are_strange(logits: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    """Where logits are NaN or +inf."""
    return np.asarray(~(logits < np.inf).all(-1))


def _change(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The difference over the largest logit; 0 for equal infinities or NaNs, inf for others."""
    finite = np.isfinite(one) & np.isfinite(two)
    size = np.abs(np.where(finite, one, 0)).max() + 1e-30
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    difference = np.abs(np.where(finite, one, 0) - np.where(finite, two, 0))
    return np.where(finite, difference / size, np.where(same, 0.0, np.inf))


def _logits(logits_fn, x, batch_size: int) -> np.ndarray:
    network = as_network(logits_fn, x.shape[1:], x.dtype, batch_size=batch_size)
    return np.asarray(_evaluated(network, x))


@jax.jit
def _evaluated(network, x):
    return network(x)
