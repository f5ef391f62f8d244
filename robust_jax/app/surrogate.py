"""The networks that adversarials are transferred from: another run's, or one trained for this."""

import dataclasses
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from robust_jax.app import entries, folder, training
from robust_jax.app.experiment import Experiment, transferred
from robust_jax.app.folder import Mode
from robust_jax.app.subject import load, subject_of
from robust_jax.devices import processes
from robust_jax.train.loop import train
from robust_jax.train.validate import NOT_TRACKED
from robust_jax.types import LogitsFn

# The run's fields that a surrogate shares: data, machine and how many examples fit on it.
SHARED = (
    "dataset",
    "data_dir",
    "test_split",
    "image_size",
    "streaming",
    "validation_size",
    "train_size",
    "normalize",
    "batch_size",
    "parallel",
    "evaluation",
    "threat",
)


def networks(experiment: Experiment, workdir: Path) -> dict[str, LogitsFn]:
    """The networks whose adversarials the audit tries, by name."""
    chosen = experiment.config.audit.surrogate
    if not chosen:
        return {}
    if chosen != "train":
        return {chosen: load(chosen).logits_fn}
    return {"an undefended CNN": _undefended(experiment, workdir)}


def bound(experiment: Experiment, workdir: Path) -> Experiment:
    """Trains the undefended CNN if attacks name it as their surrogate, and binds it to them."""
    asking = {name: grid for name, grid in experiment.grids.items() if grid.surrogate == "train"}
    if not asking:
        return experiment
    other = _undefended(experiment, workdir)
    grids = experiment.grids | {name: transferred(grid, other) for name, grid in asking.items()}
    evaluator = experiment.evaluator.with_grids(grids)
    return dataclasses.replace(experiment, grids=grids, evaluator=evaluator)


def _undefended(experiment: Experiment, workdir: Path) -> LogitsFn:
    """Trains the undefended CNN in a run of its own, whose network a notebook may load."""
    config = surrogate_config(experiment.config)
    other, there = training.build(config), workdir / "surrogate"
    mode: Mode = "evaluate" if (there / "config.json").exists() else "train"
    if mode == "train":
        entries.check_batch_size(config)
    processes.on_first(partial(folder.claim, there, config, mode))
    plan = dataclasses.replace(other.plan, description="train the surrogate")
    return subject_of(other, train(plan, there)).logits_fn


def surrogate_config(config: ConfigDict) -> ConfigDict:
    """The config of an undefended CNN on the run's data, trained by a recipe of its own."""
    return ConfigDict(
        {
            **{field: config[field] for field in SHARED},
            "seed": config.seed + 1,
            "num_labeled": 0,
            "labeled_fraction": 0.5,
            "augmentation": {"crop_padding": 0, "flip": False},
            "model": {"name": "cnn"},
            "dtype": "float32",
            "loss": {"name": "cross_entropy"},
            "loss_on": "clean",
            "adversary": None,
            "regularizers": {},
            "batch_parts": 1,
            "duration": "400 steps",
            "optimizer": {"name": "adam"},
            "learning_rate": 3e-3,
            "schedule": {"name": "cosine"},
            "weight_decay": 1e-4,
            "ema_decay": 0.0,
            "gradient_clip_norm": 0.0,
            "weight_perturbation": 0.0,
            "log_every": "100 steps",
            "validate_every": "100 steps",
            "checkpoint_every": "100 steps",
            "validation_attack": {"name": "fgsm", "eps": 0.0},
            "track_margins": NOT_TRACKED._asdict(),
            "attacks": {},
            "measurements": {},
            "audit": {**config.audit, "num_examples": 0},
        }
    )
