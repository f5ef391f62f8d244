"""The training loop: steps, logs, validation, checkpoints, and resuming where it stopped.

A run is a generator that asks for its next step, so that several runs can step in one program.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from robust_jax.data import TrainBatches
from robust_jax.devices import speed, stopping
from robust_jax.devices.stopping import Stop
from robust_jax.errors import UserError
from robust_jax.progress import progress_bar
from robust_jax.train.checkpoint import Checkpoints, Notes
from robust_jax.train.metrics import MetricsWriter, reduce_sums
from robust_jax.train.optimizer import Schedule
from robust_jax.train.state import TrainState
from robust_jax.train.validate import Validate


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run trains, and how often it logs, validates and saves; durations in steps.

    train_step maps (state, batch, key) to (state, sums); vmapped_train_step maps tuples of them,
    one for each of several runs, to a tuple of (state, sums).
    """

    init: Callable[[], TrainState]
    train_step: Callable
    vmapped_train_step: Callable
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
    validate_first: bool = False  # also the network at initialisation
    description: str = "train"


@dataclasses.dataclass(frozen=True)
class Trained:
    """The states of the best and the last checkpoint, and how long training took."""

    best: TrainState
    last: TrainState
    timings: dict[str, float]


def train(plan: Plan, workdir: Path, profile: Path | None = None) -> Trained:
    """Trains to the end of the plan, continuing from the last checkpoint in workdir.

    The best checkpoint has the highest robust validation accuracy; on a tie the earlier one wins.
    Raises UserError at a non-finite loss or gradient, keeping the last good checkpoint. On SIGINT
    and SIGTERM it saves and exits with 128 + the signal. profile: a folder for a trace of the ten
    steps after the first, which TensorBoard, XProf and Perfetto can read.
    """
    return train_seeds([plan], [workdir], profile)[0]


def train_seeds(
    plans: Sequence[Plan], workdirs: Sequence[Path], profile: Path | None = None
) -> list[Trained]:
    """`train` for several runs that differ only in their seed, all stepped by one program.

    Small networks leave an accelerator idle; under vmap the runs share it. Each run has its own
    folder, checkpoints and logs, and resumes from there, alone or with the others.
    """
    with stopping.saving() as stop:
        shared = _Shared(stop)
        runs = [
            _train(plan, workdir, shared, shown=i == 0)
            for i, (plan, workdir) in enumerate(zip(plans, workdirs, strict=True))
        ]
        trained: dict[int, Trained | None] = {}
        asked: dict[int, tuple[TrainState, Any]] = {}

        def advance(i, result):
            asked.pop(i, None)
            try:
                asked[i] = runs[i].send(result)
            except StopIteration as end:
                trained[i] = end.value

        with contextlib.ExitStack() as stack:
            for i, run in enumerate(runs):
                stack.enter_context(contextlib.closing(run))
                advance(i, None)
            trace = stack.enter_context(contextlib.closing(_Trace(profile)))
            while asked:
                which = list(asked)
                states, batches = zip(*asked.values(), strict=True)
                keys = tuple(plans[i].key for i in which)
                if len(which) == 1:
                    results = (plans[which[0]].train_step(states[0], batches[0], keys[0]),)
                else:
                    results = plans[0].vmapped_train_step(states, batches, keys)
                trace.step_done(results)
                shared.step_done()
                for i, result in zip(which, results, strict=True):
                    advance(i, result)
        finished = [trained[i] for i in range(len(plans))]
        if None in finished or stop.asked():
            sys.exit(stop.exit_code)
    return [one for one in finished if one is not None]


