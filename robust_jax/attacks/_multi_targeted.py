"""MultiTargeted: PGD towards one wrong class after another. Source: arXiv 1910.09338."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks._apgd import likeliest_wrong
from robust_jax.attacks._best import Best, check_counts
from robust_jax.attacks._pgd import pgd
from robust_jax.attacks.norms import Norm
from robust_jax.keys import example_keys, fold_in_each
from robust_jax.types import Images, KeyOrKeys, LogitsFn


@compiled
def multi_targeted(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 20,
    step_size: float | None = None,
    num_targets: int | None = None,
    num_restarts: int = 1,
) -> Images:
    """PGD on z_t - z_y for each wrong class t in turn (arXiv 1910.09338).

    num_targets: so many of the likeliest wrong classes, None for all of them. num_restarts: of
    each, so that num_targets · num_restarts · num_steps gradients are taken. y: labels [B];
    everything else as in `pgd`. Returns [B,H,W,C]: of the best points of the runs, where being
    misclassified as any class counts first, the one of least margin. Raises ValueError as `pgd`
    does and for num_targets below 1.
    """
    if num_targets is not None:
        check_counts(num_targets=num_targets)

    def attack_one(x, y, key):
        logits = logits_fn(x[None])[0]
        targets, ranks = likeliest_wrong(logits, y, num_targets or len(logits))

        def run(best, target_and_key):
            target, key = target_and_key
            x_adv = pgd(
                logits_fn, x[None], y[None], key[None],
                eps=eps, norm=norm, num_steps=num_steps, step_size=step_size,
                num_restarts=num_restarts,
                loss=lambda logits, y: losses.targeted_margin(logits, y, target[None]),
            )  # fmt: skip
            logits = logits_fn(x_adv)
            value = -losses.margin(logits, y[None])[0]
            return best.updated(x_adv[0], value, jnp.argmax(logits[0]) != y), None

        nothing = Best(x, jnp.asarray(-jnp.inf, x.dtype), jnp.asarray(False))
        best, _ = jax.lax.scan(run, nothing, (targets, fold_in_each(key, ranks)))
        return best.x

    return jax.vmap(attack_one)(x, y, example_keys(key, x.shape[0]))
