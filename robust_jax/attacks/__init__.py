"""Attacks on any `logits_fn`: [B,H,W,C] in [0,1] -> [B,K], with its parameters already bound."""

from collections.abc import Callable, Mapping

from robust_jax.attacks import norms
from robust_jax.attacks.norms import Norm
from robust_jax.attacks.pgd import LogitsFn, bim, fgsm, mim, pgd

ATTACKS: Mapping[str, Callable] = {"fgsm": fgsm, "bim": bim, "mim": mim, "pgd": pgd}

__all__ = ["ATTACKS", "LogitsFn", "Norm", "bim", "fgsm", "mim", "norms", "pgd"]
