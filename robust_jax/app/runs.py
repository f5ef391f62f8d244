"""What a run or a study left in its folder, as pandas and numpy have it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robust_jax.app import records
from robust_jax.errors import UserError
from robust_jax.files import write_json

Results = Mapping[str, Any]
# The version of results.json, which goes up where older readers would misread it. A file without
# one has version 0, which reads like 1.
SCHEMA = 1


class Run(NamedTuple):
    """The records of best and last; a row per line of metrics.jsonl; the images, if any."""

    records: dict[str, pd.DataFrame]
    metrics: pd.DataFrame
    images: dict[str, np.ndarray] | None


def results(workdir: Path | str) -> dict[str, Any]:
    """What results.json holds, of a run or of a study.

    Raises OSError where it is not finished, UserError where another version wrote it.
    """
    found = json.loads((Path(workdir) / "results.json").read_text())
    if found.get("schema", 0) > SCHEMA:
        raise UserError(
            f"{workdir}/results.json has the schema {found['schema']} and this robust_jax reads up "
            f"to {SCHEMA}; take the version that wrote it or a newer one"
        )
    return found


def write_results(workdir: Path, results: dict[str, Any]) -> None:
    """Writes results.json, which says that all the rest is there, and the version of its schema."""
    write_json(workdir / "results.json", {**results, "schema": SCHEMA})


def load(workdir: Path | str) -> Run:
    """Reads the rest of an evaluated run; nothing in it is unpickled."""
    workdir = Path(workdir)
    files = ((name, workdir / "records" / f"{name}.csv") for name in ("best", "last"))
    return Run(
        records={name: records.read(path) for name, path in files if path.exists()},
        metrics=metrics(workdir),
        images=_arrays(workdir / "examples.npz"),
    )


def metrics(workdir: Path) -> pd.DataFrame:
    """A row per line of metrics.jsonl; none where nothing was trained, as `evaluate` leaves it."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # A value that was not finite is null there.
    return pd.DataFrame([json.loads(line) for line in lines]).astype(float)


def measured(workdir: Path | str) -> dict[str, np.ndarray]:
    """The arrays of a run's measurements, as "measurement/array"; none where it took none."""
    return _arrays(Path(workdir) / "measurements.npz") or {}


def _arrays(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)
