"""The training loop: steps, logs, validation, checkpoints, and going on where it stopped."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from robust_jax.data import TrainBatches
from robust_jax.errors import UserError
from robust_jax.progress import progress
from robust_jax.train.checkpoint import Checkpoints, Notes
from robust_jax.train.metrics import MetricsWriter, reduce_sums
from robust_jax.train.optimizer import Schedule
from robust_jax.train.state import TrainState
from robust_jax.train.validate import Validate

# 128 + SIGTERM: the run saved a checkpoint and stopped because it was asked to.
EXIT_TERMINATED = 143


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to train: train_step maps (state, batch, key) to (state, sums); durations in steps."""

    init: Callable[[], TrainState]
    train_step: Callable
    validate: Validate
    batches: TrainBatches
    schedule: Schedule
    key: jax.Array
    total_steps: int
    steps_per_epoch: float
    batch_size: int
    log_every: int
    validate_every: int
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """The states of the best and the last checkpoint, and how long training took."""

    best: TrainState
    last: TrainState
    timings: dict[str, float]


def train(plan: Plan, workdir: Path) -> Trained:
    """Trains to the end of the plan, going on from the last checkpoint in workdir.

    The best checkpoint is that of the highest robust validation accuracy, the earlier on a tie.
    Raises UserError at a non-finite loss or gradient, keeping the last good checkpoint; exits
    with EXIT_TERMINATED, after saving, on SIGTERM.
    """
    with _open(plan, workdir) as checkpoints:
        state, notes = checkpoints.restore("last") or (plan.init(), dict(_NEW_RUN))
        if int(state.step) < plan.total_steps:
            state, notes = _run(plan, workdir, checkpoints, state, notes)
        return _trained(plan, checkpoints, state, notes)


def restore(plan: Plan, workdir: Path) -> Trained:
    """What train returned when it finished. Raises UserError where it has not."""
    with _open(plan, workdir) as checkpoints:
        state, notes = checkpoints.restore("last") or (plan.init(), _NEW_RUN)
        if int(state.step) < plan.total_steps:
            raise UserError(
                f"training in {workdir} is at step {int(state.step)} of {plan.total_steps}; "
                "finish it with --mode=train"
            )
        return _trained(plan, checkpoints, state, notes)


def is_trained(plan: Plan, workdir: Path) -> bool:
    """Whether the last checkpoint of the plan is there."""
    with _open(plan, workdir) as checkpoints:
        return checkpoints.latest_step() >= plan.total_steps


def _open(plan: Plan, workdir: Path):
    return contextlib.closing(Checkpoints(workdir, jax.eval_shape(plan.init)))


def _trained(plan: Plan, checkpoints: Checkpoints, last: TrainState, notes: Notes) -> Trained:
    best = checkpoints.restore("best")
    if best is None:
        raise UserError("the best checkpoint is gone; train in another --workdir")
    return Trained(best=best[0], last=last, timings=_timings(plan, notes))


_NEW_RUN: Notes = {
    "best_accuracy": -1.0,
    "pending": [],
    "seconds": 0.0,
    "steps_timed": 0,
    "compile_seconds": 0.0,
}


def _run(
    plan: Plan, workdir: Path, checkpoints: Checkpoints, state: TrainState, notes: Notes
) -> tuple[TrainState, Notes]:
    start = int(state.step)
    if start:
        logging.info("resuming at step %d of %d", start, plan.total_steps)
    timed_before = notes["steps_timed"]  # the first step of each start compiles: not timed
    pending: list[Any] = []  # sums on the device, not yet fetched
    fetched: list[Any] = list(notes["pending"])  # sums since the last log line
    clock = time.perf_counter()

    def fetch():
        for offset, sums in enumerate(jax.device_get(pending)):
            sums = {name: [float(v) for v in pair] for name, pair in sums.items()}
            step = done - len(pending) + offset + 1
            for name in ("loss", "gradient_norm", "parameter_norm"):
                _check_finite(name.replace("_", " "), sums[name][0], step, workdir)
            fetched.append(sums)
        pending.clear()

    with (
        contextlib.closing(MetricsWriter(workdir, resumed_at=start)) as writer,
        progress(plan.total_steps, "train", "step", initial=start) as bar,
        _Terminated() as terminated,
    ):
        for done in range(start + 1, plan.total_steps + 1):
            state, sums = plan.train_step(state, plan.batches[done - 1], plan.key)
            pending.append(sums)
            bar.update()
            if done == start + 1:
                fetch()
                notes["compile_seconds"] = time.perf_counter() - clock
                clock = time.perf_counter()
            last = done == plan.total_steps
            if done % plan.log_every == 0 or last:
                fetch()
                values = {f"train/{name}": v for name, v in reduce_sums(fetched).items()}
                values["train/learning_rate"] = float(plan.schedule(done - 1))
                writer.write(done, {"epoch": done / plan.steps_per_epoch, **values})
                fetched.clear()
                bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
            if done % plan.validate_every == 0 or last:
                fetch()
                notes["seconds"], clock = _add_time(notes["seconds"], clock)
                values = plan.validate(state.variables)
                _check_finite("validation loss", values["cross_entropy"], done, workdir)
                writer.write(done, {f"validation/{name}": v for name, v in values.items()})
                if values["robust_accuracy"] > notes["best_accuracy"]:
                    notes["best_accuracy"] = values["robust_accuracy"]
                    checkpoints.save("best", state, {"best_accuracy": notes["best_accuracy"]})
                clock = time.perf_counter()
            if done % plan.checkpoint_every == 0 or last or terminated.flag:
                fetch()
                notes["seconds"], clock = _add_time(notes["seconds"], clock)
                notes["steps_timed"] = timed_before + done - start - 1
                # The best must be on disk before a later `last` makes a resumed run skip it.
                checkpoints.wait()
                checkpoints.save("last", state, {**notes, "pending": list(fetched)})
            if terminated.flag:
                checkpoints.wait()
                logging.warning("terminated: saved step %d; the same command goes on", done)
                sys.exit(EXIT_TERMINATED)
    checkpoints.wait()
    return state, notes


def _check_finite(name: str, value: float, step: int, workdir: Path) -> None:
    if not np.isfinite(value):
        raise UserError(
            f"the {name} became {value} at step {step}; the last good checkpoint, if there was "
            f"one, is kept in {workdir / 'checkpoints'}; a lower learning_rate or a "
            "gradient_clip_norm may help"
        )


def _add_time(seconds: float, clock: float) -> tuple[float, float]:
    now = time.perf_counter()
    return seconds + now - clock, now


def _timings(plan: Plan, notes: Notes) -> dict[str, float]:
    seconds = notes["seconds"]
    return {
        "compile_seconds": notes["compile_seconds"],
        "train_seconds": seconds,
        "examples_per_second": notes["steps_timed"] * plan.batch_size / max(seconds, 1e-9),
    }


class _Terminated:
    """Turns SIGTERM into a flag while training runs."""

    flag = False

    def __enter__(self):
        self._previous = signal.signal(signal.SIGTERM, self._raise_flag)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._previous)

    def _raise_flag(self, *_):
        self.flag = True
