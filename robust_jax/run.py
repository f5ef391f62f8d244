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
from robust_jax.errors import UserError
from robust_jax.evaluate import summarize
from robust_jax.experiment import Experiment, build
from robust_jax.models import num_parameters
from robust_jax.train import parallel
from robust_jax.train.loop import Trained, restore, train

Mode = Literal["train", "evaluate", "report"]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def run(config: ConfigDict, schema: ConfigDict, workdir: Path, mode: Mode) -> dict[str, Any]:
    """Trains (or goes on, or says that the run is finished), evaluates and writes the report.

    mode "evaluate" measures a trained run again, with the attacks the config has now; "report"
    writes the page again from what was measured. Returns what results.json holds. Raises
    UserError where the config is mistaken or workdir holds a run of another config.
    """
    experiment = build(config, schema)
    workdir = workdir.absolute()
    _claim(workdir, config, mode)
    results_file = workdir / "results.json"
    finished = results_file.exists()
    if mode == "report":
        if not finished:
            raise UserError(f"{workdir} has no results yet; run it with --mode=train first")
        return _finish(workdir, json.loads(results_file.read_text()))
    if mode == "train" and finished:
        logging.info("%s is finished; --mode=evaluate or --mode=report redo a part", workdir)
        return json.loads(results_file.read_text())
    trained = (train if mode == "train" else restore)(experiment.plan, workdir)
    if not parallel.is_main_process():
        return {}
    return _finish(workdir, _evaluate(experiment, trained, workdir))


def _claim(workdir: Path, config: ConfigDict, mode: Mode) -> None:
    """Makes workdir this config's, or checks that it is."""
    path = workdir / "config.json"
    new = config_lib.to_json(config)
    if path.exists():
        ignore = () if mode == "train" else config_lib.EVALUATION_FIELDS
        old = json.loads(path.read_text())
        if changed := config_lib.differences(old, new, ignore=ignore):
            shown = "; ".join(changed[:3]) + ("; …" if len(changed) > 3 else "")
            raise UserError(
                f"{workdir} holds a run of another config ({shown}); "
                "take another --workdir, or the same config"
            )
        return
    if mode != "train":
        raise UserError(f"{workdir} holds no run; --mode={mode} needs a finished one")
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run; take another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(new, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error


def _evaluate(experiment: Experiment, trained: Trained, workdir: Path) -> dict[str, Any]:
    start = time.perf_counter()
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
        "timings": {**trained.timings, "evaluate_seconds": time.perf_counter() - start},
    }


def _save_images(experiment: Experiment, trained: Trained, workdir: Path) -> None:
    """The image grid's attack is the last one in the config's adversary's norm, at its eps."""
    if not experiment.grids:
        return
    adversary = experiment.config.adversary
    norm = adversary.get("norm", "linf") if adversary is not None else "linf"
    names = [name for name, grid in experiment.grids.items() if grid.norm == norm]
    name = (names or list(experiment.grids))[-1]
    eps = adversary.eps if adversary is not None and names else max(experiment.grids[name].eps)
    images = experiment.evaluator.images(trained.best.variables, name, float(eps))
    np.savez(workdir / "examples.npz", allow_pickle=False, **images)


def _finish(workdir: Path, results: dict[str, Any]) -> dict[str, Any]:
    """results.json last: a run that has it is finished."""
    results_file = workdir / "results.json"
    _write(workdir / "pending_results.json", json.dumps(results, indent=2) + "\n")
    (workdir / "pending_results.json").replace(results_file)
    page = report.write(workdir)
    logging.info("report: %s", page)
    return results


def _write(path: Path, text: str) -> None:
    path.write_text(text)
