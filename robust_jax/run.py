"""One run in its folder: train, evaluate, report; resumed where it stopped, never overwritten."""

import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from robust_jax import __version__, report
from robust_jax import config as config_lib
from robust_jax.analysis import runs
from robust_jax.errors import UserError
from robust_jax.evaluate import summarize
from robust_jax.experiment import Experiment, build
from robust_jax.files import write_atomically
from robust_jax.models import num_parameters
from robust_jax.train.loop import Trained, is_trained, restore, train

Mode = Literal["train", "evaluate", "report"]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def run(config: ConfigDict, schema: ConfigDict, workdir: Path, mode: Mode) -> dict[str, Any]:
    """Trains (or goes on, or says that the run is finished), evaluates and writes the report.

    mode "evaluate" measures a trained run again, with the attacks the config has now; "report"
    writes the page again from what was measured. Returns what results.json holds. Raises
    UserError where the config is mistaken or workdir holds a run of another config.
    """
    workdir = workdir.absolute()
    if mode == "report":
        config_lib.check_fields(config, schema)
        _claim(workdir, config, mode)
        if not (workdir / "results.json").exists():
            raise UserError(f"{workdir} has no results yet; run it with --mode=train first")
        results = runs.results(workdir)
        logging.info("report: %s", report.write(workdir, results))
        return results
    experiment = build(config, schema)
    _claim(workdir, config, mode)
    if (
        mode == "train"
        and (workdir / "results.json").exists()
        and is_trained(experiment.plan, workdir)
    ):
        logging.info("%s is finished; --mode=evaluate or --mode=report redo a part", workdir)
        return runs.results(workdir)
    trained = (train if mode == "train" else restore)(experiment.plan, workdir)
    return _evaluate(experiment, trained, workdir)


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


def _evaluate(experiment: Experiment, trained: Trained, workdir: Path) -> dict[str, Any]:
    """Measures both checkpoints and writes all but what training wrote; results.json last.

    A run that has results.json is finished and whole, so an old one goes first.
    """
    start = time.perf_counter()
    for name in ("results.json", "examples.npz"):
        (workdir / name).unlink(missing_ok=True)
    tables: dict[str, pd.DataFrame] = {}
    states = {"best": trained.best, "last": trained.last}
    (workdir / "records").mkdir(exist_ok=True)
    for name, state in states.items():
        if name == "last" and int(state.step) == int(trained.best.step):
            tables[name] = tables["best"]  # one checkpoint, measured once
        else:
            tables[name] = experiment.evaluator.records(state.variables, f"evaluate {name}")
        tables[name].to_csv(workdir / "records" / f"{name}.csv", index=False)
    _save_images(experiment, trained, workdir)
    results = _results(experiment, trained, tables)
    results["timings"] = {**trained.timings, "evaluate_seconds": time.perf_counter() - start}
    logging.info("report: %s", report.write(workdir, results))
    write_atomically(workdir / "config.json", json.dumps(results["config"], indent=2) + "\n")
    write_atomically(workdir / "results.json", json.dumps(results, indent=2) + "\n")
    return results


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
            **{
                split: len(getattr(dataset, split).labels)
                for split in ("train", "validation", "test")
            },
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


def _save_images(experiment: Experiment, trained: Trained, workdir: Path) -> None:
    """The image grid: the last attack in the adversary's norm, at its eps; else the last of all."""
    if not experiment.grids:
        return
    against = _trained_against(experiment) or {}
    of_norm = [name for name, grid in experiment.grids.items() if grid.norm == against.get("norm")]
    name = (of_norm or list(experiment.grids))[-1]
    eps = against["eps"] if of_norm else max(experiment.grids[name].eps)
    images = experiment.evaluator.images(trained.best.variables, name, float(eps))
    np.savez(workdir / "examples.npz", allow_pickle=False, **images)
