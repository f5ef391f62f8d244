"""A config's entries, checked and bound to what they name: adversary, terms, attacks, audit.

Nothing here loads data or traces a program; every mistake is a UserError that names the field.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from robust_jax import _checks, losses
from robust_jax.app import config as config_lib
from robust_jax.app.config import bind, guard, keyword_parameters
from robust_jax.app.evaluator import AttackGrid, AuditSettings
from robust_jax.attacks import ATTACKS, never
from robust_jax.attacks._autoattack import ensemble_of
from robust_jax.attacks.norms import NORMS
from robust_jax.devices import parallel
from robust_jax.errors import UserError
from robust_jax.train.objectives import Adversary
from robust_jax.train.regularizers import REGULARIZERS, Term

# AutoAttack is a loop on the host, which no step can contain.
ATTACKS_IN_A_STEP = {name: attack for name, attack in ATTACKS.items() if name != "autoattack"}
NOT_FOR_CONFIGS = ("targets", "criterion")
_SET_BY_THE_EVALUATION = (
    *NOT_FOR_CONFIGS,
    "eps",
    "batch_size",
    "map_examples",
    "state_path",
    "progress",
)
# The loss of an adversary that moves away from the clean logits, not the label, as in TRADES.
_AGAINST_CLEAN_LOGITS = {"kl": losses.kl}
_FROM_X = ("fgsm", "bim", "mim")  # pgd has a random start by default


def attack_of_a_step(
    entry: ConfigDict, path: str, attack_losses: Mapping[str, losses.Loss] = losses.ATTACK_LOSSES
) -> partial:
    """attack(logits_fn, x, y, keys) -> x_adv, at the radius of the entry."""
    keywords, relative = _relative_step_size(ATTACKS_IN_A_STEP, entry, path)
    attack = bind(
        ATTACKS_IN_A_STEP, keywords, path, reserved=NOT_FOR_CONFIGS, named={"loss": attack_losses}
    )
    if relative is None:
        return attack
    return partial(attack, step_size=relative * attack.keywords["eps"])


def adversary(entry: ConfigDict | None) -> Adversary | None:
    if entry is None:
        return None
    attack = attack_of_a_step(
        entry, "config.adversary", {**losses.ATTACK_LOSSES, **_AGAINST_CLEAN_LOGITS}
    )
    against_clean_logits = entry.get("loss") in _AGAINST_CLEAN_LOGITS
    if against_clean_logits:
        if entry.name in _FROM_X or not entry.get("random_start", True):
            raise UserError(
                'config.adversary.loss is "kl", which has no gradient at x, where this attack '
                "starts; take pgd with its random_start"
            )
        attack = partial(attack, criterion=never)
    return Adversary(attack, against_clean_logits)


def term(name: str, entry: ConfigDict, loss_on: str) -> Term:
    path = f"config.regularizers.{name}"
    if not isinstance(entry, ConfigDict):
        raise UserError(f'{path} must be an entry like {{"weight": 1.0}}, not {entry!r}')
    keywords = {k: v for k, v in entry.items() if k not in ("weight", "on")}
    fn = bind(REGULARIZERS, {"name": name, **keywords}, path)
    if "weight" not in entry:
        raise UserError(f"{path}.weight is missing")
    weight = config_lib.check_type(entry["weight"], float, f"{path}.weight")
    if not math.isfinite(weight):
        raise UserError(f"{path}.weight is {weight}; it must be finite")
    bound = Term(fn, weight, entry.get("on", loss_on))
    if "on" in entry and "half" not in bound.inputs:
        raise UserError(
            f"{path}.on: {fn.func.__name__} does not take 'on'; "
            f"it looks at {', '.join(bound.inputs)}"
        )
    return bound


def attack_grid(label: str, entry: ConfigDict) -> AttackGrid:
    """An attack of the final evaluation; the label is its name unless the entry gives one."""
    path = f"config.attacks.{label}"
    if not isinstance(entry, ConfigDict):
        raise UserError(
            f'{path} must be an entry like {{"name": "pgd", "eps": (0.1,)}}, not {entry!r}'
        )
    given = {k: v for k, v in entry.items() if k not in ("eps", "num_examples", "surrogate")}
    keywords, relative = _relative_step_size(ATTACKS, {"name": label, **given}, path)
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
        guard(path, _checks.known_lengths, eps=radius)
    num_examples = config_lib.check_type(entry.get("num_examples", 0), int, f"{path}.num_examples")
    if num_examples < 0:
        raise UserError(f"{path}.num_examples is {num_examples}; 0 stands for all")
    members: tuple[str, ...] = ()
    kind = entry.get("name", label)
    if kind == "autoattack":
        version = attack.keywords.get("version", "standard")
        overrides = (attack.keywords.get("overrides") or {}).values()
        if version == "rand" or any("eot_samples" in own for own in overrides):
            raise UserError(f"{path}: rand is for randomised networks, which a config cannot name")
        # A loop on the host is not traced beforehand, so its arguments are checked here.
        members = tuple(guard(path, ensemble_of, **attack.keywords))
    norm = inspect.signature(attack).parameters["norm"].default  # the entry's, or the default
    surrogate = config_lib.check_type(entry.get("surrogate", ""), str, f"{path}.surrogate")
    if surrogate and members:
        raise UserError(f"{path}.surrogate: autoattack is not transferred; name another attack")
    eps = tuple(map(float, eps))
    run = attack if relative is None else _RelativeStep(attack, relative)
    return AttackGrid(kind, run, norm, eps, num_examples or None, members, surrogate)


@dataclasses.dataclass(frozen=True)
class _RelativeStep:
    """An attack whose step size is a multiple of the radius that it is called with."""

    attack: Callable
    relative: float

    def __call__(self, *args, eps, **keywords):
        return self.attack(*args, eps=eps, step_size=self.relative * eps, **keywords)


def _relative_step_size(
    choices: Mapping[str, Callable], entry: Mapping[str, Any] | ConfigDict, path: str
) -> tuple[dict[str, Any], float | None]:
    """The entry without its relative_step_size, and the relative_step_size."""
    if not isinstance(entry, Mapping | ConfigDict):  # which `bind` refuses
        return entry, None
    keywords = dict(entry)
    relative = keywords.pop("relative_step_size", None)
    if relative is None:
        return keywords, None
    here = f"{path}.relative_step_size"
    relative = config_lib.check_type(relative, float, here)
    if "step_size" not in keyword_parameters(choices.get(str(keywords.get("name")), bind)):
        raise UserError(f"{here}: {keywords.get('name')} takes no step_size")
    if "step_size" in keywords:
        raise UserError(f"{here}: give either this or step_size (in pixel units), not both")
    if not relative > 0:
        raise UserError(f"{here} is {relative}; it must be above 0")
    return keywords, relative


def audit_settings(config: ConfigDict) -> AuditSettings | None:
    """The settings of the audit; None if no example is audited."""
    settings = config.audit
    if not settings.num_examples:
        return None
    config_lib.choose(NORMS, settings.get("norm"), "config.audit.norm")
    if not config_lib.check_type(settings.get("eps"), float, "config.audit.eps") > 0:
        raise UserError(f"config.audit.eps is {settings.eps}; it must be above 0")
    other = settings.surrogate
    if other not in ("", "train") and not (Path(other) / "config.json").exists():
        raise UserError(
            f"config.audit.surrogate is {other!r}, which holds no run; "
            'choices: "train", "" or the folder of a finished run'
        )
    loss = bind(losses.LOSSES, config.loss, "config.loss")
    return AuditSettings(
        settings.norm, settings.eps, settings.num_examples, settings.num_queries, loss
    )


def check(config: ConfigDict, schema: ConfigDict) -> None:
    """Checks a config's fields against the schema, and its numbers against their ranges."""
    config_lib.check_fields(config, schema)
    check_numbers(config)


