"""Confidence intervals of a study: over its seeds, and over its test images where there are any."""

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval, whose ends are NaN for fewer than two seeds.

    from_images: the half-width that the images alone account for, which more seeds cannot narrow.
    """

    mean: float
    low: float
    high: float
    from_images: float = 0.0


def interval(
    outcomes: Sequence[float] | np.ndarray,
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    shares: bool = True,
) -> Interval:
    """The mean of outcomes and its interval, for seeds that were not run and images not seen.

    For one number a seed, this is Student's t over seeds. For one per seed and image, seeds and
    images are crossed random effects, so the variance of the mean is that of the seeds' means,
    divided by the number of seeds, plus that of the images' effects, divided by the number of
    images. The two half-widths, each with the quantile of Student's t for its own number, are added
    in quadrature. The interval then covers the mean at least as often as it says (Banerjee), for
    any number of seeds. The half-width of a share is at least -log(0.025) / images, its value where
    no image differs (the rule of three).

    Args:
        outcomes: [seeds] or [seeds, images].
        bounds: The least and the largest value that a mean can have.
        shares: Whether images count 0 or 1, or differences of these.

    Returns:
        The mean and its interval; NaN without outcomes.

    Example:
        >>> import numpy as np
        >>> right = np.array([[1, 1, 0, 1] * 50, [1, 0, 0, 1] * 50, [1, 1, 0, 1] * 50])
        >>> print("{:.3f} {:.3f} {:.3f}".format(*interval(right)))
        0.667 0.304 1.029

    Reference:
        Banerjee 1960, Approximate confidence interval for linear functions of means of k
        populations when the population variances are not equal, Sankhyā 22, 357–358. On seeds and
        images as crossed effects: Owen 2007, The pigeonhole bootstrap, Annals of Applied
        Statistics 1(2), 386–411.
    """
    array = np.asarray(outcomes, float)
    if array.size == 0:
        return Interval(np.nan, np.nan, np.nan)
    of_seeds = array.reshape(len(array), -1).mean(1)
    mean, num_seeds = float(of_seeds.mean()), len(array)
    if num_seeds < 2:
        return Interval(mean, np.nan, np.nan)
    squared = _quantile(num_seeds) ** 2 * of_seeds.var(ddof=1) / num_seeds
    least = 0.0
    if array.ndim == 2 and (num_images := array.shape[1]) > 1:
        of_images = array.mean(0)
        residuals = array - of_seeds[:, None] - of_images + mean
        noise = (residuals**2).sum() / (num_seeds - 1) / (num_images - 1)
        variance = max(of_images.var(ddof=1) - noise / num_seeds, 0.0)
        from_images = _quantile(num_images) * np.sqrt(variance / num_images)
        squared += from_images**2
        least = max(from_images, least_half_width(num_images) if shares else 0.0)
    half = max(float(np.sqrt(squared)), least)
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), float(least))


def least_half_width(num_images: int) -> float:
    """The half-width of a share if no image differs: the rule of three."""
    return -log((1 - LEVEL) / 2) / num_images


def as_wide_as(widest: float, known: Interval) -> Interval:
    """The interval, widened to the requested width if it is narrower.

    Adding seeds stops early when they happen to lie close together, and then the interval is too
    narrow. An interval of the requested width still covers the mean as often as it claims.
    """
    low, high = known.mean - widest / 2, known.mean + widest / 2
    # Unlike Python's min and max, these keep NaN.
    return known._replace(
        low=float(np.minimum(known.low, low)), high=float(np.maximum(known.high, high))
    )


def seeds_needed(width: float, known: Interval, num_seeds: int, *, most: int = 1000) -> int | None:
    """How many seeds would make the interval that narrow, if they scatter like its num_seeds.

    None if it takes more than most, or if the images alone make it wider.
    """
    counts = np.arange(num_seeds, most + 1)
    squared = max(((known.high - known.low) / 2) ** 2 - known.from_images**2, 0.0)
    of_one = squared * num_seeds / _quantile(num_seeds) ** 2
    halves = np.sqrt(_quantile(counts) ** 2 * of_one / counts + known.from_images**2)
    enough = counts[2 * halves <= width]
    return int(enough[0]) if len(enough) else None


def _quantile(count):
    return stdtrit(count - 1, (1 + LEVEL) / 2)
