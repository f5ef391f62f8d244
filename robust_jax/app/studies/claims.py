"""Verdicts on a study's claims: tests on the runs' numbers, paired by seed and by test image.

Nothing is typed in: a verdict follows from the 95 % interval of a quantity that the claim says is
above zero, and from the smallest effect that is worth claiming, which the config sets.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from robust_jax.app.stored import Evidence
from robust_jax.app.studies import measures
from robust_jax.app.studies.intervals import Interval, as_wide_as, interval
from robust_jax.errors import UserError

Verdict = Literal["supported", "supported, but small", "refuted", "inconclusive", "no verdict"]
RELATIONS = ("above", "below", "rises", "falls")
# The smallest effect worth claiming and the widest interval allowed, for one test or for all tests
# of a claim.
SIZES = ("smallest_effect", "widest")
KEYS = ("measure", "arms", "relation", "level", "by", "at", *SIZES)
# Student's t has an interval for two values, but it is too wide to say anything.
FEWEST_SEEDS = 3
# A claim's verdict is the first of these that one of its tests has.
_DECISIVE: tuple[Verdict, ...] = (
    "refuted",
    "no verdict",
    "inconclusive",
    "supported, but small",
    "supported",
)


Found = Mapping[str, Mapping[int, Evidence]]  # by arm and seed


def judge(
    text: str, tests: Sequence[Mapping[str, Any]], found: Found, *, adds_seeds: bool = False
) -> dict[str, Any]:
    """A claim with the outcome of each of its tests, and its verdict.

    It is refuted if one test is, and supported if every test is (but small if one effect is).
    Otherwise it is inconclusive, or has no verdict if a test has fewer than three seeds.
    adds_seeds: whether seeds are added until intervals are as narrow as was asked.
    """
    judged = [judge_test(test, found, adds_seeds=adds_seeds) for test in tests]
    verdicts = {test["verdict"] for test in judged}
    weakest = next(v for v in _DECISIVE if v in verdicts)
    return {"text": text, "verdict": weakest, "tests": judged}


def judge_test(
    test: Mapping[str, Any], found: Found, *, adds_seeds: bool = False
) -> dict[str, Any]:
    """The test with the quantity that it claims to be above zero, and its verdict.

    A test of "a.path/*" claims this for most of the entries, such as layers. Each entry has an
    interval and a verdict of its own.
    """
    if test["measure"].endswith("/*"):
        return _judge_most(test, found, adds_seeds)
    runs = _paired(test, found)
    numbers = [[measures.value(run.results, test["measure"]) for run in arms] for arms in runs]
    measured = np.array([of_seed for of_seed in numbers if None not in of_seed], float)
    of_images = by_image(test["measure"], runs)  # [seeds, arms, images], for a mean over them
    values = measured if of_images is None else of_images
    outcomes = np.array([_on_claimed_side(test, of_seed) for of_seed in values])
    # A negative `by` is a tolerance: to be within it is the claim, so no effect is too small.
    tolerance = -min(test.get("by", 0.0), 0.0)
    smallest = 0.0 if tolerance else _size(test.get("smallest_effect", 0.0), test, measured)
    widest = _size(test["widest"], test, measured) if "widest" in test else smallest or tolerance
    known = interval(outcomes, bounds=_bounds(test), shares=measures.is_share(test["measure"]))
    if adds_seeds:
        known = as_wide_as(widest, known)
    return {
        **test,
        "values": [float(np.mean(of_seed)) for of_seed in outcomes],
        **_known(known),
        "images": outcomes.shape[1] if outcomes.ndim == 2 else None,
        "smallest_effect": smallest,
        "widest": widest,
        "verdict": verdict(known, len(outcomes), smallest),
    }


def _bounds(test: Mapping[str, Any]) -> tuple[float, float]:
    """The least and the largest mean that the claimed quantity can have."""
    low, high = measures.bounds(test["measure"])
    if test["relation"] in ("rises", "falls"):  # from a fitted line, which may overshoot
        return -np.inf, np.inf
    by = test.get("by", 0.0)
    return low - high - by, high - low - by


def _paired(test: Mapping[str, Any], found: Found) -> list[list[Evidence]]:
    """The runs of the test's arms, [seeds][arms], for the seeds that all the arms have."""
    shared = sorted(set.intersection(*(set(found[arm]) for arm in test["arms"])))
    return [[found[arm][seed] for arm in test["arms"]] for seed in shared]


