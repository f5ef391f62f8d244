"""Looks up a run's numbers by their names in a study's config, and checks that they will exist.

"attack@eps" is a robust accuracy; a dotted path is looked up in results.json; "one - other" is the
difference of two. Names in braces stand for the study's radii, as in "pgd@{trained}".
"""

import itertools
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from robust_jax._audit import CHECKS
from robust_jax.app import entries, records, threat
from robust_jax.app.config import choose
from robust_jax.app.measurements import NUMBERS
from robust_jax.app.stored import Results
from robust_jax.app.wording import format_eps
from robust_jax.errors import UserError

# What there may be below a name in results.json: names, or patterns of names that a run makes up.
_Tree = Mapping[str, Any] | None
_ANYTHING: _Tree = None
_STATISTICS = dict.fromkeys(("mean", "median", "standard_error"))
_JACOBIAN = dict.fromkeys(("frobenius", "spectral"), _STATISTICS)
_VALIDATION = ("clean_accuracy", "robust_accuracy", "cross_entropy")
# What a validation logs about the margins that it tracks, by estimate.
_MARGINS = {
    "first_order": tuple(
        name
        for what in ("margin", "distance")
        for name in (f"minimum_{what}", f"average_{what}", *(f"{what}_q{q}" for q in (10, 50, 90)))
    ),
    "minimum_norm": ("minimum_margin_attack", "average_margin_attack"),
    "clever": ("minimum_distance_clever", "average_distance_clever"),
}


def value(results: Results, measure: str) -> float | None:
    """The number of a run; None if the run has no such number."""
    if " - " in measure:
        one, other = (value(results, part) for part in measure.split(" - "))
        return None if one is None or other is None else one - other
    if "@" in measure:
        entry = _attack(results, measure)
        return None if entry is None else entry["robust_accuracy"]
    node = _node(results, measure)
    return None if node is None else float(node)


def by_entry(results: Results, measure: str) -> dict[str, float]:
    """The finite numbers of "a.path/*", by what the star stands for."""
    path, _, start = measure[:-1].rpartition(".")
    found = (_node(results, path) or {}).items()
    return {
        k.removeprefix(start): float(v)
        for k, v in sorted(found)
        if k.startswith(start) and v is not None
    }


def outcomes(
    results: Results,
    table: pd.DataFrame | None,
    arrays: Mapping[str, np.ndarray],
    measure: str,
) -> pd.Series | None:
    """The values that a number is the mean of, one for each test image, by its index.

    None if the measure is not a mean over test images, if neither their table (see records.py) nor
    the arrays of the measurements have it, or if an image has no value.
    """
    if " - " in measure:
        one, other = (outcomes(results, table, arrays, part) for part in measure.split(" - "))
        return None if one is None or other is None else (one - other).dropna()
    if measure.startswith("measurements."):
        _, label, name = measure.split(".", 2)
        of_images, number = arrays.get(f"{label}/of_images/{name}"), _node(results, measure)
        if of_images is None or number is None or not np.isfinite(of_images).all():
            return None
        # If a run was stopped between its two files, the arrays are from another measurement.
        if not np.isclose(of_images.mean(dtype=np.float64), number):
            return None
        return pd.Series(of_images.astype(float))
    if table is None:
        return None
    table = table.set_index("index")
    if measure in _COLUMNS:
        return _finite(table, _COLUMNS[measure])
    if measure.startswith("jacobian.") and measure.endswith(".mean"):
        _, of, norm, _ = measure.split(".")
        scale = results["temperature"] if of == "matched" else 1.0
        found = _finite(table, f"{norm}_{'logits' if of == 'matched' else of}")
        return None if found is None else found / scale
    if "@" not in measure or (entry := _attack(results, measure)) is None:
        return None
    if entry["attack"].startswith("worst_case"):
        names = [e["name"] for e in results["attacks"] if e["norm"] == entry["norm"]]
        held = records.worst_case(table[: entry["count"]], names, entry["eps"])
    else:
        held = records.held(table, entry["name"], entry["eps"]).dropna()
    return held.astype(float)


def _finite(table: pd.DataFrame, column: str) -> pd.Series | None:
    """A column of the records; None where it is not there, or not a number for each image."""
    if column not in table or not np.isfinite(found := table[column].astype(float)).all():
        return None
    return found


# Means over test images by their columns in the records.
_COLUMNS = {
    "clean.accuracy": "correct",
    "clean.cross_entropy": "cross_entropy",
    "relative_slope.mean": "relative_slope",
}
_SHARES = ("accuracy", "saturated", "worst_inside")


def is_share(measure: str) -> bool:
    """Whether the measure is a share of the examples, or the difference of two."""
    return all(
        "@" in part or part.endswith(_SHARES) or ".transfer." in part
        for part in measure.split(" - ")
    )


def unit(measure: str) -> str:
    """The unit of the measure; a share is in percent."""
    return " %" if is_share(measure) else ""


# The bounds of measures that are not shares of the examples, by patterns of their names.
_BOUNDED: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("mean_confidence", "median_doubt", "calibration_error"), (0.0, 1.0)),
    "silhouette": (-1.0, 1.0),
    **dict.fromkeys(
        (*NUMBERS["energy"], "loss/*", "cross_entropy", "*_distance*", "distance_q*"),
        (0.0, np.inf),
    ),
}


