"""Builds the pieces of a run from a config, and refuses every mistake before compilation."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from robust_jax import _checks, data
from robust_jax.app import entries, subject, threat, training
from robust_jax.app.config import bind, choose, guard
from robust_jax.app.evaluator import AttackGrid, AuditSettings, Evaluator, Settings
from robust_jax.app.measurements import MEASUREMENTS, check_chain
from robust_jax.app.training import Training
from robust_jax.attacks import transfer
from robust_jax.devices import parallel
from robust_jax.errors import UserError
from robust_jax.models import MODELS
from robust_jax.types import LogitsFn


@dataclasses.dataclass(frozen=True)
class Experiment(Training):
    """What trains a network and what measures it afterwards."""

    grids: dict[str, AttackGrid]
    evaluator: Evaluator
    measurements: dict[str, Callable]
    audit: AuditSettings | None


def check(config: ConfigDict, schema: ConfigDict, *, trains: bool = True) -> None:
    """Checks what needs no data in a config: fields, numbers, names and their keywords.

    schema: the config that holds every field. trains: whether the available devices have to
    share its batches. Everything else in this package that takes a config expects one that was
    checked here. Raises UserError, naming the field, the value and the choices.
    """
    entries.check(config, schema)
    if trains:
        entries.check_batch_size(config)
    full = threat.complete(config)
    training.named(full)
    _evaluation(full)


def _evaluation(
    full: ConfigDict,
) -> tuple[dict[str, AttackGrid], dict[str, Callable], AuditSettings | None]:
    """The attacks, measurements and audit that a complete config names."""
    model = MODELS[choose(MODELS, full.model.name, "config.model.name")]
    return (
        {label: entries.attack_grid(label, entry) for label, entry in full.attacks.items()},
        {label: _measurement(label, entry, model) for label, entry in full.measurements.items()},
        entries.audit_settings(full),
    )


def build(config: ConfigDict) -> Experiment:
    """Builds what a checked config describes; loads the data, compiles nothing.

    Raises UserError, naming the field, the value and the choices.
    """
    full = threat.complete(config)
    grids, measurements, audit = _evaluation(full)
    run = training.build(config)
    training.check_radius(full.audit, "config.audit", run.dataset)
    for label, entry in full.measurements.items():
        training.check_radius(entry, f"config.measurements.{label}", run.dataset)
    for name, grid in grids.items():
        path = f"config.attacks.{name}"
        training.check_radius(full.attacks[name], path, run.dataset)
        if not grid.members:
            training.try_attack(path, grid.attack, run.dataset, eps=grid.eps[0])
        # A surrogate to be trained needs the run's folder, so `surrogate.bound` adds it later.
        if grid.surrogate and grid.surrogate != "train":
            other = surrogate_of(grid.surrogate, f"{path}.surrogate", run.dataset)
            grids[name] = transferred(grid, other)
    if audit is not None and full.audit.surrogate not in ("", "train"):
        surrogate_of(full.audit.surrogate, "config.audit.surrogate", run.dataset)
    settings = Settings(**{field: config.evaluation[field] for field in Settings._fields})
    num_examples = config.evaluation.num_examples or run.dataset.test.size
    network = training.network(run.model)
    evaluator = Evaluator(
        lambda variables: partial(network, parallel.on_this_device(variables)),
        parallel.lifted(network, config.parallel, batch_size=settings.batch_size),
        run.dataset.test.take(np.arange(min(num_examples, run.dataset.test.size))),
        grids,
        settings,
        key=run.evaluation_key,
    )
    return Experiment(
        **vars(run), grids=grids, evaluator=evaluator, measurements=measurements, audit=audit
    )


def _measurement(label: str, entry: ConfigDict, model: type[nn.Module]) -> Callable:
    """A measurement; the label is its name unless the entry gives one."""
    path = f"config.measurements.{label}"
    if not isinstance(entry, ConfigDict):
        raise UserError(f'{path} must be an entry like {{"num_examples": 500}}, not {entry!r}')
    choose(get_args(subject.At), entry.get("at", "best"), f"{path}.at")
    keywords = {k: v for k, v in entry.items() if k != "at"}
    for key, value in keywords.items():
        if key == "num_examples" and value == 0:
            continue  # all
        if key.startswith("num_"):
            guard(path, _checks.counts, **{key: value})
        if key in ("eps", "radius"):
            guard(path, _checks.known_lengths, **{key: value})
    found = bind(MEASUREMENTS, {"name": label, **keywords}, path)
    if found.keywords.get("estimate") == "lipschitz":
        check_chain(model)
    return found


def surrogate_of(folder: str, path: str, dataset: data.Dataset) -> LogitsFn:
    """The network of another run. Raises UserError if its images or classes differ."""
    found = subject.load(folder)
    other = (found.dataset.image_shape, found.dataset.num_classes)
    if other != (dataset.image_shape, dataset.num_classes):
        raise UserError(
            f"{path}: {folder} has images of {list(other[0])} and {other[1]} classes, and the data "
            f"here {list(dataset.image_shape)} and {dataset.num_classes}; name a run on the same"
        )
    return found.logits_fn


def transferred(grid: AttackGrid, surrogate: LogitsFn) -> AttackGrid:
    """The attack, made on another network and transferred."""
    return grid._replace(attack=partial(transfer, surrogate=surrogate, attack=grid.attack))
