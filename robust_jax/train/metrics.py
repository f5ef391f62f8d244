"""Where training's numbers go: metrics.jsonl and TensorBoard events."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from robust_jax.devices import processes
from robust_jax.files import write_atomically

Totals = Mapping[str, tuple[float, float]]


def reduce_sums(steps: Iterable[Totals]) -> dict[str, float]:
    """Σ sum / Σ count over steps, by name: a mean over examples, never a mean of means."""
    totals: dict[str, tuple[float, float]] = {}
    for step in steps:
        for name, (value, count) in step.items():
            old_value, old_count = totals.get(name, (0.0, 0.0))
            totals[name] = (old_value + float(value), old_count + float(count))
    return {name: value / count for name, (value, count) in totals.items() if count}


class MetricsWriter:
    """Appends to workdir/metrics.jsonl and workdir/tensorboard, in the first process.

    A run resumed at a step drops the lines after it, so none is duplicated.
    """

    def __init__(self, workdir: Path, *, resumed_at: int):
        from tensorboardX import SummaryWriter  # slow to import, and only training needs it

        self._writes = processes.is_first()
        if not self._writes:
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]
        # A run that starts over writes its line of step 0 again.
        kept = [line for line in lines if resumed_at and json.loads(line)["step"] <= resumed_at]
        write_atomically(path, "".join(kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=resumed_at + 1 if resumed_at else None,
            max_queue=10**6,  # a full disk ends its thread; then a full queue would block for ever
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of values at a step, flushed to the file when this returns."""
        if not self._writes:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._tensorboard.close()
