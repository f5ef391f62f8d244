"""One run in its folder: train, evaluate, report; resumed where it stopped, never overwritten."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from robust_jax.app import config as config_lib
from robust_jax.app import folder, merge, stored, surrogate, threat, verify
from robust_jax.app import records as records_lib
from robust_jax.app.experiment import Experiment, build
from robust_jax.app.folder import Mode
from robust_jax.app.pages import report
from robust_jax.app.results import audit_to_json, compose, validations, versions
from robust_jax.app.subject import subject_of
from robust_jax.devices import processes, speed
from robust_jax.errors import UserError
from robust_jax.models import num_parameters
from robust_jax.train import loop
from robust_jax.train.loop import Trained, restore, train


class Finished(NamedTuple):
    """A run whose training is done.

    experiment: built from the folder's config and what this call adds. asked: this call's config.
    """

    experiment: Experiment
    trained: Trained
    workdir: Path
    asked: ConfigDict


def execute(config: ConfigDict, workdir: Path, mode: Mode, *, profile: bool = False) -> str:
    """Trains (or continues, or says that the run is finished), evaluates and writes the report.

    Once a run is finished, mode "evaluate" repeats all but training and adds what the config now
    asks for; "measure" takes only config.measurements; "audit" looks for masked gradients again;
    "verify" repeats the attacks from the checkpoint and compares with the records; "report" writes
    the page again.

    Args:
        config: A checked config.
        workdir: The run's folder.
        mode: What to do.
        profile: Whether to leave a trace of ten training steps in workdir/profile.

    Returns:
        What to print.

    Raises:
        UserError: The config is invalid, workdir holds something else or a run of another config,
            or "verify" finds something else.
    """
    workdir = workdir.absolute()
    if mode == "report":
        processes.on_first(partial(folder.claim, workdir, config, mode))
        results = _results(workdir, mode)
        processes.on_first(partial(folder.write_report, workdir, results))
        return f"report: {workdir / 'report.html'}"
    experiment = processes.on_all(partial(build, config))  # reports mistakes before the claim
    processes.on_first(partial(folder.claim, workdir, config, mode))
    with contextlib.nullcontext() if mode == "verify" else folder.locked(workdir):
        if mode == "train":
            return _train(experiment, workdir, profile)
        old = stored.config_of(workdir)
        assert old is not None
        both = merge.merged(old, config, mode)
        if config_lib.to_json(both) != config_lib.to_json(config):
            experiment = processes.on_all(partial(build, both))
        trained = restore(experiment.plan, workdir)
        return _REDO[mode](Finished(experiment, trained, workdir, config))


def train_together(configs: Sequence[ConfigDict], workdirs: Sequence[Path]) -> None:
    """Trains runs that differ only in their seed in one program.

    `execute` then does the rest. Networks of a million parameters or more are left to it entirely,
    since each fills the device by itself.
    """
    experiments = processes.on_all(lambda: [build(config) for config in configs])
    size = num_parameters(jax.eval_shape(experiments[0].plan.init).params)
    if size < 1_000_000:
        with contextlib.ExitStack() as stack:
            for config, workdir in zip(configs, workdirs, strict=True):
                processes.on_first(partial(folder.claim, workdir, config, "train"))
                stack.enter_context(folder.locked(workdir))
            loop.train_seeds([experiment.plan for experiment in experiments], workdirs)


def _train(experiment: Experiment, workdir: Path, profile: bool) -> str:
    if stored.is_finished(workdir):
        logging.info("%s is finished; --mode=evaluate or --mode=report redo a part", workdir)
        results = stored.results(workdir)
        if not (workdir / "report.html").exists():  # stopped before the last file
            processes.on_first(partial(folder.write_report, workdir, results))
        return report.table(results)
    trained = train(experiment.plan, workdir, workdir / "profile" if profile else None)
    logging.info(_speed(trained.timings))
    return _evaluate(Finished(experiment, trained, workdir, experiment.config))


def _measure(run: Finished) -> str:
    if not run.asked.measurements:
        raise UserError(
            "config.measurements is empty; name what to measure, as in "
            "--config.measurements=\"{'outputs': {}, 'margins': {}}\""
        )
    results = _results(run.workdir, "measure")
    numbers, arrays = _measured(run)
    results["config"]["measurements"] = config_lib.to_json(run.experiment.config.measurements)
    results["measurements"] = {**results["measurements"], **numbers}
    arrays = merge.arrays(stored.measured(run.workdir), arrays, numbers)
    processes.on_first(partial(folder.write_arrays, run.workdir, arrays))
    processes.on_first(partial(folder.write, run.workdir, results))
    return report.measurements_text(numbers)


def _audit(run: Finished) -> str:
    if run.experiment.audit is None:
        raise UserError(
            "config.audit.num_examples is 0; say how many images to audit, as in "
            "--config.audit.num_examples=200"
        )
    results = _results(run.workdir, "audit")
    if old := results["audit"]:
        logging.info("this replaces the audit of %d images", old["num_examples"])
    results["config"]["audit"] = config_lib.to_json(run.experiment.config.audit)
    results["audit"] = _audited(run)
    processes.on_first(partial(folder.write, run.workdir, results))
    return report.audit_text(results)


def _verify(run: Finished) -> str:
    results = _results(run.workdir, "verify")
    ignore = ("audit", "measurements", "data_dir", "parallel")
    before, here = map(config_lib.to_json, (stored.get_config(str(run.workdir)), run.asked))
    if changed := config_lib.differences(before, here, ignore=ignore):
        raise UserError(f"{run.workdir} was evaluated with another config ({'; '.join(changed)})")
    experiment = surrogate.bound(run.experiment, run.workdir)
    return verify.compare(experiment, run.trained, run.workdir, results)


def _results(workdir: Path, mode: Mode) -> dict[str, Any]:
    if not stored.is_finished(workdir):
        raise UserError(f"{workdir} has no results yet; --mode={mode} needs a finished run")
    return stored.results(workdir)


def _evaluate(run: Finished) -> str:
    """Measures the checkpoints and writes everything that training did not write.

    Keeps earlier results that the folder's config has and this call does not ask for.
    """
    start = time.perf_counter()
    run = run._replace(experiment=surrogate.bound(run.experiment, run.workdir))
    earlier = folder.earlier(run.workdir)
    entries = threat.complete(run.experiment.config).attacks
    unasked = {label: entry for label, entry in entries.items() if label not in run.asked.attacks}
    states = {"best": run.trained.best}
    if run.experiment.config.evaluation.last:
        states["last"] = run.trained.last
    kept = set.intersection(
        *(merge.are_kept(earlier.records.get(name), unasked) for name in states)
    )
    steps = {name: int(state.step) for name, state in states.items()}
    tables: dict[str, pd.DataFrame] = {}
    for name, state in states.items():
        if name == "last" and steps["last"] == steps["best"]:
            tables[name] = tables["best"]  # one checkpoint, measured once
            continue
        unfinished = folder.unfinished(run.workdir, run.experiment.config, name, steps[name])
        processes.on_first(partial(unfinished.mkdir, parents=True, exist_ok=True))
        tables[name] = run.experiment.evaluator.records(
            state.variables, f"evaluate {name}", unfinished, without=kept
        )
        if kept:
            tables[name] = merge.with_kept(tables[name], earlier.records[name], kept)
    held_out = run.experiment.dataset.validation
    temperatures = {
        name: run.experiment.evaluator.temperature(state.variables, held_out)
        for name, state in states.items()
    }
    results = compose(
        tables,
        run.experiment.grids,
        _about(run),
        steps=steps,
        temperatures=temperatures,
        kept=kept,
    )
    results["training"] = validations(run.workdir)
    numbers, arrays = _measured(run)
    results["measurements"] = {**earlier.measurements, **numbers}
    results["audit"] = _audited(run) if run.asked.audit.num_examples else earlier.audit
    images = _images(run, tables["best"])
    results["timings"] = {
        **run.trained.timings,
        "evaluate_seconds": time.perf_counter() - start,
        "peak_memory_mebibytes": speed.memory_high_water() / 2**20,
    }
    arrays = merge.arrays(earlier.arrays, arrays, numbers)
    write = partial(folder.write_evaluation, run.workdir, results, tables, arrays, images)
    processes.on_first(write)
    return report.table(results)


def _about(run: Finished) -> dict[str, Any]:
    """What was trained, on what and against what, as results.json has it."""
    experiment, dataset = run.experiment, run.experiment.dataset
    entries = threat.complete(experiment.config)
    adversary = entries.adversary
    return {
        "config": config_lib.to_json(experiment.config),
        "seed": experiment.config.seed,
        "versions": versions("jax", "jaxlib", "flax", "optax", "numpy"),
        "data": {
            "name": dataset.name,
            **{split: getattr(dataset, split).size for split in ("train", "validation", "test")},
            "num_classes": dataset.num_classes,
            "image_shape": list(dataset.image_shape),
        },
        "model": {
            "name": experiment.config.model.name,
            "parameters": num_parameters(run.trained.last.params),
        },
        "threat": entries.threat.to_dict(),
        "trained_against": {"norm": adversary.norm, "eps": adversary.eps}
        if experiment.uses_adversary
        else None,
    }


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


def _measured(
    run: Finished,
) -> tuple[dict[str, dict[str, float | None]], dict[str, np.ndarray]]:
    """The measurements asked for: numbers, and arrays by label/name.

    None stands for a number that is not finite.
    """
    numbers: dict[str, dict[str, float | None]] = {}
    arrays: dict[str, np.ndarray] = {}
    for label, entry in run.asked.measurements.items():
        subject = subject_of(run.experiment, run.trained, entry.get("at", "best"))
        numbers[label] = {}
        for key, value in run.experiment.measurements[label](subject).items():
            if isinstance(value, np.ndarray):
                arrays[f"{label}/{key}"] = value
            else:
                numbers[label][key] = value if np.isfinite(value) else None
    return numbers, arrays


def _audited(run: Finished) -> dict[str, Any] | None:
    """The audit of the best checkpoint as results.json has it; None if there is none to make."""
    settings = run.experiment.audit
    if settings is None:
        return None
    start = time.perf_counter()
    surrogates = surrogate.networks(run.experiment, run.workdir)
    found = run.experiment.evaluator.audit(run.trained.best.variables, settings, surrogates)
    if found is None:
        return None
    return {**audit_to_json(found), "seconds": time.perf_counter() - start}


def _images(run: Finished, records: pd.DataFrame) -> dict[str, np.ndarray]:
    """The image grid: the last attack in the threat model's norm, at its eps; else the last of all.

    AutoAttack is not run on one batch, so alone it gives no grid. The images are the first that the
    attack breaks.
    """
    grids = {name: grid for name, grid in run.experiment.grids.items() if not grid.members}
    if not grids:
        return {}
    model = threat.complete(run.experiment.config).threat
    of_norm = [name for name, grid in grids.items() if grid.norm == model.norm]
    name = (of_norm or list(grids))[-1]
    eps = model.eps if of_norm else max(grids[name].eps)
    radii = [radius for radius in grids[name].eps if radius <= eps * (1 + 1e-6)]
    broken = records["correct"].astype(bool)
    if radii:
        broken &= records_lib.broke(records, name, max(radii))
    index = np.flatnonzero(broken)
    return run.experiment.evaluator.images(run.trained.best.variables, name, float(eps), index)


_REDO: Mapping[str, Callable[[Finished], str]] = {
    "evaluate": _evaluate,
    "measure": _measure,
    "audit": _audit,
    "verify": _verify,
}