class _Shared:
    """What runs that step together share: the clock, and when they stop."""

    def __init__(self, stop: Stop):
        self._stop, self._paused = stop, 0.0
        self._asked: bool | None = None
        self._agreed = False

    def step_done(self) -> None:
        self._asked, self._agreed = None, False

    def asked(self, *, agree: bool) -> bool:
        """Like `Stop.asked`, with one answer for all runs in a step."""
        if self._asked is None or (agree and not self._agreed):
            self._asked, self._agreed = self._stop.asked(agree=agree), agree
        return self._asked

    def seconds(self) -> float:
        """The time, which stands still while any of the runs is paused."""
        return time.perf_counter() - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock for work outside a step, such as a validation or a checkpoint."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start


def restore(plan: Plan, workdir: Path) -> Trained:
    """What train returned when it finished. Raises UserError if it has not finished."""
    with _open(plan, workdir) as checkpoints:
        if (found := checkpoints.restore("last")) is None:
            raise UserError(
                f"{workdir / 'checkpoints' / 'last'} is empty: train with --mode=train, or, if the "
                "run is finished, put the folder back"
            )
        state, notes = found
        if int(state.step) < plan.total_steps:
            raise UserError(
                f"training in {workdir} is at step {int(state.step)} of {plan.total_steps}; "
                "finish it with --mode=train"
            )
        return _trained(plan, checkpoints, state, notes)


def _open(plan: Plan, workdir: Path):
    return contextlib.closing(Checkpoints(workdir, jax.eval_shape(plan.init)))


def _trained(plan: Plan, checkpoints: Checkpoints, last: TrainState, notes: Notes) -> Trained:
    best = checkpoints.restore("best")
    if best is None or best[1]["best_accuracy"] != notes["best_accuracy"]:
        raise UserError("the best checkpoint is gone; train in another --workdir")
    return Trained(best=best[0], last=last, timings=_timings(plan, notes))


_NEW_RUN: Notes = {
    "best_accuracy": -1.0,
    "pending": [],
    "seconds": 0.0,
    "steps_timed": 0,
    "compile_seconds": 0.0,
}


# A run's steps: it yields (state, batch), is sent (state, sums), and returns at the end.
_Steps = Generator[tuple[TrainState, Any], tuple[TrainState, Any], Any]


def _train(plan: Plan, workdir: Path, shared: _Shared, *, shown: bool) -> _Steps:
    """Returns Trained, or None if it was asked to stop."""
    with _open(plan, workdir) as checkpoints:
        state, notes = checkpoints.restore("last") or (plan.init(), dict(_NEW_RUN))
        if int(state.step) < plan.total_steps:
            state, notes, stopped = yield from _run(
                plan, workdir, checkpoints, state, notes, shared, shown
            )
            if stopped:
                return None
        return _trained(plan, checkpoints, state, notes)


