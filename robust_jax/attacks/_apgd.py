"""Auto-PGD: projected gradient ascent with momentum that picks its own step sizes.

Written for one example and lifted over the batch by a single jax.vmap. Source: arXiv 2003.01690.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import length_in
from robust_jax.attacks._best import Best, Goal, likeliest_wrong, value_dtype
from robust_jax.attacks._perturbations import finite, largest_where
from robust_jax.attacks._success import Criterion, misclassified
from robust_jax.attacks.norms import Norm, ThreatModel, threat_model
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn, Reference, Scalar

# The share of a step that follows the gradient; the rest repeats the previous step.
_GRADIENT_SHARE = 0.75


class _Settings(NamedTuple):
    """How APGD climbs; see `apgd`."""

    norm: ThreatModel
    eps: Scalar
    num_steps: int
    rho: float

    @classmethod
    def checked(cls, norm: Norm, eps: Length, num_steps: int, rho: float, dtype) -> "_Settings":
        _checks.known_lengths(eps=eps)
        _checks.counts(num_steps=num_steps)
        _checks.shares(rho=rho)
        return cls(threat_model(norm), length_in(eps, dtype), num_steps, rho)


@compiled
def apgd(
    logits_fn: LogitsFn | Callable,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_restarts: int = 1,
    rho: float = 0.75,
    loss: Callable = losses.cross_entropy,
    targets: Labels | None = None,
    criterion: Criterion | None = None,
    eot_samples: int | None = None,
) -> Images:
    """Auto-PGD on any loss within the eps-ball and [0,1].

    The step size starts at 2·eps. A check halves it, and returns the search to the point of largest
    loss, if at most a share rho of the steps raised the loss, or if the last check did not halve it
    and the largest loss has not changed since. In l1, where steps are sparse, the search first runs
    in the balls of 3·eps and 2·eps, which takes two more evaluations, and rho is not used.

    Args:
        logits_fn, x, y, key, eps, norm, loss, targets, criterion: As in `pgd`.
        num_steps: Gradient steps for each restart.
        num_restarts: How many runs; the best point of all of them is returned.
        rho: The share of steps that have to raise the loss, in (0,1].
        eot_samples: How many draws of a randomised network, logits_fn(x, key), the loss and its
            gradient are averaged over; None for logits_fn(x).

    Returns:
        [B,...]: the best point visited: success (in more than half of the draws, if there are any)
        counts first, then the loss.

    Raises:
        ValueError: eps is negative, num_steps, num_restarts or eot_samples below 1, rho outside
            (0,1], or the norm unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.apgd(logits_fn, x, y, jax.random.key(0), eps=0.1, num_steps=10)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True]

    Reference:
        Croce & Hein 2020, arXiv 2003.01690; in l1 Croce & Hein 2021, arXiv 2103.01208.
    """
    _checks.counts(num_restarts=num_restarts)
    x, y = jnp.asarray(x), jnp.asarray(y)
    settings = _Settings.checked(norm, eps, num_steps, rho, x.dtype)
    goal = Goal(loss, targets, criterion)
    outputs = _outputs(logits_fn, eot_samples)

    def score(logits, reference, _):
        references = jnp.broadcast_to(reference, (len(logits), *reference.shape))
        return goal.judged(logits, references)

    def attack_one(x, reference, key):
        runs = jnp.arange(num_restarts)
        return _climb_one(outputs, score, x, reference, (runs, runs), key, settings)

    return jax.vmap(attack_one)(x, goal.reference(y), example_keys(key, len(x)))


@compiled
def apgd_targeted(
    logits_fn: LogitsFn | Callable,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_targets: int = 9,
    ranks: Sequence[int] | Int[Array, " r"] | None = None,
    rho: float = 0.75,
    eot_samples: int | None = None,
) -> Images:
    """Auto-PGD towards the likeliest wrong classes, one run each (APGD-T).

    The loss is `losses.targeted_dlr`, or `losses.targeted_margin` with fewer than four classes, for
    which the former is not defined.

    Args:
        logits_fn, x, key, eps, norm, num_steps, rho, eot_samples: As in `apgd`.
        y: Labels [B].
        num_targets: How many wrong classes to aim at, those of largest clean logit; all of them
            if there are fewer.
        ranks: The ranks of the classes to aim at instead; 2 is the likeliest wrong class.

    Returns:
        [B,...]: the best point visited: misclassification as any class counts first, then the loss.

    Raises:
        ValueError: As `apgd` does, and for num_targets below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.apgd_targeted(logits_fn, x, y, jax.random.key(0), eps=0.1, num_steps=10)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True]

    Reference:
        Croce & Hein 2020, arXiv 2003.01690.
    """
    _checks.counts(num_targets=num_targets)
    x, y = jnp.asarray(x), jnp.asarray(y)
    settings = _Settings.checked(norm, eps, num_steps, rho, x.dtype)
    outputs = _outputs(logits_fn, eot_samples)

    def score(logits, y, target):
        loss = losses.targeted_dlr if logits.shape[-1] >= 4 else losses.targeted_margin
        labels, targets = (jnp.broadcast_to(label, len(logits)) for label in (y, target))
        return loss(logits, labels, targets), misclassified(logits, labels)

    def attack_one(x, y, key):
        # 0 is free: the keys of the runs are folded with ranks, which start at 2.
        clean = outputs(x, jax.random.fold_in(key, 0)).mean(0)
        runs = likeliest_wrong(clean, y, num_targets, ranks)
        return _climb_one(outputs, score, x, y, runs, key, settings)

    return jax.vmap(attack_one)(x, y, example_keys(key, len(x)))


def checked_steps(num_steps: int) -> list[int]:
    """The steps, counted from 1, after which the step size is checked: 22, 41, … 99 of 100.

    The checkpoints of arXiv 2003.01690, here called checks.
    """
    period, shrink, least = (max(share * num_steps // 100, 1) for share in (22, 3, 6))
    steps = [period]
    while steps[-1] + (period := max(period - shrink, least)) <= num_steps:
        steps.append(steps[-1] + period)
    return steps


def radii(num_steps: int) -> list[tuple[int, bool, bool]]:
    """The radius in eps of each evaluation in l1, whether its ball is new, whether to check.

    The radii are 3, 2 and 1 for 30, 30 and 40 % of the steps. Each ball is entered at the best
    point of the previous one, which is evaluated again, and has a check every 1/25 of its steps.
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
    """The point of largest loss in this run, to which the search returns."""

    x: Float[Array, "..."]
    value: Float[Array, ""]
    gradient: Float[Array, "..."]

    def updated(self, x, value, gradient) -> "_Peak":
        higher = value > self.value
        return jax.tree.map(partial(jnp.where, higher), _Peak(x, value, gradient), self)


