"""Confidence, entropy and calibration, from logits or from the columns of an evaluation's records.

numpy arrays in and out, one row per example. All but `temperature` cost one pass over the rows.
None calls a network.
"""

from typing import NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

__all__ = [
    "Reliability",
    "expected_calibration_error",
    "outcomes",
    "reliability",
    "temperature",
]


def __dir__() -> list[str]:
    return __all__


TEMPERATURES = 1e-4, 1e4  # the interval that is searched


class Reliability(NamedTuple):
    """Bins of top probability: edges [n+1]; examples, mean and accuracy of each bin [n].

    Mean top probability and accuracy of an empty bin are NaN.
    """

    edges: np.ndarray
    examples: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def outcomes(logits: Float[np.ndarray, "b k"], y: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
    """What the softmax says of each example, named as in an evaluation's records.

    Args:
        logits: [B,K].
        y: Labels [B].

    Returns:
        Arrays [B]: correct; top_probability, max_k p_k; confidence, p_y; entropy in nats.

    Raises:
        ValueError: y does not hold labels of the classes, [B].

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import calibration
        >>> found = calibration.outcomes(np.log([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1]))
        >>> found["confidence"]
        array([0.9, 0.1])
    """
    logits = np.asarray(logits, np.float64)
    y = _labels(y, logits.shape[-1])
    with np.errstate(invalid="ignore"):  # an infinite logit leaves p unknown
        log_p = scipy.special.log_softmax(logits, -1)
    p = np.exp(log_p)
    known = (logits < np.inf).all(-1) & (logits.max(-1) > -np.inf)  # False for NaN too
    return {
        "correct": (logits.argmax(-1) == y) & known,
        "top_probability": p.max(-1),
        "confidence": p[np.arange(len(p)), y],
        "entropy": scipy.special.entr(p).sum(-1),
    }


def reliability(
    top_probability: ArrayLike, correct: ArrayLike, *, num_bins: int = 15
) -> Reliability:
    """Accuracy against top probability, in num_bins equal bins (l, r] of [0,1].

    Args:
        top_probability: max_k p_k of each example, [B].
        correct: Whether it is classified correctly, [B].
        num_bins: How many bins.

    Returns:
        The bins' edges, and the number of examples, mean top probability and accuracy of each bin.

    Raises:
        ValueError: num_bins is below 1, or a probability is outside [0,1].

    Example:
        >>> from robust_jax.analysis import calibration
        >>> calibration.reliability([0.6, 0.7, 0.9], [1, 0, 1], num_bins=2).accuracy
        array([nan, 0.667])

    Reference:
        Guo et al. 2017, arXiv 1706.04599.
    """
    p, correct = np.asarray(top_probability, float), np.asarray(correct, float)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins!r}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities must be in [0, 1]")
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.maximum(np.searchsorted(edges, p, side="left") - 1, 0)
    count = np.bincount(index, minlength=num_bins)
    means = np.full((2, num_bins), np.nan)
    for mean, values in zip(means, (p, correct), strict=True):
        np.divide(np.bincount(index, values, num_bins), count, out=mean, where=count > 0)
    return Reliability(edges, count, *means)


def expected_calibration_error(curve: Reliability) -> float:
    """Σ over the bins of the bin's share · `|accuracy - confidence|`.

    Args:
        curve: As `reliability` returns it.

    Returns:
        In [0,1].

    Example:
        >>> from robust_jax.analysis import calibration
        >>> curve = calibration.reliability([0.6, 0.9], [1, 1], num_bins=2)
        >>> calibration.expected_calibration_error(curve)
        0.25

    Reference:
        Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    gaps = np.abs(curve.accuracy - curve.confidence)
    return float(np.nansum(curve.examples * gaps) / curve.examples.sum())


def temperature(logits: Float[np.ndarray, "b k"], y: Int[np.ndarray, " b"]) -> float:
    """The T above 0 at which softmax(logits / T) has the least cross-entropy.

    Makes networks whose logits differ in scale comparable: divided by their temperatures, they are
    equally sure of themselves. Costs 60 passes over the logits.

    Args:
        logits: [B,K], of examples that the network was not trained on.
        y: Labels [B].

    Returns:
        In [1e-4, 1e4]: the smallest for logits that are right everywhere, where no T is small
        enough, and the largest for logits that are worse than chance.

    Raises:
        ValueError: A logit is not finite, or y does not hold labels of the classes, [B].

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import calibration
        >>> logits = np.array([[2.0, 0.0]] * 4)  # sure by 2, right in three of four
        >>> calibration.temperature(logits, np.array([0, 0, 0, 1]))  # 2 / log 3
        1.82

    Reference:
        Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    z = np.asarray(logits, np.float64)
    y = _labels(y, z.shape[-1])
    if not np.isfinite(z).all():
        raise ValueError("logits must be finite to have a temperature")
    z = z - z.max(-1, keepdims=True)
    of_label = z[np.arange(len(z)), y]
    if (of_label == 0).all() and (z < 0).any():  # the slope below would underflow
        return TEMPERATURES[0]

    def slope(inverse):
        p = np.exp(inverse * z)
        return ((p * z).sum(-1) / p.sum(-1) - of_label).mean()

    # Cross-entropy is convex in 1/T, so bisection finds where its slope changes sign.
    low, high = np.log(TEMPERATURES)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def _labels(y: ArrayLike, num_classes: int) -> np.ndarray:
    from robust_jax import _checks  # imports JAX, which the report's page does without

    labels = np.asarray(y)
    _checks.labels(labels, num_classes)
    return labels
