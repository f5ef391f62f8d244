"""What a study's claims come to: tests on the runs' numbers, paired over seeds.

Nothing is typed in: an outcome follows from the 95 % interval of a quantity that the claim says is
above zero.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

from robust_jax.app import measures

Outcome = Literal["supported", "refuted", "inconclusive", "no verdict"]
RELATIONS = ("above", "below", "rises", "falls")
# Student's t has an interval for two values, which is wide enough to say nothing.
FEWEST_SEEDS = 3


class Interval(NamedTuple):
    """A mean over seeds with its 95 % confidence interval by Student's t; NaN ends for one seed."""

    mean: float
    low: float
    high: float


def judge(claim: Mapping[str, Any], found: Mapping[str, Mapping[int, dict]]) -> dict[str, Any]:
    """A claim with the outcome of each of its tests, and its verdict.

    It is supported where every test is, refuted where one is, and else inconclusive; there is no
    verdict where a test has fewer than three seeds.
    """
    tests = [{**test, **_outcome(test, found)} for test in claim["tests"]]
    outcomes = {test["verdict"] for test in tests}
    verdict = next(
        (o for o in ("no verdict", "refuted", "inconclusive") if o in outcomes), "supported"
    )
    return {"text": claim["text"], "verdict": verdict, "tests": tests}


def mean_interval(
    values: Sequence[float],
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """The mean over seeds and its two-sided confidence interval (Student's t), within bounds."""
    array = np.asarray(values, float)
    if array.size < 2:
        return Interval(float(array.mean()) if array.size else np.nan, np.nan, np.nan)
    mean = float(array.mean())
    half = stdtrit(array.size - 1, (1 + level) / 2) * array.std(ddof=1) / np.sqrt(array.size)
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]))


def outcome_of(interval: Interval, num_seeds: int) -> Outcome:
    """supported where the whole interval is above zero, refuted where it is below.

    An interval without width says that seeds differ by less than the examples can tell.
    """
    if num_seeds < FEWEST_SEEDS:
        return "no verdict"
    if not interval.high - interval.low > 1e-9 * abs(interval.mean):
        return "inconclusive"
    if interval.low > 0:
        return "supported"
    return "refuted" if interval.high < 0 else "inconclusive"


def _outcome(test: Mapping[str, Any], found: Mapping[str, Mapping[int, dict]]) -> dict[str, Any]:
    """The quantity that a test claims to be above zero: its mean and interval over seeds."""
    shared = set.intersection(*(set(found[arm]) for arm in test["arms"]))
    margins = []
    for seed in sorted(shared):
        here = [measures.values(found[arm][seed], test["measure"]) for arm in test["arms"]]
        known = [v for v in here if v is not None]
        if len(known) == len(here):
            margins.append(_margin(test, np.array(known)))
    interval = mean_interval(margins)
    return {
        "values": margins,
        **{k: v if np.isfinite(v) else None for k, v in interval._asdict().items()},
        "verdict": outcome_of(interval, len(margins)),
    }


def _margin(test: Mapping[str, Any], values: np.ndarray) -> float:
    """How far one seed is on the claimed side; values [arms, entries].

    "above"/"below" compare the first arm with the second, or with a level; "rises"/"falls" take the
    change from the first arm to the last of a line fitted over the arms, against `at` (or their
    numbers). Of several entries: the share on the claimed side, over one half.
    """
    relation = test["relation"]
    if relation in ("rises", "falls"):
        at = test.get("at", range(len(values)))
        found = np.polyfit(at, values, 1)[0] * (at[-1] - at[0])
    else:
        found = values[0] - (values[1] if len(values) > 1 else test["level"])
    if relation in ("falls", "below"):
        found = -found
    found = found - test.get("by", 0.0)
    return float(found[0] if len(found) == 1 else np.mean(found > 0) - 0.5)
