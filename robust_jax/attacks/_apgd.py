"""Auto-PGD: projected gradient ascent with momentum that picks its own step sizes.

Written for one example and lifted over the batch by jax.vmap, once. Source: arXiv 2003.01690.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks import norms
from robust_jax.attacks._best import Best, check_counts, check_lengths, check_shares
from robust_jax.attacks.norms import Norm
from robust_jax.keys import example_keys, fold_in_each
from robust_jax.types import Images, KeyOrKeys, LogitsFn, Reference

# How much of a step goes where the gradient points; the rest repeats the step before.
_GRADIENT_SHARE = 0.75


@compiled
def apgd(
    logits_fn: LogitsFn | Callable,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_restarts: int = 1,
    rho: float = 0.75,
    loss: Callable = losses.cross_entropy,
    targets: Int[Array, " b"] | None = None,
    eot_samples: int | None = None,
) -> Images:
    """Auto-PGD on any loss within the eps-ball and [0,1] (arXiv 2003.01690).

    The first step is 2·eps; at checkpoints it is halved, and the search goes back to the point of
    largest loss, where fewer than a share rho of the steps raised the loss. In l1 (arXiv
    2103.01208) steps are sparse, the search goes through the balls of 3·eps and 2·eps first, with
    two evaluations more, and rho plays no part. logits_fn, x, y, key, eps, targets: as in `pgd`.
    eot_samples: for a randomised network, logits_fn(x, key), how many draws the loss and its
    gradient are averaged over; None for logits_fn(x). Returns [B,H,W,C]: the best point visited,
    where being misclassified (as the target, if there is one; by more than half of the draws, if
    there are any) counts before the loss. Raises ValueError for a negative eps, num_steps,
    num_restarts or eot_samples below 1, rho outside (0,1], an unknown norm.
    """
    _check(eps, rho, eot_samples, num_steps=num_steps, num_restarts=num_restarts)
    sign = 1.0
    if targets is not None:
        y, sign = targets, -1.0

    def score(logits, y, _):
        references = jnp.broadcast_to(y, (len(logits), *y.shape))
        hits = jnp.zeros(len(logits), bool)
        if y.ndim == 0:
            hits = (jnp.argmax(logits, -1) == y) == (targets is not None)
        return sign * loss(logits, references), hits

    def attack_one(x, y, key):
        runs = jnp.arange(num_restarts)
        return ascend(x, y, runs, fold_in_each(key, runs))

    ascend = partial(
        _ascend_one, partial(_outputs, logits_fn, eot_samples), score,
        eps=eps, norm=norm, num_steps=num_steps, rho=rho,
    )  # fmt: skip
    return jax.vmap(attack_one)(x, y, example_keys(key, x.shape[0]))


@compiled
def apgd_targeted(
    logits_fn: LogitsFn | Callable,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_targets: int = 9,
    ranks: Sequence[int] | Int[Array, " r"] | None = None,
    rho: float = 0.75,
    eot_samples: int | None = None,
) -> Images:
    """Auto-PGD towards the likeliest wrong classes, one run each (APGD-T, arXiv 2003.01690).

    The loss is `losses.targeted_dlr`, or with fewer than four classes, where that does not exist,
    `losses.targeted_margin`. Targets are the num_targets classes other than y of largest clean
    logit (all of them where there are fewer), or those of the given ranks, 2 being the likeliest
    wrong class. y: labels [B]; everything else as in `apgd`. Returns [B,H,W,C], the best point
    visited, where being misclassified as any class counts before the loss. Raises ValueError as
    `apgd` does and for num_targets below 1.
    """
    _check(eps, rho, eot_samples, num_steps=num_steps, num_targets=num_targets)
    outputs = partial(_outputs, logits_fn, eot_samples)

    def score(logits, y, target):
        loss = losses.targeted_dlr if logits.shape[-1] >= 4 else losses.targeted_margin
        labels, targets = (jnp.broadcast_to(label, len(logits)) for label in (y, target))
        return loss(logits, labels, targets), jnp.argmax(logits, -1) != y

    def attack_one(x, y, key):
        targets, at = likeliest_wrong(outputs(x, key).mean(0), y, num_targets, ranks)
        return ascend(x, y, targets, fold_in_each(key, at))

    ascend = partial(
        _ascend_one, outputs, score, eps=eps, norm=norm, num_steps=num_steps, rho=rho
    )  # fmt: skip
    return jax.vmap(attack_one)(x, y, example_keys(key, x.shape[0]))


def likeliest_wrong(
    logits: Float[Array, " k"],
    label: Int[Array, ""],
    num_targets: int,
    ranks: Sequence[int] | Int[Array, " r"] | None = None,
) -> tuple[Int[Array, " r"], Int[Array, " r"]]:
    """The wrong classes by falling logit, [K], [] -> ([R], [R]), and their ranks, from 2 on.

    There are min(num_targets, K-1) of them, or the ones of the given ranks.
    """
    wrong = jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits)
    order = jnp.argsort(-wrong)[: len(logits) - 1]
    default = np.arange(2, 2 + min(num_targets, len(order)))
    at = jnp.asarray(default if ranks is None else ranks)
    return order[jnp.clip(at - 2, 0, len(order) - 1)], at


def checkpoints(num_steps: int) -> list[int]:
    """The steps, counted from 1, after which the step size is looked at: 22, 41, … 99 of 100."""
    period, shrink, least = (max(share * num_steps // 100, 1) for share in (22, 3, 6))
    steps = [period]
    while steps[-1] + (period := max(period - shrink, least)) <= num_steps:
        steps.append(steps[-1] + period)
    return steps


def radii(num_steps: int) -> list[tuple[int, bool, bool]]:
    """For each evaluation in l1: the radius in eps, whether its ball is new, whether to check.

    The radii are 3, 2 and 1 for 30, 30 and 40 % of the steps; each ball is entered at the best
    point of the one before, which is evaluated again, and checked every 25th part of its steps.
    """
    evaluations = []
    wider = 3 * num_steps // 10
    for multiple, length in ((3, wider), (2, wider), (1, num_steps - 2 * wider)):
        period = max(4 * length // 100, 1)
        if length:
            evaluations.append((multiple, True, False))
        evaluations += [(multiple, False, i % period == 0) for i in range(1, length + 1)]
    return evaluations


class _Peak(NamedTuple):
    """The point of largest loss in this run, where the search goes back to."""

    x: Float[Array, "h w c"]
    value: Float[Array, ""]
    gradient: Float[Array, "h w c"]

    def updated(self, x, value, gradient) -> "_Peak":
        higher = value > self.value
        return jax.tree.map(partial(jnp.where, higher), _Peak(x, value, gradient), self)


def _outputs(logits_fn, eot_samples, x, key) -> Float[Array, "s k"]:
    """The logits of one example, in one row or in one for each draw of a randomised network."""
    if eot_samples is None:
        return logits_fn(x[None])
    return jax.vmap(lambda k: logits_fn(x[None], k)[0])(jax.random.split(key, eot_samples))


def _ascend_one(outputs, score, x, y, targets, keys, *, eps, norm, num_steps, rho):
    """The best point of one run for each of the targets and keys [R], for one example [H,W,C]."""
    climb = (
        partial(_climb_sparsely, eps=eps, num_steps=num_steps)
        if norm == "l1"
        else partial(_climb, eps=eps, norm=norm, num_steps=num_steps, rho=rho)
    )

    def run(found, target_and_key):
        target, key = target_and_key

        @partial(jax.value_and_grad, has_aux=True)
        def measure(x_adv, key):
            values, hits = score(outputs(x_adv, key), y, target)
            return values.mean(), hits.mean() > 0.5

        return climb(measure, x, found, *jax.random.split(key)), None

    nothing = Best(x, jnp.asarray(-jnp.inf, x.dtype), jnp.asarray(False))
    found, _ = jax.lax.scan(run, nothing, (targets, keys))
    return found.x


class _State(NamedTuple):
    x: Float[Array, "h w c"]
    previous: Float[Array, "h w c"]
    value: Float[Array, ""]
    gradient: Float[Array, "h w c"]
    step_size: Float[Array, ""]
    found: Best
    peak: _Peak
    # Since the last checkpoint: steps that raised the loss, whether it halved, its largest loss.
    num_raised: Int[Array, ""]
    halved: Bool[Array, ""]
    checked_value: Float[Array, ""]


def _climb(measure, x, found, start_key, key, *, eps, norm, num_steps, rho) -> Best:
    """One run in linf or l2; measure(x_adv, key) -> ((value, hit), gradient)."""
    gradient_share = np.full(num_steps, _GRADIENT_SHARE, np.float32)
    gradient_share[0] = 1.0
    steps = checkpoints(num_steps)
    period = np.zeros(num_steps, np.int32)
    period[np.array(steps) - 1] = np.diff([0, *steps])

    def inside(x_adv):
        return norms.project_to_ball_and_box(x_adv, x, eps, norm)

    def step(state, at):
        share, period, key = at
        ahead = inside(state.x + state.step_size * norms.steepest(state.gradient, norm))
        x_adv = inside(
            state.x + share * (ahead - state.x) + (1 - share) * (state.x - state.previous)
        )
        (value, hit), gradient = measure(x_adv, key)
        gradient = jnp.nan_to_num(gradient)
        peak = state.peak.updated(x_adv, value, gradient)
        num_raised = state.num_raised + (value > state.value)

        checked = period > 0
        stuck = (num_raised <= rho * period) | (~state.halved & (peak.value <= state.checked_value))
        halve = checked & stuck
        return _State(
            x=jnp.where(halve, peak.x, x_adv),
            previous=state.x,
            value=value,
            gradient=jnp.where(halve, peak.gradient, gradient),
            step_size=jnp.where(halve, state.step_size / 2, state.step_size),
            found=state.found.updated(x_adv, value, hit),
            peak=peak,
            num_raised=jnp.where(checked, 0, num_raised),
            halved=jnp.where(checked, stuck, state.halved),
            checked_value=jnp.where(checked, peak.value, state.checked_value),
        ), None

    start = inside(x + norms.random_on_sphere(start_key, x.shape, eps, norm))
    (value, hit), gradient = measure(start, key)
    gradient = jnp.nan_to_num(gradient)
    lowest = jnp.full_like(value, -jnp.inf)
    peak = _Peak(start, lowest, gradient).updated(start, value, gradient)
    state = _State(
        x=start,
        previous=start,
        value=value,
        gradient=gradient,
        step_size=jnp.asarray(2.0 * eps, x.dtype),
        found=found.updated(start, value, hit),
        peak=peak,
        num_raised=jnp.asarray(0),
        halved=jnp.asarray(True),
        checked_value=peak.value,
    )
    step_keys = fold_in_each(key, jnp.arange(num_steps))
    state, _ = jax.lax.scan(step, state, (gradient_share, period, step_keys))
    return state.found


class _SparseState(NamedTuple):
    x: Float[Array, "h w c"]
    gradient: Float[Array, "h w c"]
    step_size: Float[Array, ""]
    found: Best
    peak: _Peak
    # At the last checkpoint, pixels in which the peak differed from x.
    num_changed: Int[Array, ""]


def _climb_sparsely(measure, x, found, start_key, key, *, eps, num_steps) -> Best:
    """One run in l1, through larger balls, by steps on fewer and fewer pixels; see `_climb`.

    A step moves two thirds as many pixels as the peak has changed, evenly (rounded down, so that
    two become one; in the reference two stay two). At a checkpoint where the peak has become
    sparser, the search goes back to it and to the longest step, the radius; at others the step is
    divided by 1.5, down to a tenth of the radius (arXiv 2103.01208, alg. 1).
    """

    def step(state, at):
        multiple, enters, checked, key = at
        radius = multiple * eps
        ahead = state.x + state.step_size * _even_step(state.gradient, 2 * state.num_changed // 3)
        x_adv = norms.project_to_ball_and_box(
            jnp.where(enters, state.peak.x, ahead), x, radius, "l1"
        )
        (value, hit), gradient = measure(x_adv, key)
        gradient = jnp.nan_to_num(gradient)
        lowest = _Peak(x_adv, jnp.full_like(value, -jnp.inf), gradient)
        peak = jax.tree.map(partial(jnp.where, enters), lowest, state.peak)
        peak = peak.updated(x_adv, value, gradient)

        num_changed = (peak.x != x).sum()
        sparser = checked & (num_changed < 0.95 * state.num_changed)
        shorter = jnp.maximum(state.step_size / 1.5, radius / 10)
        inside = multiple == 1
        return _SparseState(
            x=jnp.where(sparser, peak.x, x_adv),
            gradient=jnp.where(sparser, peak.gradient, gradient),
            step_size=jnp.where(
                enters | sparser, radius, jnp.where(checked, shorter, state.step_size)
            ),
            found=state.found.updated(x_adv, jnp.where(inside, value, -jnp.inf), hit & inside),
            peak=peak,
            num_changed=jnp.where(enters | checked, num_changed, state.num_changed),
        ), None

    multiples, enters, checked = map(np.array, zip(*radii(num_steps), strict=True))
    start = _Peak(x + jax.random.normal(start_key, x.shape), found.value, jnp.zeros_like(x))
    state = _SparseState(
        start.x, start.gradient, jnp.asarray(eps, x.dtype), found, start, jnp.asarray(0)
    )
    step_keys = fold_in_each(key, jnp.arange(len(multiples)))
    state, _ = jax.lax.scan(step, state, (multiples, enters, checked, step_keys))
    return state.found


def _even_step(gradient, num_pixels) -> Float[Array, "h w c"]:
    """The signs of the pixels of largest gradient, that many or one (and ties), of l1 norm 1."""
    slope = jnp.abs(gradient)
    least = jnp.sort(slope, axis=None)[gradient.size - jnp.maximum(num_pixels, 1)]
    signs = jnp.where(slope >= least, jnp.sign(gradient), 0.0)
    return signs / jnp.maximum(jnp.abs(signs).sum(), 1.0)


def _check(eps, rho, eot_samples, **counts) -> None:
    check_lengths(eps=eps)
    check_counts(**counts, **({} if eot_samples is None else {"eot_samples": eot_samples}))
    check_shares(rho=rho)
