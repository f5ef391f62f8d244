"""Many measurements as a few numbers, by a sort or a pass over them: no network is called."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Columns of an evaluation's records that measure nothing.
_NAMES = frozenset({"index", "label", "prediction"})


def summary(
    values: ArrayLike, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
) -> dict[str, float]:
    """Count, minimum, mean, standard deviation, maximum and quantiles ("q5", …) of [N] values.

    Those that are not finite, such as a margin nothing was found for, are left out and counted as
    "not_finite". Raises ValueError where no value is finite.
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


def gaps(train: Any, test: Any) -> dict[str, float]:
    """Generalisation gaps: the train mean minus the test mean of each measure that both hold.

    train, test: records of an evaluation, or any arrays [N] by name: loss, accuracy ("correct"),
    robust accuracy ("name@eps/held"), margins and so on, each gap in its own units; NaN where a
    value is.
    """
    names = [name for name in train if name in test and name not in _NAMES]
    train_mean, test_mean = (
        {name: np.asarray(table[name], float).mean() for name in names} for table in (train, test)
    )
    return {name: float(train_mean[name] - test_mean[name]) for name in names}


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of count independent examples."""
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)
