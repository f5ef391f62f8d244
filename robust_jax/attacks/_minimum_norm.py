"""Attacks that look for the nearest misclassified point: Carlini-Wagner in l2 and DeepFool.

Both are written for one example and lifted over the batch by a single jax.vmap. They draw nothing,
and take a key only so that all attacks are called alike.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import length_in, wide
from robust_jax.attacks._best import Best, Goal, likeliest_wrong, value_dtype
from robust_jax.attacks._perturbations import finite, tiny
from robust_jax.attacks._success import succeeds
from robust_jax.attacks.norms import L2, ThreatModel, threat_model
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn

# How far tanh reaches beyond the box. This keeps pixels at or near 0 and 1 away from its ends,
# where hardly any gradient is left to move them.
_MARGIN = 0.1
# How far DeepFool always steps beyond a linearised boundary, in pixel units, or the resolution of
# the dtype if that is larger. The overshoot is only a share of the step: rounding may remove it,
# and then the point would not move.
_NUDGE = 1e-5


class _CarliniWagner(NamedTuple):
    """How Carlini and Wagner's attack descends; see `carlini_wagner`."""

    eps: Length
    num_steps: int
    num_searches: int
    learning_rate: float
    initial_c: float
    kappa: float

    def checked(self, dtype) -> "_CarliniWagner":
        """The settings for examples of a dtype."""
        _checks.known_lengths(eps=self.eps, infinite=True)
        _checks.counts(num_steps=self.num_steps, num_searches=self.num_searches)
        for name in ("learning_rate", "initial_c"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        if not self.kappa >= 0:
            raise ValueError(f"kappa must not be negative, not {self.kappa!r}")
        return self._replace(eps=length_in(self.eps, dtype))


class _DeepFool(NamedTuple):
    """How DeepFool steps; see `deepfool`."""

    norm: ThreatModel
    eps: Length
    num_steps: int
    num_targets: int | None
    overshoot: float

    def checked(self, dtype) -> "_DeepFool":
        """The settings for examples of a dtype."""
        _checks.known_lengths(eps=self.eps, infinite=True)
        _checks.counts(num_steps=self.num_steps)
        if self.num_targets is not None:
            _checks.counts(num_targets=self.num_targets)
        if not self.overshoot >= 0:
            raise ValueError(f"overshoot must not be negative, not {self.overshoot!r}")
        return self._replace(eps=length_in(self.eps, dtype))


@compiled
def carlini_wagner(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length = jnp.inf,
    norm: Literal["l2"] = "l2",
    num_steps: int = 1000,
    num_searches: int = 9,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    kappa: float = 0.0,
    targets: Labels | None = None,
) -> Images:
    """The nearest misclassified point in [0,1] that is no farther than eps in l2.

    Adam minimises ‖x_adv - x‖² + c·max(z_y - max_{j≠y} z_j, -kappa) over w, where x_adv is tanh(w)
    rescaled to the box, starting at x for each of num_searches values of c. Each c is ten times the
    last until one succeeds, then halfway between failure and success. Our reading: tanh reaches a
    tenth beyond the box and x_adv is clipped to the box with a straight-through gradient, so that
    pixels at 0 and 1 move too.

    Args:
        logits_fn, x: As in `pgd`.
        y: Labels [B].
        key: Unused, since nothing is drawn.
        eps: The largest distance, in pixel units.
        norm: "l2".
        num_steps: Gradients for each c.
        num_searches: How many values of c are tried.
        learning_rate: Adam's learning rate.
        initial_c: The first c.
        kappa: The least margin, in units of the logits, by which a point has to be misclassified.
        targets: Classes [B] to reach instead of leaving y.

    Returns:
        [B,...]: x itself where nothing was found. `attacks.is_adversarial` and `attacks.distances`
        give success and distance.

    Raises:
        ValueError: eps or kappa is negative, a count below 1, learning_rate or initial_c not
            positive, or the norm not l2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.3, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.carlini_wagner(logits_fn, x, y, jax.random.key(0), num_steps=100)
        >>> attacks.distances(x, x_adv, norm="l2")
        Array([0.14], dtype=float32)

    Reference:
        Carlini & Wagner 2017, arXiv 1608.04644, §VI.
    """
    if norm != L2.name and norm is not L2:
        raise ValueError(f"norm must be l2, not {norm!r}")
    x, y = jnp.asarray(x), jnp.asarray(y)
    settings = _CarliniWagner(
        eps, num_steps, num_searches, learning_rate, initial_c, kappa
    ).checked(x.dtype)
    goal = Goal(losses.margin_loss, targets)

    def judge(x_adv, reference):
        """The margin by which x_adv meets the goal, and whether it is large enough."""
        excess, hit = goal.at(logits_fn, x_adv, reference)
        return excess, hit & (excess >= kappa)

    def search_one(x, reference):
        return _descend_one(judge, x, reference, settings)

    return jax.vmap(search_one)(x, goal.reference(y))


@compiled
def deepfool(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length = jnp.inf,
    norm: Literal["linf", "l2"] | ThreatModel = "linf",
    num_steps: int = 50,
    num_targets: int | None = 9,
    overshoot: float = 0.02,
) -> Images:
    """A nearby misclassified point in [0,1] that is no farther than eps.

    Each step goes to the nearest linearised decision boundary and a share overshoot beyond it, and
    is clipped to the box. Steps repeat until the label is lost.

    Args:
        logits_fn, x: As in `pgd`.
        y: Labels [B].
        key: Unused, since nothing is drawn.
        eps: The largest distance, in pixel units.
        norm: "linf", "l2" or a record with `dense_steps`; in l1 a step would move a single pixel.
        num_steps: The most steps to take, each of one gradient per target.
        num_targets: How many of the likeliest wrong classes to consider; None for all of them.
        overshoot: See above.

    Returns:
        [B,...]: x itself where nothing was found. `attacks.is_adversarial` and `attacks.distances`
        give success and distance. Derivatives with respect to x and weights are 0.

    Raises:
        ValueError: eps or overshoot is negative, a count below 1, or the norm unknown or without
            `dense_steps`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.3, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.deepfool(logits_fn, x, y, jax.random.key(0), norm="l2")
        >>> attacks.distances(x, x_adv, norm="l2")
        Array([0.14], dtype=float32)

    Reference:
        Moosavi-Dezfooli et al. 2016, arXiv 1511.04599.
    """
    # No gradient flows back through the search.
    x, y = jax.lax.stop_gradient(jnp.asarray(x)), jnp.asarray(y)
    threat = threat_model(norm, needs="dense_steps")
    settings = _DeepFool(threat, eps, num_steps, num_targets, overshoot).checked(x.dtype)

    def search_one(x, y):
        return _cross_one(lambda x: logits_fn(x[None])[0], x, y, settings)

    return jax.vmap(search_one)(x, y)


def _descend_one(judge, x, reference, settings: _CarliniWagner):
    """The nearest hit to one x [...] over all values of c, or x itself."""
    dtype = value_dtype(x)
    start = jnp.arctanh((2 * x.astype(dtype) - 1) / (1 + 2 * _MARGIN))

    def objective(w, c):
        free = 0.5 + (0.5 + _MARGIN) * jnp.tanh(w)
        fixed = jax.lax.stop_gradient
        x_adv = (fixed(jnp.clip(free, 0.0, 1.0)) + (free - fixed(free))).astype(x.dtype)
        excess, hit = judge(x_adv, reference)
        square = ((x_adv - x) ** 2).sum().astype(dtype)
        return square - c * jnp.minimum(excess, settings.kappa), (x_adv, hit)

    def search(state, _):
        best, c, failed, succeeded = state

        def step(state, time):
            w, moments, best, hit_any = state
            (_, (x_adv, hit)), gradient = jax.value_and_grad(objective, has_aux=True)(w, c)
            distance = L2.size(x_adv - x)
            near = hit & (distance <= settings.eps)
            value = jnp.where(near, -distance, -jnp.inf).astype(dtype)
            # An infinite entry would make Adam's second moment infinite for good.
            gradient = jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0)
            update, moments = _adam(gradient, moments, time)
            w = w - settings.learning_rate * update
            return (w, moments, best.updated(x_adv, value, near), hit_any | hit), None

        moments = jnp.zeros_like(start), jnp.zeros_like(start)
        state = (start, moments, best, jnp.asarray(False))
        times = jnp.arange(1, settings.num_steps + 1).astype(dtype)
        (_, _, best, hit_any), _ = jax.lax.scan(step, state, times)
        failed = jnp.where(hit_any, failed, c)
        succeeded = jnp.where(hit_any, c, succeeded)
        c = jnp.where(jnp.isinf(succeeded), 10 * c, (failed + succeeded) / 2)
        return (best, c, failed, succeeded), None

    hit = judge(x, reference)[1]
    best = Best(x, jnp.where(hit, 0.0, -jnp.inf).astype(dtype), hit)
    c, failed, succeeded = (jnp.asarray(c, dtype) for c in (settings.initial_c, 0.0, jnp.inf))
    state = (best, c, failed, succeeded)
    (best, _, _, _), _ = jax.lax.scan(search, state, length=settings.num_searches)
    return best.x


