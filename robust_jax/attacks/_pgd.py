"""Projected gradient attacks: PGD and its special cases FGSM, BIM and MIM.

Each is written for one example and lifted over the batch by jax.vmap, once.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks import norms
from robust_jax.attacks._best import Best, check_counts, check_lengths
from robust_jax.attacks.norms import Norm
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, LogitsFn, Reference


@compiled
def pgd(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    random_start: bool = True,
    momentum: float = 0.0,
    keep_best: bool = True,
    loss: Callable = losses.cross_entropy,
    targets: Int[Array, " b"] | None = None,
) -> Images:
    """Projected gradient ascent on the loss within the eps-ball and [0,1] (arXiv 1706.06083).

    logits_fn: [B,H,W,C] -> [B,K]. x: [B,H,W,C] in [0,1]. y: labels [B], or whatever `loss`
    compares logits with. key: one key, folded with each example's place in the batch, or a key
    per example [B]: the same example with the same key gives the same result in any batch.
    eps, step_size: pixel units; step_size defaults to 2.5·eps/num_steps. In l1 a step goes to the
    pixels of largest gradient, as far as their walls (`norms.steepest_step`). targets: classes [B]
    to reach instead of leaving y. Returns [B,H,W,C]: the best point visited, where being
    misclassified (as the target, if there is one) counts before the loss, so the result is never
    worse than the start; or with keep_best=False the last point, as adversarial training has it,
    which saves a forward pass. Raises ValueError for a negative eps or step_size, num_steps or
    num_restarts below 1, a momentum outside [0,1], an unknown norm.
    """
    _check(eps, num_steps, step_size, num_restarts, momentum)
    if num_restarts > 1 and not keep_best:
        raise ValueError("num_restarts above 1 needs keep_best=True: restarts are compared")
    if step_size is None:
        step_size = 2.5 * eps / num_steps
    sign = 1.0
    if targets is not None:
        y, sign = targets, -1.0

    def score(x_adv, y_one):
        logits = logits_fn(x_adv[None])
        value = sign * loss(logits, y_one[None])[0]
        hit = jnp.asarray(False)
        if y_one.ndim == 0:
            hit = (jnp.argmax(logits[0]) == y_one) == (targets is not None)
        return value, hit

    ascend = partial(
        _ascend_one,
        score,
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        num_restarts=num_restarts,
        random_start=random_start,
        momentum=momentum,
        keep_best=keep_best,
    )
    return jax.vmap(ascend)(x, y, example_keys(key, x.shape[0]))


@compiled
def fgsm(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    loss: Callable = losses.cross_entropy,
    targets: Int[Array, " b"] | None = None,
) -> Images:
    """Fast gradient sign method: one step of length eps from x (arXiv 1412.6572); see `pgd`."""
    return pgd(
        logits_fn,
        x,
        y,
        key,
        eps=eps,
        norm=norm,
        num_steps=1,
        step_size=eps,
        random_start=False,
        loss=loss,
        targets=targets,
    )


@compiled
def bim(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: float | None = None,
    loss: Callable = losses.cross_entropy,
    targets: Int[Array, " b"] | None = None,
) -> Images:
    """Basic iterative method: PGD started at x itself (arXiv 1607.02533).

    step_size defaults to eps/num_steps; everything else as in `pgd`.
    """
    step_size = eps / num_steps if step_size is None and num_steps else step_size
    return pgd(
        logits_fn,
        x,
        y,
        key,
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        random_start=False,
        loss=loss,
        targets=targets,
    )


@compiled
def mim(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
    loss: Callable = losses.cross_entropy,
    targets: Int[Array, " b"] | None = None,
) -> Images:
    """Momentum iterative method: steps along a decayed sum of l1-normalised gradients.

    Source: arXiv 1710.06081. step_size defaults to eps/num_steps; everything else as in `pgd`.
    """
    step_size = eps / num_steps if step_size is None and num_steps else step_size
    return pgd(
        logits_fn,
        x,
        y,
        key,
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        random_start=False,
        momentum=momentum,
        loss=loss,
        targets=targets,
    )


def _ascend_one(
    score,
    x,
    y,
    key,
    *,
    eps,
    norm,
    num_steps,
    step_size,
    num_restarts,
    random_start,
    momentum,
    keep_best,
):
    """The best of num_restarts runs for one example x [H,W,C]; score(x, y) -> (value, hit)."""

    def run(best, restart_key):
        start = x
        if random_start:
            noise = norms.random_in_ball(restart_key, x.shape, eps, norm)
            start = norms.project_to_ball_and_box(x + noise, x, eps, norm)

        def step(carry, _):
            x_adv, velocity, best = carry
            (value, hit), gradient = jax.value_and_grad(score, has_aux=True)(x_adv, y)
            best = best.updated(x_adv, value, hit)
            # A gradient of NaN or zero leaves the point where it is.
            gradient = jnp.nan_to_num(gradient)
            gradient = gradient / jnp.maximum(norms.size(gradient, "l1"), 1e-30)
            velocity = momentum * velocity + gradient
            x_adv = x_adv + norms.steepest_step(x_adv, velocity, step_size, norm)
            return (norms.project_to_ball_and_box(x_adv, x, eps, norm), velocity, best), None

        carry = (start, jnp.zeros_like(x), best)
        (x_adv, _, best), _ = jax.lax.scan(step, carry, length=num_steps)
        if not keep_best:
            return best._replace(x=x_adv), None
        return best.updated(x_adv, *score(x_adv, y)), None

    best = Best(x, jnp.asarray(-jnp.inf, x.dtype), jnp.asarray(False))
    best, _ = jax.lax.scan(run, best, jax.random.split(key, num_restarts))
    return best.x


def _check(eps, num_steps, step_size, num_restarts, momentum) -> None:
    check_lengths(eps=eps, step_size=step_size)
    check_counts(num_steps=num_steps, num_restarts=num_restarts)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], not {momentum!r}")
