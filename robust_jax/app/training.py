"""Builds what a config trains: its data, its network and the plan of its training loop."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax import linen as nn
from ml_collections import ConfigDict

from robust_jax import data, losses
from robust_jax._network import comparable
from robust_jax.app import config as config_lib
from robust_jax.app import entries, threat
from robust_jax.app.config import bind, choose, guard
from robust_jax.app.wording import threat_in_words
from robust_jax.attacks import norms
from robust_jax.devices import parallel
from robust_jax.errors import UserError
from robust_jax.models import MODELS
from robust_jax.train import optimizer
from robust_jax.train.loop import Plan
from robust_jax.train.objectives import Adversary, Apply, halves_needed, make_objective
from robust_jax.train.regularizers import Half, Term
from robust_jax.train.state import init_state
from robust_jax.train.step import StepSettings, make_train_step, vmap_train_step
from robust_jax.train.validate import Tracked, make_validation
from robust_jax.types import LogitsFn

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_MODEL_FIELDS_SET_HERE = ("num_classes", "mean", "std", "dtype", "axis_name", "dropout_keys")


@dataclasses.dataclass(frozen=True)
class Training:
    """A checked config, its data, its network and the plan that trains it."""

    config: ConfigDict
    dataset: data.Dataset
    model: nn.Module
    plan: Plan
    uses_adversary: bool
    evaluation_key: jax.Array


class Named(NamedTuple):
    """Everything that a config names for its training, with the keywords bound."""

    method: parallel.Method
    make_model: Callable[..., nn.Module]
    make_schedule: Callable
    make_optimizer: Callable
    loss: losses.Loss
    adversary: Adversary | None
    terms: dict[str, Term]
    validation_attack: Callable


def named(config: ConfigDict) -> Named:
    """Looks up the names of a complete config. Raises UserError with the choices."""
    return Named(
        method=choose(parallel.METHODS, config.parallel, "config.parallel"),
        make_model=partial(
            bind(MODELS, config.model, "config.model", reserved=_MODEL_FIELDS_SET_HERE),
            dtype=_DTYPES[choose(_DTYPES, config.dtype, "config.dtype")],
            axis_name=parallel.AXIS,
        ),
        make_schedule=bind(optimizer.SCHEDULES, config.schedule, "config.schedule"),
        make_optimizer=bind(optimizer.OPTIMIZERS, config.optimizer, "config.optimizer"),
        loss=bind(losses.LOSSES, config.loss, "config.loss"),
        adversary=entries.adversary(config.adversary),
        terms={
            name: entries.term(name, entry, config.loss_on)
            for name, entry in config.regularizers.items()
        },
        validation_attack=entries.attack_of_a_step(
            config.validation_attack, "config.validation_attack"
        ),
    )


def build(config: ConfigDict) -> Training:
    """Loads the data of a checked config and builds what trains on it; compiles nothing.

    Raises UserError, naming the field, the value and the choices.
    """
    given, config = config, threat.complete(config)
    found = named(config)
    dataset = data.load(
        config.dataset,
        validation_size=config.validation_size,
        train_size=config.train_size or None,
        num_labeled=config.num_labeled or None,
        seed=config.seed,
        data_dir=config.data_dir or None,
        test_split=config.test_split,
        image_size=config.image_size,
        streaming=config.streaming,
    )
    for field in ("threat", "adversary", "validation_attack"):
        if config[field] is not None:
            check_radius(config[field], f"config.{field}", dataset)
    for name, entry in config.regularizers.items():
        check_radius(entry, f"config.regularizers.{name}", dataset)
    if dataset.train.size < config.batch_size:
        raise UserError(
            f"config.batch_size is {config.batch_size}, and the training set holds "
            f"{dataset.train.size} examples"
        )
    statistics = {"mean": dataset.mean, "std": dataset.std} if config.normalize else {}
    model = guard("config.model", found.make_model, num_classes=dataset.num_classes, **statistics)
    num_labeled_in_batch = _num_labeled_in_batch(config, dataset.train)
    terms = {name: term for name, term in found.terms.items() if term.weight}
    objective = guard(
        "config",
        make_objective,
        apply_fn(model),
        loss=found.loss,
        loss_on=config.loss_on,
        adversary=found.adversary,
        terms=terms,
        labeled_fraction=num_labeled_in_batch / config.batch_size,
    )
    _try_out(dataset, model, found.loss, found.adversary, terms, found.validation_attack)

    def steps(field):
        return config_lib.num_steps(
            config[field],
            f"config.{field}",
            batch_size=config.batch_size,
            num_examples=dataset.train.size,
        )

    total_steps = steps("duration")
    schedule = guard("config.schedule", found.make_schedule, config.learning_rate, total_steps)
    tx = optimizer.with_clipping(
        found.make_optimizer(schedule, config.weight_decay, optimizer.is_kernel),
        config.gradient_clip_norm or None,
    )
    train_step = make_train_step(
        objective,
        tx,
        StepSettings(
            **config.augmentation,
            ema_decay=config.ema_decay or None,
            weight_perturbation=config.weight_perturbation,
            num_parts=config.batch_parts,
        ),
    )
    init_key, train_key, validation_key, evaluation_key = jax.random.split(
        jax.random.key(config.seed), 4
    )

    def init():
        state = init_state(model, tx, init_key, dataset.image_shape, average=config.ema_decay > 0)
        # Placed as the step returns it; otherwise the second step would compile its program again.
        return jax.device_put(state, parallel.replicated())

    tracked = Tracked(**config.track_margins)
    most = max(tracked.first_order, tracked.minimum_norm, tracked.clever)
    plan = Plan(
        init=init,
        train_step=parallel.map_step(train_step, found.method),
        vmapped_train_step=parallel.map_step(vmap_train_step(train_step), found.method),
        validate=make_validation(
            network(model),
            found.validation_attack,
            dataset.validation,
            batch_size=config.evaluation.batch_size,
            key=validation_key,
            method=found.method,
            tracked=tracked,
            margins_of=dataset.train.take(dataset.train.labeled[:most]) if most else None,
        ),
        batches=data.TrainBatches(
            dataset.train,
            batch_size=config.batch_size,
            num_labeled_in_batch=num_labeled_in_batch,
            seed=config.seed,
            rows=parallel.own_rows(config.batch_size),
        ),
        schedule=schedule,
        key=train_key,
        total_steps=total_steps,
        steps_per_epoch=dataset.train.size / config.batch_size,
        batch_size=config.batch_size,
        log_every=steps("log_every"),
        validate_every=steps("validate_every"),
        validate_first=most > 0,
        checkpoint_every=steps("checkpoint_every"),
    )
    uses_adversary = "adversarial" in halves_needed(config.loss_on, terms)
    if uses_adversary:
        norm = config.adversary.get("norm", "l0")  # of JSMA, which takes no norm
        trained = threat_in_words(norm, config.adversary.eps)
        judged = threat_in_words(config.threat.norm, config.threat.eps)
        if trained != judged:
            logging.warning("config.adversary is at %s, and config.threat at %s", trained, judged)
    return Training(given, dataset, model, plan, uses_adversary, evaluation_key)


def apply_fn(model: nn.Module) -> Apply:
    """A linen network as an objective calls it."""

    def apply(params, batch_stats, x, train, keys):
        variables = {"params": params, "batch_stats": batch_stats}
        if not train:
            return model.apply(variables, x), batch_stats
        trained = model.clone(dropout_keys=keys) if hasattr(model, "dropout_keys") else model
        logits, mutated = trained.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, mutated.get("batch_stats", batch_stats)

    return apply


def network(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """network(variables, x) -> logits; float64 images are computed in float64 throughout."""

    def run(variables, x):
        exact = x.dtype == jnp.float64
        return (model.clone(dtype=jnp.float64) if exact else model).apply(variables, x)

    return run


def _num_labeled_in_batch(config: ConfigDict, train: data.Split | data.Streamed) -> int:
    if len(train.labeled) == train.size:
        return config.batch_size
    return max(1, round(config.labeled_fraction * config.batch_size))


def check_radius(entry: Mapping[str, Any], path: str, dataset: data.Dataset) -> None:
    """Checks that an entry's radii do not exceed the largest distance between two images.

    Raises UserError otherwise, for instance for 8 instead of 8/255.
    """
    model = norms.NORMS.get(str(entry.get("norm")))
    if model is None or "eps" not in entry:
        return
    largest = float(model.size(jnp.ones(dataset.image_shape)))
    for radius in threat.radii(entry["eps"]):
        if radius > largest:
            raise UserError(
                f"{path}.eps is {radius:g}; pixels are in [0, 1], where no two images are further "
                f"apart than {largest:g} in {model.name} (8 of 255 levels are 8/255)"
            )


# The attacks that passed, with the shapes, since the runs of a study share them.
_tried: set[tuple] = set()


def try_attack(path: str, attack: Callable, dataset: data.Dataset, reference=None, **keywords):
    """Traces an attack on the data's shapes and a linear network, to run the attack's own checks.

    reference: what replaces the labels.
    """
    shapes = (dataset.image_shape, dataset.num_classes, reference)
    this = (comparable(attack), comparable(keywords), *shapes)
    if this in _tried:
        return
    x, y, key, _ = _shapes(dataset)

    def attacked(x, reference, key):
        return attack(_linear(dataset), x, reference, key, **keywords)

    guard(path, jax.eval_shape, attacked, x, y if reference is None else reference, key)
    _tried.add(this)


def _try_out(dataset, model, loss, adversary, terms: Mapping[str, Term], validation_attack) -> None:
    """Traces each piece on the data's shapes: the network once, the others on a linear one."""
    x, y, key, logits = _shapes(dataset)

    def regularized(term):
        def values(x, logits, y, key, params):
            halves = dict.fromkeys(("clean", "adversarial"), Half(x, logits))
            keys = jax.random.split(key, 2)
            return term(halves, logits_fn=_linear(dataset), labels=y, keys=keys, params=params)

        jax.eval_shape(values, x, logits, y, key, params)

    params = guard("config.model", jax.eval_shape, model.init, key, x)["params"]
    guard("config.loss", jax.eval_shape, loss, logits, y)
    if adversary is not None:
        target = logits if adversary.against_clean_logits else y
        try_attack("config.adversary", adversary.attack, dataset, target)
    for name, term in terms.items():
        guard(f"config.regularizers.{name}", regularized, term)
    try_attack("config.validation_attack", validation_attack, dataset)


def _linear(dataset: data.Dataset) -> LogitsFn:
    """A network that takes no time to trace."""

    def logits_fn(x):
        return jnp.broadcast_to(x.mean((1, 2, 3))[:, None], (x.shape[0], dataset.num_classes))

    return logits_fn


def _shapes(dataset: data.Dataset):
    """Two images, their labels, a key and logits, to trace with."""
    return (
        jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.eval_shape(partial(jax.random.key, 0)),
        jax.ShapeDtypeStruct((2, dataset.num_classes), jnp.float32),
    )