def _adam(gradient, moments, time):
    """Adam's step for a learning rate of 1, and its moments; times start at 1 (arXiv 1412.6980).

    Written here because optax's fails under jax_numpy_dtype_promotion=strict.
    """
    first, second = moments
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    step = first / (1 - 0.9**time) / (jnp.sqrt(second / (1 - 0.999**time)) + 1e-8)
    return step, (first, second)


def _cross_one(logits_of, x, y, settings: _DeepFool):
    """The first misclassified point on the way from one x [...], or x itself."""
    norm, eps, num_steps, num_targets, overshoot = settings
    logits = logits_of(x)
    num_classes = len(logits)
    targets, _ = likeliest_wrong(logits, y, num_targets or num_classes)
    onto = jax.nn.one_hot(targets, num_classes, dtype=logits.dtype)
    towards = onto - jax.nn.one_hot(y[None], num_classes, dtype=logits.dtype)

    def standing(state):
        i, _, wrong = state
        return (i < num_steps) & ~wrong

    def step(state):
        i, x_adv, _ = state
        logits, pull = jax.vjp(logits_of, x_adv)
        logits, (gradients,) = jax.lax.stop_gradient((logits, jax.vmap(pull)(towards)))
        gradients = finite(gradients)
        rates = jax.vmap(norm.dual_size)(wide(gradients))
        gaps = (logits[y] - logits[targets]).astype(rates.dtype)
        distances = jnp.where(rates > 0, gaps / jnp.maximum(rates, tiny(rates.dtype)), jnp.inf)
        nearest = jnp.argmin(distances)
        nudge = max(_NUDGE, float(jnp.finfo(x.dtype).eps))
        length = (1 + overshoot) * (distances[nearest] + nudge)
        # A finite length, so that a gradient of zero moves nothing.
        length = jnp.nan_to_num(length.astype(x.dtype))
        x_adv = jnp.clip(x_adv + length * norm.steepest(gradients[nearest]), 0.0, 1.0)
        return i + 1, x_adv, succeeds(logits_of(x_adv), y)

    _, x_adv, wrong = jax.lax.while_loop(standing, step, (0, x, succeeds(logits, y)))
    return jnp.where(wrong & (norm.size(x_adv - x) <= eps), x_adv, x)
