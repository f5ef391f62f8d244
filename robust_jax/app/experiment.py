"""From a config to the pieces of a run, with every mistake refused before anything is compiled."""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from robust_jax import data, losses
from robust_jax.app import config as config_lib
from robust_jax.app.config import bind, choose, guard
from robust_jax.app.evaluate import AttackGrid, AuditSettings, Evaluator, Settings
from robust_jax.app.measurements import MEASUREMENTS, Subject
from robust_jax.attacks import ATTACKS, NORMS, never, transfer
from robust_jax.attacks._autoattack import VERSIONS, check_arguments
from robust_jax.attacks._best import check_lengths
from robust_jax.devices import parallel
from robust_jax.errors import UserError
from robust_jax.models import MODELS
from robust_jax.train import optimizer, regularizers
from robust_jax.train.loop import Plan, Trained, restore
from robust_jax.train.objectives import Adversary, Apply, Term, halves_needed, make_objective
from robust_jax.train.state import init_state
from robust_jax.train.step import make_train_step, together
from robust_jax.train.validate import make_validation

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_MODEL_FIELDS_SET_HERE = ("num_classes", "mean", "std", "dtype", "axis_name")
# AutoAttack is a loop on the host.
_ATTACKS_IN_A_STEP = {name: attack for name, attack in ATTACKS.items() if name != "autoattack"}
_NOT_FOR_CONFIGS = ("targets", "criterion")
_SET_BY_THE_EVALUATION = (
    *_NOT_FOR_CONFIGS, "eps", "batch_size", "map_examples", "state_path", "progress"
)  # fmt: skip
# The loss of an adversary that leaves the clean logits, not the label: TRADES' and MART's.
_AGAINST_CLEAN_LOGITS = {"kl": losses.kl}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and what it composes."""

    config: ConfigDict
    dataset: data.Dataset
    model: nn.Module
    plan: Plan
    uses_adversary: bool
    grids: dict[str, AttackGrid]
    evaluator: Evaluator
    measurements: dict[str, Callable]
    audit: AuditSettings | None


def build(config: ConfigDict, schema: ConfigDict) -> Experiment:
    """Checks the config against the schema (configs/default.py) and builds what it composes.

    Raises UserError, naming the field, the value and the choices. Loads the data; compiles nothing.
    """
    config_lib.check_fields(config, schema)
    _check_numbers(config)
    method = choose(parallel.METHODS, config.parallel, "config.parallel")
    make_model = partial(
        bind(MODELS, config.model, "config.model", reserved=_MODEL_FIELDS_SET_HERE),
        dtype=_DTYPES[choose(_DTYPES, config.dtype, "config.dtype")],
        axis_name=parallel.AXIS,
    )
    make_schedule = bind(optimizer.SCHEDULES, config.schedule, "config.schedule")
    make_optimizer = bind(optimizer.OPTIMIZERS, config.optimizer, "config.optimizer")
    loss = bind(losses.LOSSES, config.loss, "config.loss")
    adversary = _adversary(config.adversary)
    terms = {
        name: _term(name, entry, config.loss_on) for name, entry in config.regularizers.items()
    }
    validation_attack = bind(
        _ATTACKS_IN_A_STEP,
        config.validation_attack,
        "config.validation_attack",
        reserved=_NOT_FOR_CONFIGS,
        named={"loss": losses.ATTACK_LOSSES},
    )
    grids = {name: _grid(entry, f"config.attacks.{name}") for name, entry in config.attacks.items()}
    measurements: dict[str, Callable] = {
        name: bind(MEASUREMENTS, {"name": name, **entry}, f"config.measurements.{name}")
        for name, entry in config.measurements.items()
    }
    audit = _audit_settings(config, loss)

    dataset = data.load(
        config.dataset,
        validation_size=config.validation_size,
        num_labeled=config.num_labeled or None,
        seed=config.seed,
        data_dir=config.data_dir or None,
        test_split=config.test_split,
        image_size=config.image_size,
        streaming=config.streaming,
    )
    statistics = {"mean": dataset.mean, "std": dataset.std} if config.normalize else {}
    model = guard("config.model", make_model, num_classes=dataset.num_classes, **statistics)
    num_labeled_in_batch = _num_labeled_in_batch(config, dataset.train)
    terms = {name: term for name, term in terms.items() if term.weight}
    objective = guard(
        "config",
        make_objective,
        apply_fn(model),
        loss=loss,
        loss_on=config.loss_on,
        adversary=adversary,
        terms=terms,
        labeled_fraction=num_labeled_in_batch / config.batch_size,
    )
    _try_out(dataset, model, loss, adversary, terms, validation_attack, grids)

    def steps(field):
        return config_lib.num_steps(
            config[field],
            f"config.{field}",
            batch_size=config.batch_size,
            num_examples=dataset.train.size,
        )

    total_steps = steps("duration")
    schedule = guard("config.schedule", make_schedule, config.learning_rate, total_steps)
    tx = optimizer.with_clipping(
        make_optimizer(schedule, config.weight_decay, optimizer.decayed),
        config.gradient_clip_norm or None,
    )
    train_step = make_train_step(
        objective,
        tx,
        axis_name=parallel.AXIS,
        ema_decay=config.ema_decay or None,
        weight_perturbation=config.weight_perturbation,
        num_parts=config.batch_parts,
        crop_padding=config.augmentation.crop_padding,
        flip=config.augmentation.flip,
    )
    init_key, train_key, validation_key, evaluation_key = jax.random.split(
        jax.random.key(config.seed), 4
    )

    def init():
        state = init_state(model, tx, init_key, dataset.image_shape, average=config.ema_decay > 0)
        # As the step returns it, or its program would be compiled once more for the second step.
        return jax.device_put(state, parallel.replicated())

    count = min(config.track_margins, dataset.train.size)
    tracked = dataset.train.take(np.arange(count)) if count else None
    plan = Plan(
        init=init,
        train_step=parallel.map_step(train_step, method),
        train_steps=parallel.map_step(together(train_step), method),
        validate=make_validation(
            _network(model),
            validation_attack,
            dataset.validation,
            batch_size=config.evaluation.batch_size,
            key=validation_key,
            method=method,
            margins_of=tracked,
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
        checkpoint_every=steps("checkpoint_every"),
    )
    evaluation = config.evaluation.to_dict()
    num_examples = evaluation.pop("num_examples") or dataset.test.size
    evaluator = Evaluator(
        _network(model),
        dataset.test.take(np.arange(min(num_examples, dataset.test.size))),
        grids,
        Settings(**evaluation),
        key=evaluation_key,
        method=method,
    )
    uses_adversary = "adversarial" in halves_needed(config.loss_on, terms)
    return Experiment(
        config, dataset, model, plan, uses_adversary, grids, evaluator, measurements, audit
    )


def load(workdir: Path | str) -> Subject:
    """The best network of a finished run, with its data.

    Raises UserError where workdir holds none.
    """
    workdir = Path(workdir).absolute()
    try:
        config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir} holds no run: {error}") from error
    experiment = build(config, config)
    return subject_of(experiment, restore(experiment.plan, workdir))


def subject_of(experiment: Experiment, trained: Trained) -> Subject:
    """The best network of an experiment that was trained."""
    variables = parallel.on_this_device(trained.best.variables)
    return Subject(
        experiment.model,
        variables,
        experiment.evaluator.logits_fn(variables),
        experiment.dataset,
        jax.random.key(experiment.config.seed),
    )


def surrogate_config(config: ConfigDict, schema: ConfigDict) -> ConfigDict:
    """The config of an undefended CNN for the same data, for attacks to be transferred from."""
    other = schema.copy_and_resolve_references()
    for field in ("dataset", "data_dir", "test_split", "image_size", "streaming",
                  "validation_size", "normalize", "parallel", "batch_size"):  # fmt: skip
        other[field] = config[field]
    other.seed = config.seed + 1
    other.loss_on, other.adversary = "clean", None
    other.regularizers, other.attacks = ConfigDict(), ConfigDict()
    other.audit.num_examples = 0
    other.duration = "400 steps"
    for field in ("log_every", "validate_every", "checkpoint_every"):
        other[field] = "100 steps"
    other.validation_attack = ConfigDict({"name": "fgsm", "eps": 0.0})
    return other


def _check_numbers(config: ConfigDict) -> None:
    at_least = {
        "seed": 0,
        "num_labeled": 0,
        "augmentation.crop_padding": 0,
        "weight_decay": 0,
        "weight_perturbation": 0,
        "gradient_clip_norm": 0,
        "batch_parts": 1,
        "image_size": 0,
        "evaluation.num_examples": 0,
        "evaluation.batch_size": 1,
        "evaluation.jacobian_chunk": 1,
        "evaluation.jacobian_projections": 2,
        "evaluation.spectral_iterations": 1,
        "evaluation.num_images": 1,
        "track_margins": 0,
        "audit.num_examples": 0,
        "audit.num_queries": 1,
    }
    for field, least in at_least.items():
        if not (value := _get(config, field)) >= least:
            raise UserError(f"config.{field} is {value}; it must be at least {least}")
    if not config.learning_rate > 0:
        raise UserError(f"config.learning_rate is {config.learning_rate}; it must be above 0")
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"config.ema_decay is {config.ema_decay}; it must be in [0, 1)")
    if not 0 < config.labeled_fraction <= 1:
        raise UserError(
            f"config.labeled_fraction is {config.labeled_fraction}; it must be in (0, 1]"
        )
    guard("config.batch_size", parallel.check_batch_size, config.batch_size, config.batch_parts)


def _get(config: ConfigDict, path: str):
    for field in path.split("."):
        config = config[field]
    return config


def _adversary(entry: ConfigDict | None) -> Adversary | None:
    if entry is None:
        return None
    named = {"loss": {**losses.ATTACK_LOSSES, **_AGAINST_CLEAN_LOGITS}}
    attack = bind(
        _ATTACKS_IN_A_STEP, entry, "config.adversary", reserved=_NOT_FOR_CONFIGS, named=named
    )
    against_clean_logits = entry.get("loss") in _AGAINST_CLEAN_LOGITS
    if against_clean_logits:
        attack = partial(attack, criterion=never)
    return Adversary(attack, against_clean_logits)


def _term(name: str, entry: ConfigDict, loss_on: str) -> Term:
    path = f"config.regularizers.{name}"
    if not isinstance(entry, ConfigDict):
        raise UserError(f'{path} must be an entry like {{"weight": 1.0}}, not {entry!r}')
    choices = {**regularizers.REGULARIZERS, **regularizers.PAIR_REGULARIZERS}
    keywords = {k: v for k, v in entry.items() if k not in ("weight", "on")}
    fn = bind(choices, {"name": name, **keywords}, path)
    if "weight" not in entry:
        raise UserError(f"{path}.weight is missing")
    weight = config_lib.check_type(entry["weight"], float, f"{path}.weight")
    if not math.isfinite(weight):
        raise UserError(f"{path}.weight is {weight}; it must be finite")
    if name in regularizers.PAIR_REGULARIZERS and "on" in entry:
        raise UserError(f"{path}.on: {name} compares the halves and is not on one of them")
    return Term(fn, weight, entry.get("on", loss_on))


def _grid(entry: ConfigDict, path: str) -> AttackGrid:
    if not isinstance(entry, ConfigDict):
        raise UserError(
            f'{path} must be an entry like {{"name": "pgd", "eps": (0.1,)}}, not {entry!r}'
        )
    keywords = {k: v for k, v in entry.items() if k not in ("eps", "num_examples", "surrogate")}
    attack = bind(
        ATTACKS,
        keywords,
        path,
        reserved=_SET_BY_THE_EVALUATION,
        named={"loss": losses.ATTACK_LOSSES},
    )
    eps = entry.get("eps")
    eps = config_lib.check_type(
        (eps,) if isinstance(eps, int | float) else eps, tuple[float, ...], f"{path}.eps"
    )
    if not eps:
        raise UserError(f"{path}.eps is empty; give at least one radius")
    for radius in eps:
        guard(path, check_lengths, eps=radius)
    num_examples = config_lib.check_type(entry.get("num_examples", 0), int, f"{path}.num_examples")
    if num_examples < 0:
        raise UserError(f"{path}.num_examples is {num_examples}; 0 stands for all")
    members: tuple[str, ...] = ()
    if entry["name"] == "autoattack":
        version = attack.keywords.get("version", "standard")
        overrides = (attack.keywords.get("overrides") or {}).values()
        if version == "rand" or any("eot_samples" in own for own in overrides):
            raise UserError(f"{path}: rand is for randomised networks, which a config cannot name")
        members = tuple(VERSIONS.get(version, ()) if isinstance(version, str) else version)
    norm = inspect.signature(attack).parameters["norm"].default  # the entry's or its own
    if surrogate := entry.get("surrogate"):
        if members:
            raise UserError(f"{path}.surrogate: autoattack is not transferred; name another attack")
        attack = partial(transfer, surrogate=load(surrogate).logits_fn, attack=attack)
    return AttackGrid(
        entry["name"], attack, norm, tuple(map(float, eps)), num_examples or None, members
    )


def _audit_settings(config: ConfigDict, loss) -> AuditSettings | None:
    """None where no example is to be audited."""
    settings = config.audit
    if not settings.num_examples:
        return None
    norm = choose(NORMS, settings.norm, "config.audit.norm")
    if not settings.eps > 0:
        raise UserError(f"config.audit.eps is {settings.eps}; it must be above 0")
    other = settings.surrogate
    if other not in ("", "train") and not (Path(other) / "config.json").exists():
        raise UserError(
            f"config.audit.surrogate is {other!r}, which holds no run; "
            'choices: "train", "" or the folder of a finished run'
        )
    return AuditSettings(norm, settings.eps, settings.num_examples, settings.num_queries, loss)


def _num_labeled_in_batch(config: ConfigDict, train: data.Split | data.Streamed) -> int:
    if len(train.labeled) == train.size:
        return config.batch_size
    return max(1, round(config.labeled_fraction * config.batch_size))


def _try_out(dataset, model, loss, adversary, terms, validation_attack, grids) -> None:
    """Traces each piece on the data's shapes, which is where they check their arguments.

    The network is traced once; the others see a linear one, which takes no time.
    """
    x = jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.float32)
    y = jax.ShapeDtypeStruct((2,), jnp.int32)
    key = jax.eval_shape(partial(jax.random.key, 0))
    logits = jax.ShapeDtypeStruct((2, dataset.num_classes), jnp.float32)

    def logits_fn(x):
        return jnp.broadcast_to(x.mean((1, 2, 3))[:, None], (x.shape[0], dataset.num_classes))

    def attacked(attack, y, **keywords):
        jax.eval_shape(lambda x, y, k: attack(logits_fn, x, y, k, **keywords), x, y, key)

    def regularized(fn, pair):
        def term(x, logits, y, key):
            half = regularizers.Half(x, logits)
            if pair:
                return fn(half, half, y)
            return fn(logits_fn, half, y, jax.random.split(key, 2))

        jax.eval_shape(term, x, logits, y, key)

    guard("config.model", jax.eval_shape, model.init, key, x)
    guard("config.loss", jax.eval_shape, loss, logits, y)
    if adversary is not None:
        target = logits if adversary.against_clean_logits else y
        guard("config.adversary", attacked, adversary.attack, target)
    for name, term in terms.items():
        pair = name in regularizers.PAIR_REGULARIZERS
        guard(f"config.regularizers.{name}", regularized, term.fn, pair)
    guard("config.validation_attack", attacked, validation_attack, y)
    for name, grid in grids.items():
        path, eps = f"config.attacks.{name}", grid.eps[0]
        if grid.members:  # a loop on the host, which checks its arguments before it begins
            guard(path, check_arguments, **grid.attack.keywords, eps=eps)
        else:
            guard(path, attacked, grid.attack, y, eps=eps)


def apply_fn(model: nn.Module) -> Apply:
    """A linen network as an objective calls it."""

    def apply(params, batch_stats, x, train):
        variables = {"params": params, "batch_stats": batch_stats}
        if not train:
            return model.apply(variables, x), batch_stats
        logits, mutated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, mutated.get("batch_stats", batch_stats)

    return apply


def _network(model: nn.Module):
    """network(variables, x) -> logits; float64 images are computed in float64 throughout."""

    def network(variables, x):
        exact = x.dtype == jnp.float64
        return (model.clone(dtype=jnp.float64) if exact else model).apply(variables, x)

    return network