def _outputs(logits_fn, eot_samples) -> Callable:
    """Returns outputs(x, key) -> [S,K], the logits of one example, one row per network draw.

    A deterministic network gives one row.
    """
    if eot_samples is None:
        return lambda x, key: logits_fn(x[None])
    _checks.counts(eot_samples=eot_samples)
    return lambda x, key: jax.vmap(lambda k: logits_fn(x[None], k)[0])(
        jax.random.split(key, eot_samples)
    )


def _climb_one(outputs, score, x, reference, runs, key, settings: _Settings):
    """The best point [...] of all runs for one example x [...].

    runs: the target of each run, [R], and the number that its key is folded with, [R].
    score(logits [S,K], reference, target) -> (values [S], hits [S]).
    """
    climb = _climb if settings.norm.dense_steps else _climb_sparsely

    def run(found, target_and_number):
        target, number = target_and_number

        @partial(jax.value_and_grad, has_aux=True)
        def measure(x_adv, key):
            values, hits = score(outputs(x_adv, key), reference, target)
            return values.mean().astype(value_dtype(x)), hits.mean() > 0.5

        start_key, key_of_steps = jax.random.split(jax.random.fold_in(key, number))
        return climb(measure, x, found, start_key, key_of_steps, settings), None

    found, _ = jax.lax.scan(run, Best.nothing(x), runs)
    return found.x


class _State(NamedTuple):
    x: Float[Array, "..."]
    previous: Float[Array, "..."]
    value: Float[Array, ""]
    gradient: Float[Array, "..."]
    step_size: Float[Array, ""]
    found: Best
    peak: _Peak
    # The steps since the last check that raised the loss, whether that check halved the step
    # size, and the largest loss at that check.
    num_raised: Int[Array, ""]
    halved: Bool[Array, ""]
    checked_value: Float[Array, ""]


