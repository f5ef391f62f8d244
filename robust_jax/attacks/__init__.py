"""Attacks on any `logits_fn`: [B,H,W,C] in [0,1] -> [B,K], with its parameters already bound."""

from collections.abc import Callable, Mapping

from robust_jax.attacks import norms
from robust_jax.attacks._apgd import apgd, apgd_targeted
from robust_jax.attacks._autoattack import AutoAttackResult, autoattack
from robust_jax.attacks._fab import Nearest, fab, nearest_adversarial
from robust_jax.attacks._jsma import jsma
from robust_jax.attacks._minimum_norm import (
    carlini_wagner_l2,
    deepfool,
    nearest_carlini_wagner,
    nearest_deepfool,
)
from robust_jax.attacks._multi_targeted import multi_targeted
from robust_jax.attacks._noise import gaussian_noise, uniform_noise
from robust_jax.attacks._pgd import LogitsFn, bim, fgsm, mim, pgd
from robust_jax.attacks._square import square
from robust_jax.attacks._transfer import transfer
from robust_jax.attacks.norms import Norm

ATTACKS: Mapping[str, Callable] = {
    "fgsm": fgsm,
    "bim": bim,
    "mim": mim,
    "pgd": pgd,
    "apgd": apgd,
    "apgd_targeted": apgd_targeted,
    "fab": fab,
    "square": square,
    "carlini_wagner": carlini_wagner_l2,
    "deepfool": deepfool,
    "jsma": jsma,
    "multi_targeted": multi_targeted,
    "uniform_noise": uniform_noise,
    "gaussian_noise": gaussian_noise,
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
    "carlini_wagner_l2",
    "deepfool",
    "fab",
    "fgsm",
    "gaussian_noise",
    "jsma",
    "mim",
    "multi_targeted",
    "nearest_adversarial",
    "nearest_carlini_wagner",
    "nearest_deepfool",
    "norms",
    "pgd",
    "square",
    "transfer",
    "uniform_noise",
]
