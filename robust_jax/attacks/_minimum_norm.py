"""Attacks that look for the nearest misclassified point: Carlini and Wagner's in l2, DeepFool.

Like FAB each has two faces: `nearest_…` -> Nearest, and one that accepts no point beyond eps.
Both are written for one example, lifted over the batch by jax.vmap once, and draw nothing: the
key is taken so that all attacks are called alike.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks import norms
from robust_jax.attacks._apgd import likeliest_wrong
from robust_jax.attacks._best import Best, check_counts, check_lengths
from robust_jax.attacks._fab import Nearest
from robust_jax.types import Images, KeyOrKeys, LogitsFn

# By how much tanh reaches beyond the box, so that pixels at 0 or 1, or on their way there, are not
# at its ends, where hardly any gradient is left to move them.
_MARGIN = 0.1
# What DeepFool steps beyond a linearised boundary in any case, in pixel units: its overshoot is a
# share of the step, which may be lost in rounding, and then the point would stay where it is.
_NUDGE = 1e-5
# The order of each norm's dual, in which the size of a gradient turns gaps into distances. In l1 a
# step would be a single pixel's, and end at the wall of the box.
_DUAL_ORDER = {"linf": 1, "l2": 2}


@compiled
def carlini_wagner_l2(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Literal["l2"] = "l2",
    num_steps: int = 1000,
    num_searches: int = 9,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    kappa: float = 0.0,
    targets: Int[Array, " b"] | None = None,
) -> Images:
    """The nearest misclassified point in l2, if it is no farther than eps (arXiv 1608.04644).

    Returns [B,H,W,C], x itself where there is none: `nearest_carlini_wagner` without the distance.
    """
    return nearest_carlini_wagner(
        logits_fn, x, y, key,
        eps=eps, norm=norm, num_steps=num_steps, num_searches=num_searches,
        learning_rate=learning_rate, initial_c=initial_c, kappa=kappa, targets=targets,
    ).x_adv  # fmt: skip


@compiled
def nearest_carlini_wagner(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float = jnp.inf,
    norm: Literal["l2"] = "l2",
    num_steps: int = 1000,
    num_searches: int = 9,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    kappa: float = 0.0,
    targets: Int[Array, " b"] | None = None,
) -> Nearest:
    """The nearest misclassified point in [0,1] and its l2 distance (arXiv 1608.04644, §VI).

    Adam minimises ‖x_adv - x‖² + c·max(z_y - max_{j≠y} z_j, -kappa) over w, x_adv being tanh(w)
    rescaled to the box, from x itself and for num_searches values of c: ten times the last until
    one succeeds, then halfway between failure and success. Our reading: tanh reaches a tenth beyond
    the box and x_adv is clipped to it, its gradient as if it were not, so that pixels at 0 and 1
    move too. logits_fn, x, y, key: as in `pgd`; y: labels [B]. eps: points farther than that
    are not accepted. num_steps: gradients for each c. kappa: the least margin, in units of the
    logits, by which a point has to be misclassified. targets: classes [B] to reach instead of
    leaving y. Raises ValueError for a negative eps or kappa, counts below 1, a learning_rate or
    initial_c that is not positive, a norm other than l2.
    """
    check_lengths(eps=eps, infinite=True)
    check_counts(num_steps=num_steps, num_searches=num_searches)
    for name, value in (("learning_rate", learning_rate), ("initial_c", initial_c)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value!r}")
    if not kappa >= 0:
        raise ValueError(f"kappa must not be negative, not {kappa!r}")
    if norm != "l2":
        raise ValueError(f"norm must be l2, not {norm!r}")
    sign = -1.0
    if targets is not None:
        y, sign = targets, 1.0

    def judge(x_adv, y):
        """By how much x_adv is classified as it should be, and whether that is enough."""
        logits = logits_fn(x_adv[None])
        excess = sign * losses.margin(logits, y[None])[0]
        hit = (jnp.argmax(logits[0]) == y) == (targets is not None)
        return excess, hit & (excess >= kappa)

    search = partial(
        _descend_one, judge, optax.adam(learning_rate),
        num_steps=num_steps, num_searches=num_searches, initial_c=initial_c, kappa=kappa,
    )  # fmt: skip
    return _within(eps, x, Nearest(*jax.vmap(search)(x, y)))


@compiled
def deepfool(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Literal["linf", "l2"] = "linf",
    num_steps: int = 50,
    num_targets: int | None = 9,
    overshoot: float = 0.02,
) -> Images:
    """DeepFool's misclassified point, if it is no farther than eps (arXiv 1511.04599).

    Returns [B,H,W,C], x itself where there is none: `nearest_deepfool` without the distance.
    """
    return nearest_deepfool(
        logits_fn, x, y, key,
        eps=eps, norm=norm, num_steps=num_steps, num_targets=num_targets, overshoot=overshoot,
    ).x_adv  # fmt: skip


@compiled
def nearest_deepfool(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float = jnp.inf,
    norm: Literal["linf", "l2"] = "linf",
    num_steps: int = 50,
    num_targets: int | None = 9,
    overshoot: float = 0.02,
) -> Nearest:
    """A near misclassified point in [0,1] and its distance in pixel units (arXiv 1511.04599).

    Every step goes to the nearest of the linearised decision boundaries and a share overshoot
    beyond, is clipped to the box, and repeated until the label is lost. logits_fn, x, y, key: as
    in `pgd`; y: labels [B]. eps: points farther than that are not accepted. num_steps: at most,
    each as many gradients as targets. num_targets: so many of the likeliest wrong classes, None
    for all. Raises ValueError for a negative eps or overshoot, counts below 1, a norm other than
    linf and l2.
    """
    check_lengths(eps=eps, infinite=True)
    check_counts(num_steps=num_steps)
    if num_targets is not None:
        check_counts(num_targets=num_targets)
    if not overshoot >= 0:
        raise ValueError(f"overshoot must not be negative, not {overshoot!r}")
    if norm not in _DUAL_ORDER:
        raise ValueError(f"norm must be one of {', '.join(_DUAL_ORDER)}, not {norm!r}")
    search = partial(
        _cross_one, lambda x: logits_fn(x[None])[0],
        norm=norm, num_steps=num_steps, num_targets=num_targets, overshoot=overshoot,
    )  # fmt: skip
    return _within(eps, x, Nearest(*jax.vmap(search)(x, y)))


def _descend_one(judge, adam, x, y, *, num_steps, num_searches, initial_c, kappa):
    """The nearest hit to one x [H,W,C] over all values of c, and its distance."""
    start = jnp.arctanh((2 * x - 1) / (1 + 2 * _MARGIN))

    def objective(w, c):
        free = 0.5 + (0.5 + _MARGIN) * jnp.tanh(w)
        fixed = jax.lax.stop_gradient
        x_adv = fixed(jnp.clip(free, 0.0, 1.0)) + (free - fixed(free))
        excess, hit = judge(x_adv, y)
        return ((x_adv - x) ** 2).sum() - c * jnp.minimum(excess, kappa), (x_adv, hit)

    def search(state, _):
        best, c, failed, succeeded = state

        def step(state, _):
            w, moments, best, hit_any = state
            (_, (x_adv, hit)), gradient = jax.value_and_grad(objective, has_aux=True)(w, c)
            value = jnp.where(hit, -norms.size(x_adv - x, "l2"), -jnp.inf)
            update, moments = adam.update(jnp.nan_to_num(gradient), moments)
            return (w + update, moments, best.updated(x_adv, value, hit), hit_any | hit), None

        state = (start, adam.init(start), best, jnp.asarray(False))
        (_, _, best, hit_any), _ = jax.lax.scan(step, state, length=num_steps)
        failed = jnp.where(hit_any, failed, c)
        succeeded = jnp.where(hit_any, c, succeeded)
        c = jnp.where(jnp.isinf(succeeded), 10 * c, (failed + succeeded) / 2)
        return (best, c, failed, succeeded), None

    hit = judge(x, y)[1]
    best = Best(x, jnp.where(hit, 0.0, -jnp.inf), hit)
    c, failed, succeeded = (jnp.asarray(c, x.dtype) for c in (initial_c, 0.0, jnp.inf))
    (best, _, _, _), _ = jax.lax.scan(search, (best, c, failed, succeeded), length=num_searches)
    return best.x, -best.value


def _cross_one(logits_of, x, y, *, norm, num_steps, num_targets, overshoot):
    """The first misclassified point on the way from one x [H,W,C], and its distance."""
    logits = logits_of(x)
    num_classes = len(logits)
    targets, _ = likeliest_wrong(logits, y, num_targets or num_classes)
    towards = jax.nn.one_hot(targets, num_classes) - jax.nn.one_hot(y, num_classes)

    def standing(state):
        i, _, wrong = state
        return (i < num_steps) & ~wrong

    def step(state):
        i, x_adv, _ = state
        logits, pull = jax.vjp(logits_of, x_adv)
        (gradients,) = jax.vmap(pull)(towards.astype(logits.dtype))
        gradients = jnp.nan_to_num(gradients)
        rates = jnp.linalg.norm(gradients.reshape(len(targets), -1), _DUAL_ORDER[norm], axis=-1)
        gaps = logits[y] - logits[targets]
        distances = jnp.where(rates > 0, gaps / jnp.maximum(rates, 1e-30), jnp.inf)
        nearest = jnp.argmin(distances)
        # Finite, so that it is nothing along a gradient of zero.
        length = jnp.nan_to_num((1 + overshoot) * (distances[nearest] + _NUDGE))
        x_adv = jnp.clip(x_adv + length * norms.steepest(gradients[nearest], norm), 0.0, 1.0)
        return i + 1, x_adv, jnp.argmax(logits_of(x_adv)) != y

    _, x_adv, wrong = jax.lax.while_loop(standing, step, (0, x, jnp.argmax(logits) != y))
    return x_adv, jnp.where(wrong, norms.size(x_adv - x, norm), jnp.inf)


def _within(eps, x: Images, found: Nearest) -> Nearest:
    """What was found, where it is no farther than eps; else x and infinity."""
    near = jnp.isfinite(found.distance) & (found.distance <= eps)
    return Nearest(
        jnp.where(near[:, None, None, None], found.x_adv, x),
        jnp.where(near, found.distance, jnp.inf),
    )
