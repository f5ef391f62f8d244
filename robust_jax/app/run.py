"""One run in its folder: train, evaluate, report; resumed where it stopped, never overwritten."""

import contextlib
import fcntl
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from robust_jax import __version__
from robust_jax.app import cards, records, report, runs
from robust_jax.app import config as config_lib
from robust_jax.app.evaluate import summarize
from robust_jax.app.experiment import Experiment, build, surrogate_config
from robust_jax.app.subject import load, subject_of
from robust_jax.devices import processes, speed
from robust_jax.errors import NothingToAudit, UserError
from robust_jax.files import save_arrays, write_atomically
from robust_jax.models import num_parameters
from robust_jax.train import loop
from robust_jax.train.loop import Trained, is_trained, restore, train

Mode = Literal["train", "evaluate", "measure", "audit", "verify", "report"]
# The folder of attacks that are not finished yet.
_UNFINISHED = "unfinished"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def run(
    config: ConfigDict, schema: ConfigDict, workdir: Path, mode: Mode, *, profile: bool = False
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
        config_lib.check_fields(config, schema)
        _claim(workdir, config, mode)
        if not (workdir / "results.json").exists():
            raise UserError(f"{workdir} has no results yet; run it with --mode=train first")
        results = runs.results(workdir)
        processes.on_first(partial(_write_report, workdir, results))
        return results
    experiment = processes.together(partial(build, config, schema))
    processes.on_first(partial(_claim, workdir, config, mode))
    with contextlib.nullcontext() if mode == "verify" else _alone(workdir):
        return _run(experiment, config, schema, workdir, mode, profile)


def _run(
    experiment: Experiment, config: ConfigDict, schema: ConfigDict, workdir: Path, mode: Mode,
    profile: bool,
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
            verify(experiment, trained, workdir, results)
            return results
        if mode == "measure":
            results["config"]["measurements"] = config_lib.to_json(experiment.config.measurements)
            results["measurements"] = _measurements(experiment, trained, workdir)
        else:
            results["config"]["audit"] = config_lib.to_json(experiment.config.audit)
            results["audit"] = _audit(experiment, trained, workdir, schema)
        processes.on_first(partial(_write, workdir, results))
        return results
    return _evaluate(experiment, trained, workdir, schema)


def train_together(
    configs: Sequence[ConfigDict], schema: ConfigDict, workdirs: Sequence[Path]
) -> None:
    """Trains runs that differ in their seed alone in one program; `run` then has the rest to do.

    Networks of a million parameters and more are left to `run`: each fills the device by itself.
    """
    experiments = processes.together(lambda: [build(config, schema) for config in configs])
    size = num_parameters(jax.eval_shape(experiments[0].plan.init).params)
    if size < 1_000_000:
        with contextlib.ExitStack() as stack:
            for config, workdir in zip(configs, workdirs, strict=True):
                processes.on_first(partial(_claim, workdir, config, "train"))
                stack.enter_context(_alone(workdir))
            loop.train_together([experiment.plan for experiment in experiments], workdirs)


def _claim(workdir: Path, config: ConfigDict, mode: Mode) -> None:
    """Makes workdir this config's, or checks that it is."""
    path = workdir / "config.json"
    new = config_lib.to_json(config)
    if path.exists():
        ignore = () if mode == "train" else config_lib.FIELDS_OF_NO_TRAINING
        try:
            old = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); take another --workdir") from error
        if changed := config_lib.differences(old, new, ignore=ignore):
            shown = "; ".join(changed[:3]) + ("; …" if len(changed) > 3 else "")
            raise UserError(
                f"{workdir} holds a run of another config ({shown}); take another --workdir or the "
                "same config (other attacks: --mode=evaluate)"
            )
        return
    if mode != "train":
        raise UserError(f"{workdir} holds no run; --mode={mode} needs a finished one")
    try:
        if workdir.exists() and any(workdir.iterdir()):
            raise UserError(f"{workdir} is not empty and holds no run; take another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(new, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of workdir; the lock goes with the process, however it ends."""
    with contextlib.ExitStack() as stack:

        def lock():
            try:
                file = stack.enter_context((workdir / ".lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is at work in {workdir}; wait for it or take another "
                    "--workdir"
                ) from error
            except OSError as error:
                raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error

        processes.on_first(lock)
        yield


def _evaluate(
    experiment: Experiment, trained: Trained, workdir: Path, schema: ConfigDict
) -> dict[str, Any]:
    """Measures both checkpoints and writes all but what training wrote; results.json last.

    A run that has results.json is finished and whole, so an old one goes first.
    """
    start = time.perf_counter()
    processes.on_first(partial(_make_way, workdir))
    tables: dict[str, pd.DataFrame] = {}
    states = {"best": trained.best, "last": trained.last}
    for name, state in states.items():
        if name == "last" and int(state.step) == int(trained.best.step):
            tables[name] = tables["best"]  # one checkpoint, measured once
        else:
            unfinished = _unfinished(workdir, experiment.config, name, int(state.step))
            processes.on_first(partial(unfinished.mkdir, parents=True, exist_ok=True))
            tables[name] = experiment.evaluator.records(
                state.variables, f"evaluate {name}", unfinished
            )
        path = workdir / "records" / f"{name}.csv"
        processes.on_first(partial(tables[name].to_csv, path, index=False))
    if images := _images(experiment, trained):
        path = workdir / "examples.npz"
        processes.on_first(partial(save_arrays, path, **images))
    results = _results(experiment, trained, tables)
    results["timings"] = {
        **trained.timings,
        "evaluate_seconds": time.perf_counter() - start,
        "peak_memory_mebibytes": speed.memory_high_water() / 2**20,
    }
    results["training"] = _training(workdir)
    results["measurements"] = _measurements(experiment, trained, workdir)
    results["audit"] = _audit(experiment, trained, workdir, schema)
    processes.on_first(partial(_write, workdir, results))
    return results


def _make_way(workdir: Path) -> None:
    for name in ("results.json", "examples.npz", "measurements.npz", "card.json"):
        (workdir / name).unlink(missing_ok=True)
    (workdir / "records").mkdir(exist_ok=True)


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


def _training(workdir: Path) -> dict[str, dict[str, float]]:
    """What the first and the last validation found."""
    metrics = runs.load(workdir).metrics.dropna(subset=["validation/cross_entropy"])
    columns = [name for name in metrics if name.startswith("validation/")]
    return {
        when: {
            name.partition("/")[2]: float(value)
            for name, value in metrics[columns].iloc[i].items()
            if np.isfinite(value)
        }
        for when, i in (("first", 0), ("last", -1))
    }


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


def _unfinished(workdir: Path, config: ConfigDict, name: str, step: int) -> Path:
    """Where the attacks on a checkpoint leave what they have done: a folder for each evaluation."""
    what = json.dumps([config_lib.to_json(config), name, step], sort_keys=True)
    return workdir / _UNFINISHED / hashlib.sha256(what.encode()).hexdigest()[:16]


def _write(workdir: Path, results: dict[str, Any]) -> None:
    """The report, the card and config.json; results.json last."""
    _write_report(workdir, results)
    if card := cards.card(results):
        write_atomically(workdir / "card.json", json.dumps(card, indent=2) + "\n")
    write_atomically(workdir / "config.json", json.dumps(results["config"], indent=2) + "\n")
    write_atomically(workdir / "results.json", json.dumps(results, indent=2) + "\n")
    shutil.rmtree(workdir / _UNFINISHED, ignore_errors=True)


def _write_report(workdir: Path, results: dict[str, Any]) -> None:
    logging.info("report: %s", report.write(workdir, results))


def _audit(
    experiment: Experiment, trained: Trained, workdir: Path, schema: ConfigDict
) -> dict[str, Any] | None:
    """The audit of the best checkpoint as results.json has it; None where none is wanted."""
    if experiment.audit is None:
        return None
    start = time.perf_counter()
    surrogates = _surrogates(experiment, workdir, schema)
    try:
        found = experiment.evaluator.audit(trained.best.variables, experiment.audit, surrogates)
    except NothingToAudit as error:
        logging.warning("no audit: %s", error)
        return None
    checks = [
        {
            **check._asdict(),
            "values": {k: v if np.isfinite(v) else None for k, v in check.values.items()},
        }
        for check in found.checks
    ]
    return {**found._asdict(), "checks": checks, "seconds": time.perf_counter() - start}


def _surrogates(experiment: Experiment, workdir: Path, schema: ConfigDict) -> dict[str, Callable]:
    """The networks whose adversarials the audit tries, by name."""
    chosen = experiment.config.audit.surrogate
    if not chosen:
        return {}
    if chosen != "train":
        return {chosen: load(chosen).logits_fn}
    # A run of its own, of which a notebook may load the network.
    config = surrogate_config(experiment.config, schema)
    other, folder = build(config, schema), workdir / "surrogate"
    mode: Mode = "evaluate" if (folder / "config.json").exists() else "train"
    processes.on_first(partial(_claim, folder, config, mode))
    return {"an undefended CNN": subject_of(other, train(other.plan, folder)).logits_fn}


def verify(
    experiment: Experiment, trained: Trained, workdir: Path, results: dict[str, Any]
) -> None:
    """Attacks again, with the same keys, and compares with the records and the table of results.

    Raises UserError with the differences, where an example's fate is another, or the records do
    not add up to the table.
    """
    stored, wrong = runs.load(workdir).records, []
    for name, state in {"best": trained.best, "last": trained.last}.items():
        if name == "last" and int(state.step) == int(trained.best.step):
            fresh = stored["best"]
        else:
            fresh = experiment.evaluator.records(state.variables, f"verify {name}")
        found = records.disagreements(stored[name], fresh)
        logging.info("%s: %d columns agree", name, len(stored[name].columns) - len(found))
        wrong += [f"records/{name}.csv {column}: {count} rows" for column, count in found.items()]
        summary = json.loads(json.dumps(summarize(stored[name], experiment.grids)))
        for part, value in summary.items():
            if not _alike(value, results[name][part]):
                wrong.append(f"results.json {name}.{part} is not what the records add up to")
            if name == "best" and not _alike(value, results[part]):
                wrong.append(f"results.json {part} is not what the records add up to")
    if wrong:
        raise UserError(f"{workdir} is not confirmed: {'; '.join(wrong)}")
    logging.info("confirmed: every adversarial of %s was found again", workdir)


def _alike(one: Any, other: Any) -> bool:
    """Equal but for the last digits of numbers, which a CSV file rounds."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(
            _alike(one[k], other[k]) for k in one
        )  # fmt: skip
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=1e-5, atol=1e-8, equal_nan=True))
    return one == other


def _results(
    experiment: Experiment, trained: Trained, tables: dict[str, pd.DataFrame]
) -> dict[str, Any]:
    states = {"best": trained.best, "last": trained.last}
    summaries = {
        name: {"step": int(states[name].step), **summarize(table, experiment.grids)}
        for name, table in tables.items()
    }
    dataset, device = experiment.dataset, jax.devices()[0]
    return {
        "checkpoint": "best",
        **summaries["best"],
        **summaries,
        "config": config_lib.to_json(experiment.config),
        "seed": experiment.config.seed,
        "versions": {
            "robust_jax": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "data": {
            "name": dataset.name,
            **{split: getattr(dataset, split).size for split in ("train", "validation", "test")},
            "num_classes": dataset.num_classes,
            "image_shape": list(dataset.image_shape),
        },
        "model": {
            "name": experiment.config.model.name,
            "parameters": num_parameters(trained.last.params),
        },
        "trained_against": _trained_against(experiment),
    }


def _trained_against(experiment: Experiment) -> dict[str, Any] | None:
    """The adversary's norm and eps, where training looked at what it made."""
    if not experiment.uses_adversary:
        return None
    adversary = experiment.config.adversary
    return {"norm": adversary.get("norm", "linf"), "eps": adversary.eps}


def _images(experiment: Experiment, trained: Trained) -> dict[str, np.ndarray]:
    """The image grid: the last attack in the adversary's norm, at its eps; else the last of all.

    AutoAttack has no batch to look at: none for it alone.
    """
    grids = {name: grid for name, grid in experiment.grids.items() if not grid.members}
    if not grids:
        return {}
    against = _trained_against(experiment) or {}
    of_norm = [name for name, grid in grids.items() if grid.norm == against.get("norm")]
    name = (of_norm or list(grids))[-1]
    eps = against["eps"] if of_norm else max(grids[name].eps)
    return experiment.evaluator.images(trained.best.variables, name, float(eps))
