"""Adds an evaluation to a finished run without losing earlier results.

The folder's config becomes that of all its evaluations: what trained it, every attack and
measurement that was ever asked for, and the newest of the rest.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from robust_jax.app import config as config_lib
from robust_jax.app import threat
from robust_jax.app.folder import Mode
from robust_jax.app.records import column
from robust_jax.errors import UserError


def merged(old: ConfigDict, new: ConfigDict, mode: Mode) -> ConfigDict:
    """The config of a finished run, with what the mode adds or changes.

    Raises UserError if an entry would replace a different one under its label.
    """
    result = ConfigDict(old)
    for field in ("data_dir", "parallel"):
        result[field] = new[field]
    if mode == "evaluate":
        if result.threat != new.threat:  # training was against the old one
            trained = threat.complete(old)
            for field in ("adversary", "validation_attack", "regularizers"):
                result[field] = trained[field]
            result.threat = new.threat
        result.attacks = _attacks(old, new)
        result.evaluation = ConfigDict(new.evaluation)
        result.evaluation.num_examples = _larger(
            old.evaluation.num_examples, new.evaluation.num_examples, "config.evaluation"
        )
        result.evaluation.last = old.evaluation.last or new.evaluation.last
    if mode in ("evaluate", "measure"):
        was, asked = threat.complete(old).measurements, threat.complete(new).measurements
        for label in set(was) & set(asked):
            _check_same("config.measurements", label, was[label], asked[label])
        # Under another threat model the old ones keep their radii.
        earlier = was if result.threat != old.threat else old.measurements
        result.measurements = ConfigDict({**earlier, **new.measurements})
    if mode == "audit" or (mode == "evaluate" and new.audit.num_examples):
        result.audit = new.audit
    return result


def check_alike(old: ConfigDict, new: ConfigDict, where: Path) -> None:
    """Checks that a run's attacks and measurements match its study's under the same label.

    Attacks may differ in radii and number of examples. Raises UserError for other differences.
    """
    one, other = threat.complete(old), threat.complete(new)
    for label in set(one.attacks) & set(other.attacks):
        both = _but_for_size(label, one.attacks, other.attacks)
        _check_same(f"{where}: config.attacks", label, *both)
    for label in set(one.measurements) & set(other.measurements):
        tables = one.measurements, other.measurements
        _check_same(f"{where}: config.measurements", label, *(table[label] for table in tables))


def with_kept(fresh: pd.DataFrame, old: pd.DataFrame, labels: Iterable[str]) -> pd.DataFrame:
    """The fresh records with the columns of an earlier evaluation's attacks, by example."""
    labels = tuple(f"{label}@" for label in labels)
    columns = [name for name in old.columns if name.startswith(labels)] if labels else []
    return fresh.join(old.set_index("index")[columns], on="index")


def are_kept(old: pd.DataFrame | None, entries: dict[str, Any]) -> set[str]:
    """The labels whose columns the records hold, at every radius of their complete entries."""
    found = set()
    for label, entry in entries.items():
        columns = [column(label, eps, "held") for eps in threat.radii(entry["eps"])]
        if old is not None and all(name in old for name in columns):
            found.add(label)
    return found


def _attacks(old: ConfigDict, new: ConfigDict) -> ConfigDict:
    was, asked = (threat.complete(config).attacks for config in (old, new))
    result = {**was, **new.attacks}
    for label in set(was) & set(asked):
        _check_same("config.attacks", label, *_but_for_size(label, was, asked))
        path = f"config.attacks.{label}"
        radii = sorted({*threat.radii(was[label].eps), *threat.radii(asked[label].eps)})
        count = _larger(
            was[label].get("num_examples", 0), asked[label].get("num_examples", 0), path
        )
        if radii != sorted(threat.radii(asked[label].eps)) or count != asked[label].get(
            "num_examples", 0
        ):
            result[label] = {**asked[label], "eps": tuple(radii), "num_examples": count}
    return ConfigDict(result)


def _but_for_size(label: str, *tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entry of each table without its radii and its number of examples."""
    return [
        {k: v for k, v in table[label].items() if k not in ("eps", "num_examples")}
        for table in tables
    ]


def _check_same(path: str, label: str, was: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    trees = (config_lib.to_json(ConfigDict({label: entry})) for entry in (was, asked))
    if changed := config_lib.differences(*trees):
        raise UserError(
            f"{path}.{label} is not what was evaluated under that label ({'; '.join(changed)}); "
            "give it another label, so that the results of both are kept"
        )


def _larger(was: int, asked: int, path: str) -> int:
    """The larger number of examples; 0 stands for all."""
    if was != asked and (not was or (asked and asked < was)):
        logging.info("%s.num_examples stays %s, as before", path, was or "all")
        return was
    return asked


def arrays(
    old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], labels: Iterable[str]
) -> dict[str, np.ndarray]:
    """The arrays of all measurements; those under the labels are only the new ones."""
    replaced = set(labels)
    return {**{k: v for k, v in old.items() if k.partition("/")[0] not in replaced}, **new}