def _climb(measure, x, found, start_key, key, settings: _Settings) -> Best:
    """One run with dense steps; measure(x_adv, key) -> ((value, hit), gradient)."""
    norm, eps, num_steps, rho = settings
    gradient_share = np.full(num_steps, _GRADIENT_SHARE)
    gradient_share[0] = 1.0
    checked_at = checked_steps(num_steps)
    period = np.zeros(num_steps, np.int32)
    period[np.array(checked_at) - 1] = np.diff([0, *checked_at])
    # A check halves the step size if no more than this many steps raised the loss.
    too_few = np.floor(rho * period).astype(np.int32)

    def inside(x_adv):
        return norm.project_to_ball_and_box(x_adv, x, eps)

    def step(state, at):
        step_number, share, checked, too_few = at
        ahead = inside(state.x + state.step_size * norm.steepest(state.gradient))
        x_adv = inside(
            state.x + share * (ahead - state.x) + (1 - share) * (state.x - state.previous)
        )
        (value, hit), gradient = measure(x_adv, jax.random.fold_in(key, step_number))
        gradient = finite(gradient)
        peak = state.peak.updated(x_adv, value, gradient)
        num_raised = state.num_raised + (value > state.value).astype(jnp.int32)

        stuck = (num_raised <= too_few) | (~state.halved & (peak.value <= state.checked_value))
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

    start = inside(x + norm.random_on_sphere(start_key, x, eps))
    (value, hit), gradient = measure(start, jax.random.fold_in(key, num_steps))
    gradient = finite(gradient)
    lowest = jnp.full_like(value, -jnp.inf)
    peak = _Peak(start, lowest, gradient).updated(start, value, gradient)
    state = _State(
        x=start,
        previous=start,
        value=value,
        gradient=gradient,
        step_size=2.0 * eps,
        found=found.updated(start, value, hit),
        peak=peak,
        num_raised=jnp.asarray(0, jnp.int32),
        halved=jnp.asarray(True),
        checked_value=peak.value,
    )
    # Numbers instead of keys, since jax_debug_key_reuse counts the keys of a scan as used twice.
    schedule = np.arange(num_steps), jnp.asarray(gradient_share, x.dtype), period > 0, too_few
    state, _ = jax.lax.scan(step, state, schedule)
    return state.found


class _SparseState(NamedTuple):
    x: Float[Array, "..."]
    gradient: Float[Array, "..."]
    step_size: Float[Array, ""]
    found: Best
    peak: _Peak
    # How many pixels of the peak differed from the example, at the last check or new ball.
    num_changed: Int[Array, ""]


def _climb_sparsely(measure, x, found, start_key, key, settings: _Settings) -> Best:
    """One run that starts in larger balls and moves fewer and fewer pixels; see `_climb`.

    A step moves, by equal amounts, two thirds as many pixels as the peak has changed (rounded down,
    so that two become one; in the reference two stay two). If a check finds the peak sparser, the
    search returns to it and to the longest step, the radius. Otherwise the check divides the step
    by 1.5, down to a tenth of the radius (arXiv 2103.01208, alg. 1).
    """
    norm, eps, num_steps, _ = settings

    def step(state, at):
        step_number, multiple, enters, checked = at
        radius = multiple * eps
        ahead = state.x + state.step_size * _even_step(state.gradient, 2 * state.num_changed // 3)
        x_adv = norm.project_to_ball_and_box(jnp.where(enters, state.peak.x, ahead), x, radius)
        (value, hit), gradient = measure(x_adv, jax.random.fold_in(key, step_number))
        gradient = finite(gradient)
        lowest = _Peak(x_adv, jnp.full_like(value, -jnp.inf), gradient)
        peak = jax.tree.map(partial(jnp.where, enters), lowest, state.peak)
        peak = peak.updated(x_adv, value, gradient)

        num_changed = (peak.x != x).sum(dtype=jnp.int32)
        sparser = checked & (20 * num_changed < 19 * state.num_changed)
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
    noise = jax.random.normal(start_key, x.shape, x.dtype)
    start = _Peak(x + noise, found.value, jnp.zeros_like(x))
    state = _SparseState(start.x, start.gradient, eps, found, start, jnp.asarray(0, jnp.int32))
    schedule = np.arange(len(multiples)), jnp.asarray(multiples, x.dtype), enters, checked
    state, _ = jax.lax.scan(step, state, schedule)
    return state.found


def _even_step(gradient, num_pixels) -> Float[Array, "..."]:
    """The signs of the num_pixels (at least one, and ties) largest gradients, of l1 norm 1."""
    slope = jnp.abs(gradient)
    wanted = jnp.maximum(num_pixels, 1)
    least = largest_where(lambda t: (slope >= t).sum(dtype=jnp.int32) >= wanted, slope)
    signs = jnp.where(slope >= least, jnp.sign(gradient), 0.0)
    return signs / jnp.maximum(jnp.abs(signs).sum(), 1.0)