def bounds(measure: str) -> tuple[float, float]:
    """The least and the largest value that the measure can have."""
    name = measure.rpartition(".")[2]
    # A config labels measurements as it likes, but only gaps have numbers of these names.
    is_gap = measure.startswith("measurements.") and name in NUMBERS["gaps"]
    is_difference = " - " in measure or is_gap
    if is_share(measure):
        return (-1.0, 1.0) if is_difference else (0.0, 1.0)
    name = "" if is_difference else name
    known = (between for pattern, between in _BOUNDED.items() if fnmatch(name, pattern))
    return next(known, (-np.inf, np.inf))


def with_radii(measure: str, radii: Mapping[str, float], path: str) -> str:
    """The measure with numbers for the names in braces. Raises UserError for an unknown name."""
    return _filled(measure, {name: repr(float(eps)) for name, eps in radii.items()}, path)


def label_with_radii(label: str, radii: Mapping[str, float], path: str) -> str:
    """A label with the radii as people write them. Raises UserError for an unknown name."""
    return _filled(label, {name: format_eps(eps) for name, eps in radii.items()}, path)


class Known(NamedTuple):
    """What the results of a run will have: the radii of each attack, and the numbers."""

    radii: Mapping[str, tuple[float, ...]]
    numbers: _Tree


def known(config: ConfigDict) -> Known:
    """What the results of a run of the config will have."""
    return Known(_radii(config), _numbers(config))


def check(measure: str, known: Known, path: str) -> None:
    """Checks that a run will have the number. Raises UserError with what there is instead."""
    for part in measure.split(" - "):
        if "@" in part:
            _check_attack(part, known.radii, path)
        else:
            _check_path(part, known.numbers, path)


def _attack(results: Results, measure: str) -> Mapping[str, Any] | None:
    """The entry of results.json that "attack@eps" names."""
    name, eps = _attack_and_eps(measure)
    for entry in results["attacks"]:
        if entry["name"] == name and np.isclose(entry["eps"], eps, rtol=1e-5):
            return entry
    return None


def _attack_and_eps(measure: str) -> tuple[str, float]:
    name, _, eps = measure.partition("@")
    return name, float(eps)


def _filled(text: str, radii: Mapping[str, str], path: str) -> str:
    try:
        return text.format(**radii)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} is {text!r}; in braces there may be a radius of the scale: "
            f"{', '.join(radii) or 'there is none'}"
        ) from error


def _radii(config: ConfigDict) -> dict[str, tuple[float, ...]]:
    """The radii of each attack, and of the worst case in each norm."""
    radii: dict[str, tuple[float, ...]] = {}
    for label, entry in threat.complete(config).attacks.items():
        grid = entries.attack_grid(label, entry)
        radii[label] = grid.eps
        worst = f"worst_case_{grid.norm}"
        radii[worst] = radii.get(worst, ()) + grid.eps
    return radii


def _check_attack(measure: str, radii: Mapping[str, tuple[float, ...]], path: str) -> None:
    try:
        name, eps = _attack_and_eps(measure)
    except ValueError:
        raise UserError(f"{path} is {measure!r}; a radius stands after the @") from None
    choose(radii, name, f"{path}'s attack")
    if not np.isclose(radii[name], eps, rtol=1e-5).any():
        raise UserError(
            f"{path} is {measure!r}, and {name} runs at "
            f"{', '.join(f'{radius:g}' for radius in sorted(set(radii[name])))}"
        )


def _numbers(config: ConfigDict) -> _Tree:
    """The numbers that the results of a run of the config will have."""
    tracked = (names for of, names in _MARGINS.items() if config.track_margins[of])
    validation = dict.fromkeys((*_VALIDATION, *itertools.chain(*tracked)))
    numbers = {
        label: dict.fromkeys(
            NUMBERS[choose(NUMBERS, entry.get("name", label), f"config.measurements.{label}.name")]
        )
        for label, entry in config.measurements.items()
    }
    # Each check names its own values.
    check = {"verdict": _ANYTHING, "values": {"*": _ANYTHING}}
    return {
        "clean": dict.fromkeys(("accuracy", "cross_entropy", "count")),
        "jacobian": {
            "logits": {
                **_JACOBIAN,
                "frobenius_estimate": {**_STATISTICS, "mean_error_of_estimate": _ANYTHING},
            },
            "probabilities": _JACOBIAN,
            "matched": _JACOBIAN,
        },
        "temperature": _ANYTHING,
        "relative_slope": _STATISTICS,
        "training": dict.fromkeys(("first", "best", "last"), validation),
        "measurements": numbers,
        "audit": {"checks": dict.fromkeys(CHECKS, check), "num_examples": _ANYTHING},
        "timings": {"*": _ANYTHING},
    }


def _check_path(measure: str, tree: _Tree, path: str) -> None:
    names = measure.split(".")
    for i, name in enumerate(names):
        if tree is None:
            raise UserError(f"{path} is {measure!r}; there is nothing below {'.'.join(names[:i])}")
        # Both the name and what the run makes up may be patterns.
        found = [known for known in tree if fnmatch(name, known) or fnmatch(known, name)]
        if not found:
            choose(tree, name, path if measure == name else f"{path} is {measure!r}, where a part")
        tree = tree[found[0]]
    if tree is not None:
        raise UserError(
            f"{path} is {measure!r}, which is not a number; below are {', '.join(tree)}"
        )


def _node(results: Results, path: str) -> Any:
    """The value at a dotted path, an entry of a list by its name; None if there is none."""
    node: Any = results
    for part in path.split("."):
        if isinstance(node, list):
            node = {entry["name"]: entry for entry in node}
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
