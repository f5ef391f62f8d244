"""The table of an evaluation, one row per test example: its columns and what follows from them.

For an attack named `name` at a radius eps there are the columns name@eps/held (bool) and
name@eps/distance (float, pixel units; NaN where the example held).
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd


def column(name: str, eps: float, what: Literal["held", "distance"]) -> str:
    """The name of an attack's column at a radius, which is rounded to six digits."""
    return f"{name}@{eps:g}/{what}"


def worst_case(records: pd.DataFrame, names: Iterable[str], eps: float) -> pd.Series:
    """Whether each example, right to begin with, held against all of the named attacks up to eps.

    The balls are nested, so what broke an example at a smaller radius breaks it at eps.
    """
    names = set(names)
    held = records["correct"].astype(bool)
    for label in records.columns:
        name, _, radius = label.removesuffix("/held").rpartition("@")
        if label.endswith("/held") and name in names and float(radius) <= eps * (1 + 1e-5):
            held &= records[label].astype(bool)
    return held


def fates(records: pd.DataFrame, names: Iterable[str], eps: float) -> pd.Series:
    """What became of each example: "misclassified", "broken" or "held", as `worst_case` has it."""
    held = worst_case(records, names, eps)
    fate = np.where(held, "held", np.where(records["correct"], "broken", "misclassified"))
    return pd.Series(fate, index=records.index, name="fate")