def _run(
    plan: Plan,
    workdir: Path,
    checkpoints: Checkpoints,
    state: TrainState,
    notes: Notes,
    shared: _Shared,
    shown: bool,
) -> _Steps:
    """Returns the last state, its notes and whether it was asked to stop there."""
    start = int(state.step)
    if not checkpoints.forget_after(start):
        notes["best_accuracy"] = _NEW_RUN["best_accuracy"]
    if start:
        logging.info("continuing from step %d of %d", start, plan.total_steps)
    elif (workdir / "metrics.jsonl").exists():
        logging.info("starting over: this run was stopped before its first checkpoint")
    timed_before = notes["steps_timed"]  # the first step of each start compiles and is not timed
    pending: list[Any] = []  # sums on the device, not yet fetched
    fetched: list[Any] = list(notes["pending"])  # sums since the last log line
    clock, stopped = shared.seconds(), False

    def add_time():
        nonlocal clock
        now = shared.seconds()
        notes["seconds"], clock = notes["seconds"] + now - clock, now

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
        progress_bar(plan.total_steps, plan.description, "step", initial=start, shown=shown) as bar,
    ):
        if plan.validate_first and not start:
            with shared.pause():
                values = plan.validate(state.variables)
            writer.write(0, {f"validation/{name}": v for name, v in values.items()})
        batches = plan.batches.starting_at(start)
        for done in range(start + 1, plan.total_steps + 1):
            state, sums = yield state, next(batches)
            pending.append(sums)
            bar.update()
            if done == start + 1:
                fetch()
                notes["compile_seconds"] = shared.seconds() - clock
                clock = shared.seconds()
            last, is_best = done == plan.total_steps, False
            if done % plan.log_every == 0 or last:
                fetch()
                values = {f"train/{name}": v for name, v in reduce_sums(fetched).items()}
                values["train/learning_rate"] = float(plan.schedule(done - 1))
                writer.write(done, {"epoch": done / plan.steps_per_epoch, **values})
                fetched.clear()
                bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
            if done % plan.validate_every == 0 or last:
                fetch()
                with shared.pause():
                    values = plan.validate(state.variables)
                    _check_finite("validation loss", values["cross_entropy"], done, workdir)
                    writer.write(done, {f"validation/{name}": v for name, v in values.items()})
                    is_best = values["robust_accuracy"] > notes["best_accuracy"]
                    if is_best:
                        notes["best_accuracy"] = values["robust_accuracy"]
                        checkpoints.save("best", state, {"best_accuracy": notes["best_accuracy"]})
            stopped = shared.asked(agree=done % plan.log_every == 0 or last)
            # After the best, so that at most one best is of steps that a resumed run repeats.
            if done % plan.checkpoint_every == 0 or is_best or last or stopped:
                fetch()
                add_time()
                notes["steps_timed"] = timed_before + done - start - 1
                with shared.pause():
                    if last:
                        notes |= _share_of_peak(plan, state, notes)
                    checkpoints.save("last", state, {**notes, "pending": list(fetched)})
            if stopped:
                checkpoints.wait()
                logging.warning(
                    "stopped at step %d, saved; the same command continues from there", done
                )
                break
    checkpoints.wait()
    return state, notes, stopped


def _check_finite(name: str, value: float, step: int, workdir: Path) -> None:
    if not np.isfinite(value):
        raise UserError(
            f"the {name} became {value} at step {step}; the last good checkpoint, if there was "
            f"one, is kept in {workdir / 'checkpoints'}; a lower learning_rate or a "
            "gradient_clip_norm may help"
        )


def _timings(plan: Plan, notes: Notes) -> dict[str, float]:
    """How fast the steps were, on the machine that trained.

    Each of several runs that stepped together counts only its own examples.
    """
    seconds, steps = max(notes["seconds"], 1e-9), max(notes["steps_timed"], 1)
    return {
        "compile_seconds": notes["compile_seconds"],
        "train_seconds": notes["seconds"],
        "step_milliseconds": 1000 * seconds / steps,
        "examples_per_second": notes["steps_timed"] * plan.batch_size / seconds,
        **{name: notes[name] for name in _OF_PEAK if name in notes},
    }


_OF_PEAK = ("teraflops_per_second", "share_of_peak")


def _share_of_peak(plan: Plan, last: TrainState, notes: Notes) -> dict[str, float]:
    """How near the steps came to this chip's peak; empty if the peak is not known."""
    if not (peak := speed.peak(jax.devices()[0].device_kind)):
        return {}
    work = speed.flops(plan.train_step, last, plan.batches[0], plan.key)
    per_second = work * max(notes["steps_timed"], 1) / max(notes["seconds"], 1e-9)
    found = per_second / 1e12, per_second / (peak * jax.device_count())
    return dict(zip(_OF_PEAK, found, strict=True))


class _Trace:
    """A profile of the ten steps after the first, which compiles; none without a folder."""

    def __init__(self, folder: Path | None):
        self._folder, self._done, self._running = folder, 0, False

    def step_done(self, results: Any) -> None:
        self._done += 1
        if self._folder is not None and self._done == 1:
            jax.block_until_ready(results)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would be most of the trace
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
        elif self._running and self._done == 11:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            logging.info("trace: %s", self._folder)
