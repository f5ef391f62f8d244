"""One run in its folder: train, evaluate, report; resumed where it stopped, never overwritten."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from robust_jax.app import config as config_lib
from robust_jax.app import folder, runs, surrogate, verify
from robust_jax.app.experiment import Experiment, build
from robust_jax.app.folder import Mode
from robust_jax.app.results import audit_to_json, compose, threat_of, validations
from robust_jax.app.subject import subject_of
from robust_jax.devices import processes, speed
from robust_jax.errors import NothingToAudit, UserError
from robust_jax.files import save_arrays
from robust_jax.models import num_parameters
from robust_jax.train import loop
from robust_jax.train.loop import Trained, is_trained, restore, train


def execute(
    config: ConfigDict, workdir: Path, mode: Mode, *, profile: bool = False
) -> dict[str, Any]:
    """Trains (or goes on, or says that the run is finished), evaluates and writes the report.

    Of a finished run, mode "evaluate" does all again but training, with the attacks the config has
    now; "measure" takes config.measurements alone; "audit" looks again for masked gradients;
    "verify" makes every adversarial anew from the checkpoint and compares what it finds with the
    records; "report" writes the page again. profile: leaves a trace of ten training steps in
    workdir/profile. Returns what results.json holds. Raises UserError where the config is mistaken,
    workdir holds a run of another config, or "verify" finds something else.
    """
    workdir = workdir.absolute()
    if mode == "report":
        folder.claim(workdir, config, mode)
        if not (workdir / "results.json").exists():
            raise UserError(f"{workdir} has no results yet; run it with --mode=train first")
        results = runs.results(workdir)
        processes.on_first(partial(folder.write_report, workdir, results))
        return results
    experiment = processes.on_all(partial(build, config))
    processes.on_first(partial(folder.claim, workdir, config, mode))
    with contextlib.nullcontext() if mode == "verify" else folder.locked(workdir):
        return _run(experiment, workdir, mode, profile)


def _run(
    experiment: Experiment, workdir: Path, mode: Mode, profile: bool
) -> dict[str, Any]:  # fmt: skip
    if (
        mode == "train"
        and (workdir / "results.json").exists()
        and is_trained(experiment.plan, workdir)
    ):
        logging.info("%s is finished; --mode=evaluate or --mode=report redo a part", workdir)
        return runs.results(workdir)
    if mode == "train":
        trained = train(experiment.plan, workdir, workdir / "profile" if profile else None)
        logging.info(_speed(trained.timings))
    else:
        trained = restore(experiment.plan, workdir)
    if mode in ("measure", "audit", "verify"):
        if not (workdir / "results.json").exists():
            raise UserError(f"{workdir} has no results yet; --mode={mode} needs a finished run")
        results = runs.results(workdir)
        if mode == "verify":
            here = config_lib.to_json(experiment.config)
            ignore = ("audit", "measurements", "data_dir", "parallel")
            if changed := config_lib.differences(results["config"], here, ignore=ignore):
                raise UserError(f"{workdir} was evaluated with another config ({changed[0]})")
            verify.compare(experiment, trained, workdir, results)
            return results
        if mode == "measure":
            results["config"]["measurements"] = config_lib.to_json(experiment.config.measurements)
            results["measurements"] = _measurements(experiment, trained, workdir)
        else:
            results["config"]["audit"] = config_lib.to_json(experiment.config.audit)
            results["audit"] = _audit(experiment, trained, workdir)
        processes.on_first(partial(folder.write, workdir, results))
        return results
    return _evaluate(experiment, trained, workdir)


def train_together(configs: Sequence[ConfigDict], workdirs: Sequence[Path]) -> None:
    """Trains runs that differ in their seed alone in one program.

    `execute` then has the rest to do, and all of it for networks of a million parameters and more:
    each of those fills the device by itself.
    """
    experiments = processes.on_all(lambda: [build(config) for config in configs])
    size = num_parameters(jax.eval_shape(experiments[0].plan.init).params)
    if size < 1_000_000:
        with contextlib.ExitStack() as stack:
            for config, workdir in zip(configs, workdirs, strict=True):
                processes.on_first(partial(folder.claim, workdir, config, "train"))
                stack.enter_context(folder.locked(workdir))
            loop.train_seeds([experiment.plan for experiment in experiments], workdirs)


def _evaluate(experiment: Experiment, trained: Trained, workdir: Path) -> dict[str, Any]:
    """Measures both checkpoints and writes all but what training wrote; results.json last.

    A run that has results.json is finished and whole, so an old one goes first.
    """
    start = time.perf_counter()
    processes.on_first(partial(folder.clear_evaluation, workdir))
    tables: dict[str, pd.DataFrame] = {}
    states = {"best": trained.best, "last": trained.last}
    for name, state in states.items():
        if name == "last" and int(state.step) == int(trained.best.step):
            tables[name] = tables["best"]  # one checkpoint, measured once
        else:
            unfinished = folder.unfinished(workdir, experiment.config, name, int(state.step))
            processes.on_first(partial(unfinished.mkdir, parents=True, exist_ok=True))
            tables[name] = experiment.evaluator.records(
                state.variables, f"evaluate {name}", unfinished
            )
        path = workdir / "records" / f"{name}.csv"
        processes.on_first(partial(tables[name].to_csv, path, index=False))
    if images := _images(experiment, trained):
        path = workdir / "examples.npz"
        processes.on_first(partial(save_arrays, path, **images))
    results = compose(experiment, trained, tables)
    results["timings"] = {
        **trained.timings,
        "evaluate_seconds": time.perf_counter() - start,
        "peak_memory_mebibytes": speed.memory_high_water() / 2**20,
    }
    results["training"] = validations(workdir)
    results["measurements"] = _measurements(experiment, trained, workdir)
    results["audit"] = _audit(experiment, trained, workdir)
    processes.on_first(partial(folder.write, workdir, results))
    return results


def _speed(timings: Mapping[str, float]) -> str:
    """How fast training was, in a line."""
    parts = [
        f"{timings['examples_per_second']:,.0f} examples/s",
        f"{timings['step_milliseconds']:.3g} ms a step",
        f"compiled in {timings['compile_seconds']:.1f} s",
        f"at most {speed.memory_high_water() / 2**20:,.0f} MiB",
    ]
    if "share_of_peak" in timings:
        parts.append(f"{100 * timings['share_of_peak']:.1f} % of the chip's peak")
    return "training: " + ", ".join(parts)


def _measurements(
    experiment: Experiment, trained: Trained, workdir: Path
) -> dict[str, dict[str, float | None]]:
    """What config.measurements asks for, of the best checkpoint; arrays go to measurements.npz.

    None stands for a number that is not finite.
    """
    subject = subject_of(experiment, trained)
    numbers: dict[str, dict[str, float | None]] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, measure in experiment.measurements.items():
        numbers[name] = {}
        for key, value in measure(subject).items():
            if isinstance(value, np.ndarray):
                arrays[f"{name}/{key}"] = value
            else:
                numbers[name][key] = value if np.isfinite(value) else None
    processes.on_first(partial(save_arrays, workdir / "measurements.npz", **arrays))
    return numbers


def _audit(experiment: Experiment, trained: Trained, workdir: Path) -> dict[str, Any] | None:
    """The audit of the best checkpoint as results.json has it; None where none is wanted."""
    if experiment.audit is None:
        return None
    start = time.perf_counter()
    surrogates = surrogate.networks(experiment, workdir)
    try:
        found = experiment.evaluator.audit(trained.best.variables, experiment.audit, surrogates)
    except NothingToAudit as error:
        logging.warning("no audit: %s", error)
        return None
    return {**audit_to_json(found), "seconds": time.perf_counter() - start}


def _images(experiment: Experiment, trained: Trained) -> dict[str, np.ndarray]:
    """The image grid: the last attack in the threat model's norm, at its eps; else the last of all.

    AutoAttack has no batch to look at: none for it alone.
    """
    grids = {name: grid for name, grid in experiment.grids.items() if not grid.members}
    if not grids:
        return {}
    threat = threat_of(experiment.config)
    of_norm = [name for name, grid in grids.items() if grid.norm == threat["norm"]]
    name = (of_norm or list(grids))[-1]
    eps = threat["eps"] if of_norm else max(grids[name].eps)
    return experiment.evaluator.images(trained.best.variables, name, float(eps))