def _judge_most(test: Mapping[str, Any], found: Found, adds_seeds: bool) -> dict[str, Any]:
    by_seed = [
        [measures.by_entry(run.results, test["measure"]) for run in arms]
        for arms in _paired(test, found)
    ]
    measured = [of_seed for of_seed in by_seed if all(of_seed)]
    names = dict.fromkeys(name for of_seed in measured for of_arm in of_seed for name in of_arm)
    entries = {}
    for name in names:
        of_entry = {**test, "measure": test["measure"].removesuffix("*") + name}
        judged = judge_test(of_entry, found, adds_seeds=adds_seeds)
        entries[name] = {k: v for k, v in judged.items() if k not in KEYS or k in SIZES}
    verdicts = [entry["verdict"] for entry in entries.values()]
    # Only entries that every run has.
    whole = [entry["values"] for entry in entries.values() if len(entry["values"]) == len(measured)]
    num_images = {entry["images"] for entry in entries.values()}
    return {
        **test,
        "entries": entries,
        "values": [float(np.mean(np.array(of_seed) > 0)) for of_seed in zip(*whole, strict=True)],
        "images": num_images.pop() if len(num_images) == 1 else None,
        "verdict": majority(verdicts),
    }


def majority(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a claim about most of several entries, from the verdicts on each of them."""
    if not verdicts:
        return "no verdict"
    large, small = (verdicts.count(v) for v in ("supported", "supported, but small"))
    if 2 * (large + small) > len(verdicts):
        return "supported" if 2 * large > len(verdicts) else "supported, but small"
    if 2 * verdicts.count("refuted") >= len(verdicts):
        return "refuted"
    return "no verdict" if "no verdict" in verdicts else "inconclusive"


def _known(known: Interval) -> dict[str, float | None]:
    return {k: v if np.isfinite(v) else None for k, v in known._asdict().items()}


def verdict(known: Interval, num_seeds: int, smallest_effect: float = 0.0) -> Verdict:
    """What an interval says of the claim that its quantity is above zero.

    supported: the whole interval is above zero. refuted: it is below the smallest effect that is
    worth claiming. Where both hold there is an effect, and it is smaller than that. An interval
    without width means that seeds differ too little to tell.
    """
    if num_seeds < FEWEST_SEEDS:
        return "no verdict"
    if not known.high - known.low > 1e-9 * abs(known.mean):
        return "inconclusive"
    if known.low > 0:
        return "supported" if known.high >= smallest_effect else "supported, but small"
    return "refuted" if known.high < smallest_effect else "inconclusive"


def needs_more_seeds(judged: Mapping[str, Any]) -> bool:
    """Whether the interval of a test is wider than was asked, and more seeds can narrow it.

    What is asked is `widest`, or else the smallest effect: an interval as narrow as that cannot
    hold both it and zero, so there is a verdict. Where the interval lies plays no part: adding
    seeds until it excludes zero would find effects that do not exist.
    """
    if entries := judged.get("entries"):
        return any(map(needs_more_seeds, entries.values()))
    widest = judged.get("widest")
    if not widest or not judged["values"]:
        return False
    if len(judged["values"]) < FEWEST_SEEDS:
        return True
    width = judged["high"] - judged["low"]
    return width > widest * (1 + 1e-9) and widest > 2 * judged["from_images"]


def check_form(test: Mapping[str, Any], path: str) -> None:
    """Checks that a test has the arms that its relation compares. Raises UserError otherwise."""
    for field in ("by", "level"):
        if not isinstance(test.get(field, 0.0), int | float):
            raise UserError(f"{path} has a test whose {field} is {test[field]!r}; give a number")
    count, relation, measure = len(test["arms"]), test["relation"], test["measure"]
    if relation in ("rises", "falls"):
        if count < 2 or "level" in test:
            raise UserError(f"{path} has a test that {relation!r}: give two or more arms, no level")
        if len(test.get("at", test["arms"])) != count:
            raise UserError(f"{path}'s at is {test['at']}; give a number for each of {count} arms")
    elif count != (1 if "level" in test else 2) or "at" in test:
        raise UserError(f"{path} has a test {relation!r}: give it two arms, or one and a level")
    if measure.count(" - ") + measure.endswith("/*") > 1:
        raise UserError(f"{path}'s measure is {measure!r}; give one difference, or a * alone")


def check_size(test: Mapping[str, Any], field: str, path: str) -> None:
    """Checks a test's smallest effect or width. Raises UserError for what is not one."""
    size = test.get(field, 0.0)
    relative = _relative(size)
    if relative is not None and measures.is_share(test["measure"]):
        raise UserError(f"{path} is {size!r}; {test['measure']} is a share, so a point is 0.01")
    if relative is not None and "level" in test:
        raise UserError(f"{path} is {size!r}; with a level it must be a number")
    if relative is None and not (isinstance(size, int | float) and size >= 0):
        raise UserError(
            f'{path} is {size!r}; it is a number in the unit of the measure, or "10 %" of what the '
            "first arm is compared with"
        )


def _size(size: float | str, test: Mapping[str, Any], numbers: np.ndarray) -> float:
    """The size in the unit of numbers [seeds, arms]; a percentage is of the reference mean."""
    relative = _relative(size)
    if relative is None:
        return float(size)
    reference = 0 if test["relation"] in ("rises", "falls") else 1
    return relative * abs(float(np.mean(numbers[:, reference]))) if len(numbers) else 0.0


def _relative(size: Any) -> float | None:
    """0.1 for "10 %"; None if it is not a percentage."""
    if not isinstance(size, str) or not size.endswith("%"):
        return None
    try:
        return float(size.removesuffix("%")) / 100
    except ValueError:
        return None


def by_image(measure: str, runs: Sequence[Sequence[Evidence]]) -> np.ndarray | None:
    """The values, [seeds, arms, images], that a number is the mean of, from runs [seeds][arms].

    Seeds without the number are left out. The images are those on which every run was measured.
    None if there are none.
    """
    found = [
        [measures.outcomes(run.results, run.records, run.arrays, measure) for run in of_seed]
        for of_seed in runs
        if all(measures.value(run.results, measure) is not None for run in of_seed)
    ]
    known = [outcomes for of_seed in found for outcomes in of_seed if outcomes is not None]
    if not found or len(known) < len(found) * len(found[0]):
        return None
    table = pd.concat(known, axis=1, join="inner").to_numpy(float)
    return table.T.reshape(len(found), len(found[0]), -1) if len(table) else None


def _on_claimed_side(test: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    """How far one seed is on the claimed side; values [arms] or [arms, images].

    "above"/"below" compare the first arm with the second, or with a level; "rises"/"falls" fit a
    line over the arms, against `at` (or their numbers), and take its change from the first arm to
    the last.
    """
    relation = test["relation"]
    if relation in ("rises", "falls"):
        at = test.get("at", range(len(values)))
        found = np.polyfit(at, values, 1)[0] * (at[-1] - at[0])
    else:
        found = values[0] - (values[1] if len(values) > 1 else test["level"])
    if relation in ("falls", "below"):
        found = -found
    return found - test.get("by", 0.0)
