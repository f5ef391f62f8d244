"""Attacks on any `logits_fn`: [B,H,W,C] in [0,1] -> [B,K], with its parameters already bound."""

from collections.abc import Callable, Mapping

from robust_jax.attacks import norms
from robust_jax.attacks.apgd import apgd, apgd_targeted
from robust_jax.attacks.autoattack import AutoAttackResult, autoattack
from robust_jax.attacks.fab import Nearest, fab, nearest_adversarial
from robust_jax.attacks.norms import Norm
from robust_jax.attacks.pgd import LogitsFn, bim, fgsm, mim, pgd
from robust_jax.attacks.square import square

ATTACKS: Mapping[str, Callable] = {
    "fgsm": fgsm,
    "bim": bim,
    "mim": mim,
    "pgd": pgd,
    "apgd": apgd,
    "apgd_targeted": apgd_targeted,
    "fab": fab,
    "square": square,
}

__all__ = [
    "ATTACKS",
    "AutoAttackResult",
    "LogitsFn",
    "Nearest",
    "Norm",
    "apgd",
    "apgd_targeted",
    "autoattack",
    "bim",
    "fab",
    "fgsm",
    "mim",
    "nearest_adversarial",
    "norms",
    "pgd",
    "square",
]
