"""Fast adaptive boundary attack (FAB): the misclassified point nearest to x.

Written for one example and lifted over the batch by jax.vmap, once. Source: arXiv 1907.02044.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_jax._front import compiled
from robust_jax.attacks import norms
from robust_jax.attacks._apgd import likeliest_wrong
from robust_jax.attacks._best import Best, check_counts, check_lengths, check_shares
from robust_jax.attacks.norms import Norm, Perturbation, Scalar
from robust_jax.keys import example_keys, fold_in_each
from robust_jax.types import Images, KeyOrKeys, LogitsFn

# Steps of Newton's method on a concave function made of straight pieces: it ends by itself, after
# a handful; the bound is for rounding errors.
_MAX_NEWTON_STEPS = 50


class Nearest(NamedTuple):
    """x_adv [B,H,W,C], x itself where none was found; distance [B], infinite there."""

    x_adv: Images
    distance: Float[Array, " b"]


@compiled
def fab(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_targets: int | None = 9,
    ranks: Sequence[int] | Int[Array, " r"] | None = None,
    num_restarts: int = 1,
    random_start: bool = False,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    targets: Int[Array, " b"] | None = None,
) -> Images:
    """The nearest misclassified point, if it is no farther than eps (arXiv 1907.02044).

    Returns [B,H,W,C], x itself where there is none: `nearest_adversarial` without the distance.
    """
    return nearest_adversarial(
        logits_fn, x, y, key,
        eps=eps, norm=norm, num_steps=num_steps, num_targets=num_targets, ranks=ranks,
        num_restarts=num_restarts, random_start=random_start,
        alpha_max=alpha_max, eta=eta, beta=beta, targets=targets,
    ).x_adv  # fmt: skip


@compiled
def nearest_adversarial(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float = jnp.inf,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_targets: int | None = 9,
    ranks: Sequence[int] | Int[Array, " r"] | None = None,
    num_restarts: int = 1,
    random_start: bool = False,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    targets: Int[Array, " b"] | None = None,
) -> Nearest:
    """The nearest misclassified point in [0,1] and its distance in pixel units (arXiv 1907.02044).

    Every step projects the current point and x onto the linearised decision boundary within the
    box, oversteps both by eta, and mixes them, x's share being at most alpha_max; a misclassified
    point is kept if it is the nearest so far, and drawn back to a share beta of its way from x.
    logits_fn, x, y, key: as in `pgd`; y: labels [B]. eps: points farther than that are not
    accepted. num_targets: FAB-T aims at that many likeliest wrong classes in turn (all of them
    where there are fewer; or at those of the given ranks, 2 being the likeliest), which takes one
    gradient a step; None is the original attack, which steps to the nearest of all boundaries and
    takes K. num_restarts: the first starts at x (with random_start at random too), the others at
    random, half as far away as eps or the nearest point so far. targets: classes [B] to reach
    instead of leaving y, whatever num_targets and ranks are. Raises ValueError for a negative eps,
    counts below 1, alpha_max or beta outside (0,1], eta below 1, an unknown norm.
    """
    check_lengths(eps=eps, infinite=True)
    check_counts(num_steps=num_steps, num_restarts=num_restarts)
    if num_targets is not None:
        check_counts(num_targets=num_targets)
    check_shares(alpha_max=alpha_max, beta=beta)
    if not eta >= 1:
        raise ValueError(f"eta must be at least 1, not {eta!r}")
    search = partial(
        _search_one, lambda x: logits_fn(x[None])[0],
        eps=eps, norm=norm, num_steps=num_steps, num_targets=num_targets, ranks=ranks,
        num_restarts=num_restarts, random_start=random_start,
        alpha_max=alpha_max, eta=eta, beta=beta,
    )  # fmt: skip
    return Nearest(*jax.vmap(search)(x, y, example_keys(key, x.shape[0]), targets))


def project_to_boundary(
    x: Float[Array, "h w c"], value: Scalar, gradient: Float[Array, "h w c"], norm: Norm
) -> Perturbation:
    """The smallest change δ with value + gradient·δ = 0 and x + δ in [0,1].

    Where the box does not reach the boundary, the change that comes closest to it. In l1 the
    pixels of the largest gradient go first, each as far as its wall. Otherwise pixel i moves by
    min(λ·u_i, room_i), with u = 1 (linf) or |gradient| (l2), for the λ that gets there: a root of
    a concave, piecewise linear function, which Newton's method finds exactly and from below.
    """
    scale = jnp.maximum(norms.size(gradient, "linf"), 1e-30)
    weight, value = jnp.abs(gradient) / scale, value / scale
    direction = -jnp.sign(value) * jnp.sign(gradient)
    room = jnp.where(direction > 0, 1 - x, x)
    if norm == "l1":
        gained = norms.fill(jnp.abs(value), weight, weight * room)
        return direction * jnp.minimum(gained / jnp.where(weight > 0, weight, 1), room)
    unit = jnp.ones_like(weight) if norm == "linf" else weight
    limit = jnp.where(unit > 0, room / jnp.where(unit > 0, unit, 1), 0)
    slope = weight * unit

    def newton(state):
        i, root, _ = state
        free = limit > root
        needed = jnp.abs(value) - jnp.where(free, 0, slope * limit).sum()
        rate = jnp.where(free, slope, 0).sum()
        nearer = jnp.where(rate > 0, needed / jnp.where(rate > 0, rate, 1), jnp.inf)
        return i + 1, jnp.maximum(root, nearer), root

    def moving(state):
        i, root, before = state
        return (root > before) & (i < _MAX_NEWTON_STEPS)

    start = (0, jnp.zeros_like(value), -jnp.ones_like(value))
    _, root, _ = jax.lax.while_loop(moving, newton, start)
    return direction * jnp.where(limit > root, root * unit, room)


def _search_one(
    logits_of, x, y, key, own_target, *,
    eps, norm, num_steps, num_targets, ranks, num_restarts, random_start, alpha_max, eta, beta,
):  # fmt: skip
    """The nearest misclassified point to one x [H,W,C] and its distance."""
    logits = logits_of(x)
    aims = num_targets is not None or own_target is not None

    def is_hit(logits):
        label = jnp.argmax(logits)
        return label != y if own_target is None else label == own_target

    def boundary_to(target, x_adv):
        """z_t - z_y and its gradient, for the target or the nearest boundary of all.

        With a target of its own, which has to win, the other class is the likeliest there.
        """
        if aims:

            def gap(x_adv):
                logits = logits_of(x_adv)  # once: two gradients are two backward passes
                others = jnp.where(jnp.arange(len(logits)) == target, -jnp.inf, logits)
                return logits[target] - (logits[y] if own_target is None else others.max())

            return jax.value_and_grad(gap)(x_adv)
        logits, pull = jax.vjp(logits_of, x_adv)
        identity = jnp.eye(len(logits), dtype=logits.dtype)
        (gradients,) = jax.vmap(pull)(identity - identity[y])
        dual = jax.vmap(lambda gradient: norms.size(gradient, norms.DUAL[norm]))(gradients)
        gaps = logits - logits[y]
        far = jnp.where(jnp.arange(len(logits)) == y, jnp.inf, jnp.abs(gaps) / (dual + 1e-12))
        nearest = jnp.argmin(far)
        return gaps[nearest], gradients[nearest]

    def distance(x_adv):
        return norms.size(x_adv - x, norm)

    def run(best, target_and_key):
        target, key, at_random = target_and_key

        def step(state, _):
            x_adv, best = state
            value, gradient = boundary_to(target, x_adv)
            gradient = jnp.nan_to_num(gradient)
            # The select keeps XLA's CPU backend from a slow way to add up products.
            change = jnp.where(gradient == 0, 0.0, gradient * (x - x_adv)).sum()
            value_at_x = value + change
            on = project_to_boundary(x_adv, value, gradient, norm)
            from_x = project_to_boundary(x, value_at_x, gradient, norm)
            size_on, size_from_x = (
                jnp.maximum(norms.size(delta, norm), 1e-8) for delta in (on, from_x)
            )
            share = jnp.minimum(size_on / (size_on + size_from_x), alpha_max)
            x_adv = (1 - share) * (x_adv + eta * on) + share * (x + eta * from_x)
            x_adv = jnp.clip(jnp.nan_to_num(x_adv), 0.0, 1.0)
            wrong = is_hit(logits_of(x_adv))
            hit = wrong & (distance(x_adv) <= eps)
            best = best.updated(x_adv, jnp.where(hit, -distance(x_adv), -jnp.inf), hit)
            return (jnp.where(wrong, x + beta * (x_adv - x), x_adv), best), None

        # The diagonal of the box bounds the radius where eps does not.
        radius = jnp.minimum(jnp.minimum(eps, -best.value), norms.size(jnp.ones_like(x), norm)) / 2
        noise = norms.random_on_sphere(key, x.shape, radius, norm)
        start = jnp.where(at_random, jnp.clip(x + noise, 0.0, 1.0), x)
        (_, best), _ = jax.lax.scan(step, (start, best), length=num_steps)
        return best, None

    if own_target is not None:
        targets, at = own_target[None], jnp.zeros(1, int)
    elif num_targets is None:
        targets, at = jnp.zeros(1, int), jnp.zeros(1, int)
    else:
        targets, at = likeliest_wrong(logits, y, num_targets, ranks)
    restarts = jnp.arange(num_restarts)
    keys = jax.vmap(lambda k: fold_in_each(k, restarts))(fold_in_each(key, at))
    runs = (
        jnp.repeat(targets, num_restarts),
        keys.reshape(-1),
        jnp.tile((restarts > 0) | random_start, len(targets)),
    )
    wrong = is_hit(logits)
    best = Best(x, jnp.where(wrong, 0.0, -jnp.inf), wrong)
    best, _ = jax.lax.scan(run, best, runs)
    return best.x, -best.value
