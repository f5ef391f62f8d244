"""Many measurements as a few numbers, by a sort or a pass over them; no network is called."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "summary",
    "wilson_interval",
]


def __dir__() -> list[str]:
    return __all__


def summary(
    values: ArrayLike, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
) -> dict[str, float]:
    """Count, minimum, mean, standard deviation, maximum and quantiles of some values.

    Args:
        values: [N]. Those that are not finite, such as a margin that an attack did not find, are
            left out.
        quantiles: Which ones, in [0,1].

    Returns:
        By name, quantiles as "q5"; "not_finite" is how many were left out.

    Raises:
        ValueError: No value is finite.

    Example:
        >>> from robust_jax.analysis import summaries
        >>> found = summaries.summary([1.0, 2.0, 3.0, float("inf")], quantiles=(0.5,))
        >>> found["mean"], found["q50"], found["not_finite"]
        (2.0, 2.0, 1)
    """
    values = np.asarray(values, float).ravel()
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise ValueError(f"none of {len(values)} values is finite")
    return {
        "count": len(finite),
        "not_finite": len(values) - len(finite),
        "minimum": float(finite.min()),
        "mean": float(finite.mean()),
        "standard_deviation": float(finite.std()),
        "maximum": float(finite.max()),
        **{f"q{100 * q:g}": float(np.quantile(finite, q)) for q in quantiles},
    }


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share of some independent examples.

    Args:
        share: In [0,1].
        count: How many examples it is a share of.

    Returns:
        Its ends, in [0,1].

    Example:
        >>> from robust_jax.analysis import summaries
        >>> summaries.wilson_interval(0.5, 100)
        (0.404, 0.596)

    Reference:
        Wilson 1927.
    """
    z = 1.959964  # normal quantile of 97.5 %
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)
