"""Attacks on any `logits_fn`: [B,...] in [0,1] -> [B,K], with its parameters already bound."""

from collections.abc import Callable, Mapping

from robust_jax.attacks import norms
from robust_jax.attacks._apgd import apgd, apgd_targeted
from robust_jax.attacks._autoattack import AutoAttackResult, autoattack
from robust_jax.attacks._fab import fab
from robust_jax.attacks._jsma import jsma
from robust_jax.attacks._minimum_norm import carlini_wagner, deepfool
from robust_jax.attacks._multi_targeted import multi_targeted
from robust_jax.attacks._noise import gaussian_noise, uniform_noise
from robust_jax.attacks._pgd import bim, fgsm, mim, pgd
from robust_jax.attacks._run import Outcome, run
from robust_jax.attacks._square import square
from robust_jax.attacks._success import (
    Criterion,
    classified_as,
    distances,
    is_adversarial,
    misclassified,
    never,
)
from robust_jax.attacks._transfer import transfer
from robust_jax.attacks.norms import NORMS, Norm, ThreatModel
from robust_jax.types import LogitsFn

# All are called as attack(logits_fn, x, y, key, *, eps, norm, ...) and return points like x. Only
# AutoAttack, a loop on the host, returns a record.
ATTACKS: Mapping[str, Callable] = {
    "fgsm": fgsm,
    "bim": bim,
    "mim": mim,
    "pgd": pgd,
    "apgd": apgd,
    "apgd_targeted": apgd_targeted,
    "fab": fab,
    "square": square,
    "carlini_wagner": carlini_wagner,
    "deepfool": deepfool,
    "jsma": jsma,
    "multi_targeted": multi_targeted,
    "uniform_noise": uniform_noise,
    "gaussian_noise": gaussian_noise,
    "autoattack": autoattack,
}

__all__ = [
    "ATTACKS",
    "NORMS",
    "AutoAttackResult",
    "Criterion",
    "LogitsFn",
    "Norm",
    "Outcome",
    "ThreatModel",
    "apgd",
    "apgd_targeted",
    "autoattack",
    "bim",
    "carlini_wagner",
    "classified_as",
    "deepfool",
    "distances",
    "fab",
    "fgsm",
    "gaussian_noise",
    "is_adversarial",
    "jsma",
    "mim",
    "misclassified",
    "multi_targeted",
    "never",
    "norms",
    "pgd",
    "run",
    "square",
    "transfer",
    "uniform_noise",
]


def __dir__() -> list[str]:
    return __all__