def check_batch_size(config: ConfigDict) -> None:
    """Raises UserError if the available devices cannot share a training batch."""
    guard("config.batch_size", parallel.check_batch_size, config.batch_size, config.batch_parts)


def check_numbers(config: ConfigDict) -> None:
    if not config.seed < 2**32 - 1:  # the surrogate's is one more, and a key takes 32 bits
        raise UserError(f"config.seed is {config.seed}; it must be below {2**32 - 1}")
    at_least = {
        "seed": 0,
        "train_size": 0,
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
        "track_margins.first_order": 0,
        "track_margins.minimum_norm": 0,
        "track_margins.clever": 0,
        "track_margins.num_steps": 1,
        "track_margins.num_samples": 1,
        "audit.num_examples": 0,
        "audit.num_queries": 1,
    }
    for field, least in at_least.items():
        if not (value := config_lib.get_field(config, field)) >= least:
            raise UserError(f"config.{field} is {value}; it must be at least {least}")
    if not config.learning_rate > 0:
        raise UserError(f"config.learning_rate is {config.learning_rate}; it must be above 0")
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"config.ema_decay is {config.ema_decay}; it must be in [0, 1)")
    if not 0 < config.labeled_fraction <= 1:
        raise UserError(
            f"config.labeled_fraction is {config.labeled_fraction}; it must be in (0, 1]"
        )
