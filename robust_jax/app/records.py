"""The table of an evaluation, one row per test example: its columns and what follows from them.

For an attack named `name` at a radius eps there are the columns name@eps/held (boolean),
name@eps/distance (float, pixel units; NaN where the example held), name@eps/margin (float, the
output margin at what the attack returned) and, for AutoAttack, name@eps/broken_by (the member).
All are missing where the example was not attacked. `key` is the example's PRNG key in hexadecimal.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

What = Literal["held", "distance", "margin", "broken_by"]


def read(path: Path) -> pd.DataFrame:
    """Reads the table with the column types that it was written with."""
    records = pd.read_csv(path, dtype={"key": str})
    return records.astype({c: "boolean" for c in records.columns if c.endswith("/held")})


def column(name: str, eps: float, what: What) -> str:
    """The name of an attack's column at a radius, which is rounded to six digits."""
    return f"{name}@{eps:g}/{what}"


def held(records: pd.DataFrame, name: str, eps: float) -> pd.Series:
    """Whether each example held; <NA> where it was not attacked."""
    return records[column(name, eps, "held")].astype("boolean")


def worst_case(records: pd.DataFrame, names: Iterable[str], eps: float) -> pd.Series:
    """Whether each example is correct and held against all of the named attacks up to eps.

    The balls are nested, so what broke an example at a smaller radius breaks it at eps.
    """
    held_all = records["correct"].astype(bool)
    for name, radius in _columns(records, names, eps):
        held_all &= held(records, name, radius).fillna(True).astype(bool)
    return held_all


def fates(records: pd.DataFrame, names: Iterable[str], eps: float) -> pd.Series:
    """The fate of each example under `worst_case`: "misclassified", "broken" or "held"."""
    held_all = worst_case(records, names, eps)
    fate = np.where(held_all, "held", np.where(records["correct"], "broken", "misclassified"))
    return pd.Series(fate, index=records.index, name="fate")


def breaking_eps(records: pd.DataFrame, names: Iterable[str]) -> pd.Series:
    """The smallest eps at which any of the named attacks broke each example.

    0 where it was misclassified to begin with, inf where it held.
    """
    eps = pd.Series(np.inf, index=records.index, name="breaking_eps")
    for name, radius in reversed(_columns(records, names, np.inf)):
        eps[broke(records, name, radius)] = radius
    return eps.where(records["correct"].astype(bool), 0.0)


def first_to_break(records: pd.DataFrame, names: Iterable[str], eps: float) -> pd.DataFrame:
    """The smallest radius up to eps at which an attack broke each example, and which attack did.

    Columns: eps (0 where it was misclassified, inf where it held), by (the attack, "several
    attacks" where more than one broke it there, "misclassified" or "none") and distance, the
    smallest that any of them found.
    """
    correct = records["correct"].astype(bool)
    found = pd.DataFrame(
        {
            "eps": np.where(correct, np.inf, 0.0),
            "by": np.where(correct, "none", "misclassified"),
            "distance": np.nan,
        },
        index=records.index,
    )
    for name, radius in _columns(records, names, eps):
        distance = records[column(name, radius, "distance")]
        here = broke(records, name, radius) & (found["eps"] >= radius)
        first = here & np.isinf(found["eps"])
        found.loc[here & ~first, "by"] = "several attacks"
        found.loc[first, "by"] = name
        if (member := column(name, radius, "broken_by")) in records:
            found.loc[first, "by"] += " (" + records.loc[first, member].astype(str) + ")"
        found.loc[here, "eps"] = radius
        found.loc[here, "distance"] = np.fmin(found.loc[here, "distance"], distance[here])
    return found


def broke(records: pd.DataFrame, name: str, eps: float) -> pd.Series:
    """Whether the attack broke each example; False where it did not attack."""
    return (~held(records, name, eps)).fillna(False).astype(bool)


def as_far_as(records: pd.DataFrame, attacked: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Drops the named attacks' results on examples that they did not see in `attacked`."""
    records, starts = records.copy(), tuple(f"{name}@" for name in names)
    for label in records.columns:
        held = f"{label.rpartition('/')[0]}/held"
        if starts and label.startswith(starts) and held in attacked:
            records[label] = records[label].where(attacked[held].notna())
    return records


def disagreements(stored: pd.DataFrame, fresh: pd.DataFrame) -> dict[str, int]:
    """The number of rows in which two tables differ, by column.

    Numbers differ by more than 1 % plus 0.01, distances, which are small, by more than 1 % plus
    1e-5, and whole numbers, such as classes, by anything. A column that one table lacks differs in
    every row.
    """
    found = {}
    for label in stored.columns.union(fresh.columns, sort=False):
        if label not in stored or label not in fresh or len(stored) != len(fresh):
            found[label] = len(stored)
            continue
        one, other = stored[label], fresh[label]
        if pd.api.types.is_integer_dtype(one) and pd.api.types.is_integer_dtype(other):
            differs = one != other
        elif pd.api.types.is_numeric_dtype(one) and pd.api.types.is_numeric_dtype(other):
            slack = 1e-5 if label.endswith("/distance") else 1e-2
            differs = ~np.isclose(
                one.astype(float), other.astype(float), rtol=1e-2, atol=slack, equal_nan=True
            )
        else:
            differs = one.fillna("").astype(str) != other.fillna("").astype(str)
        if differs.any():
            found[label] = int(differs.sum())
    return found


def _columns(records: pd.DataFrame, names: Iterable[str], eps: float) -> list[tuple[str, float]]:
    """The named attacks of the table and their radii up to eps, the smallest radius first."""
    names, found = set(names), []
    for label in records.columns:
        name, _, radius = label.removesuffix("/held").rpartition("@")
        if label.endswith("/held") and name in names and float(radius) <= eps * (1 + 1e-5):
            found.append((name, float(radius)))
    return sorted(found, key=lambda attack: attack[1])
