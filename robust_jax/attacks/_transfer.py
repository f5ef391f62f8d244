"""Transfer attacks: what fools one network, shown to another."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks._pgd import pgd
from robust_jax.types import Images, KeyOrKeys, LogitsFn


@compiled
def transfer(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    surrogate: LogitsFn,
    attack: Callable = pgd,
    eps: float,
    **keywords,
) -> Images:
    """The adversarials of a surrogate network, to be shown to this one (arXiv 1605.07277).

    logits_fn is only evaluated, on x: where it is wrong already, x itself is returned, so that no
    point is mended by chance. x, y, key, eps: as in `pgd`; y: labels [B]. surrogate: like
    logits_fn, and attacked instead of it. attack: one of ATTACKS, or called like them; it takes
    the other keywords (norm, num_steps, …). Returns [B,H,W,C].
    """
    x_adv = attack(surrogate, x, y, key, eps=eps, **keywords)
    right = losses.correct(logits_fn(x), y) == 1
    return jnp.where(right[:, None, None, None], x_adv, x)
