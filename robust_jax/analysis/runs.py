"""What a finished run left in its folder, as pandas and numpy have it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd


class Run(NamedTuple):
    """results.json; the records of best and last; a row per line of metrics.jsonl; the images."""

    results: dict[str, Any]
    records: dict[str, pd.DataFrame]
    metrics: pd.DataFrame
    images: dict[str, np.ndarray] | None


def load(workdir: Path | str) -> Run:
    """Reads a run's folder; nothing in it is unpickled. Raises OSError where it is not finished."""
    workdir = Path(workdir)
    images = workdir / "examples.npz"
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return Run(
        results=json.loads((workdir / "results.json").read_text()),
        records={
            name: pd.read_csv(workdir / "records" / f"{name}.csv") for name in ("best", "last")
        },
        # A value that was not finite is null there.
        metrics=pd.DataFrame([json.loads(line) for line in lines]).astype(float),
        images=dict(np.load(images, allow_pickle=False)) if images.exists() else None,
    )
