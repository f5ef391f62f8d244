"""Fast adaptive boundary attack (FAB): the misclassified point nearest to x.

Written for one example and lifted over the batch by a single jax.vmap. Source: arXiv 1907.02044.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from robust_jax import _checks
from robust_jax._front import compiled
from robust_jax._precision import length_in, wide, wide_dtype
from robust_jax.attacks._best import Best, likeliest_wrong, value_dtype
from robust_jax.attacks._perturbations import tiny
from robust_jax.attacks._success import succeeds
from robust_jax.attacks.norms import Norm, ThreatModel, threat_model
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn


class _Settings(NamedTuple):
    """How FAB searches; see `fab`."""

    norm: ThreatModel
    eps: Length
    num_steps: int
    num_targets: int | None
    ranks: Sequence[int] | Int[Array, " r"] | None
    num_restarts: int
    random_start: bool
    alpha_max: float
    eta: float
    beta: float

    def checked(self, dtype) -> "_Settings":
        """The settings for examples of a dtype."""
        _checks.known_lengths(eps=self.eps, infinite=True)
        _checks.counts(num_steps=self.num_steps, num_restarts=self.num_restarts)
        if self.num_targets is not None:
            _checks.counts(num_targets=self.num_targets)
        _checks.shares(alpha_max=self.alpha_max, beta=self.beta)
        if not self.eta >= 1:
            raise ValueError(f"eta must be at least 1, not {self.eta!r}")
        return self._replace(eps=length_in(self.eps, dtype))


@compiled
def fab(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length = jnp.inf,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_targets: int | None = 9,
    ranks: Sequence[int] | Int[Array, " r"] | None = None,
    num_restarts: int = 1,
    random_start: bool = False,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    targets: Labels | None = None,
) -> Images:
    """The nearest misclassified point in [0,1] that is no farther than eps.

    Each step projects the current point and x onto the linearised decision boundary within the
    box, stretches both moves by eta and mixes the results, with a share of at most alpha_max for x.
    A misclassified point is kept if it is the nearest so far; the next step starts from a share
    beta of the way to it from x.

    Args:
        logits_fn, x, key, norm: As in `pgd`.
        y: Labels [B].
        eps: The largest distance, in pixel units.
        num_steps: Steps for each target and restart, of one gradient each, or K without targets.
        num_targets: How many of the likeliest wrong classes FAB-T aims at in turn; all of them if
            there are fewer. None is the original attack, which steps to the nearest of all
            boundaries.
        ranks: The ranks of the classes to aim at instead; 2 is the likeliest wrong class.
        num_restarts: Runs towards each target. The first starts at x, the others at a random point
            half as far away as eps or as the nearest point so far.
        random_start: Whether the first run starts at a random point too.
        alpha_max, eta, beta: See above.
        targets: Classes [B] to reach instead of leaving y; num_targets and ranks are then ignored.

    Returns:
        [B,...]: x itself where nothing was found. `attacks.is_adversarial` and `attacks.distances`
        give success and distance. Derivatives with respect to x and weights are 0.

    Raises:
        ValueError: eps is negative, a count below 1, alpha_max or beta outside (0,1], eta below 1,
            or the norm unknown or without `to_boundary`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.3, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.fab(logits_fn, x, y, jax.random.key(0), norm="l2")
        >>> attacks.distances(x, x_adv, norm="l2")
        Array([0.14], dtype=float32)

    Reference:
        Croce & Hein 2020, arXiv 1907.02044.
    """
    # No gradient flows back through the search.
    x, y = jax.lax.stop_gradient(jnp.asarray(x)), jnp.asarray(y)
    threat = threat_model(norm, needs="to_boundary")
    settings = _Settings(
        threat,
        eps,
        num_steps,
        num_targets,
        ranks,
        num_restarts,
        random_start,
        alpha_max,
        eta,
        beta,
    ).checked(x.dtype)

    def search_one(x, y, key, target):
        return _search_one(lambda x: logits_fn(x[None])[0], x, y, key, target, settings)

    targets = None if targets is None else jnp.asarray(targets)
    return jax.vmap(search_one)(x, y, example_keys(key, len(x)), targets)


def _search_one(logits_of, x, y, key, own_target, settings: _Settings):
    """The nearest misclassified point to one x [...], or x itself."""
    norm, eps, num_steps, num_targets, ranks, num_restarts, random_start, *_ = settings
    logits = logits_of(x)
    boundary_to = _boundaries(logits_of, y, own_target, settings)

    def distance(x_adv):
        return norm.size(x_adv - x)

    def run(best, target_and_numbers):
        target, rank, restart = target_and_numbers

        def step(state, _):
            x_adv, best = state
            value, gradient = jax.lax.stop_gradient(boundary_to(target, x_adv))
            x_adv = _mixed(x_adv, x, value, gradient, settings)
            wrong = succeeds(logits_of(x_adv), y, own_target)
            hit = wrong & (distance(x_adv) <= eps)
            near = jnp.where(hit, -distance(x_adv), -jnp.inf).astype(value_dtype(x))
            best = best.updated(x_adv, near, hit)
            return (jnp.where(wrong, x + settings.beta * (x_adv - x), x_adv), best), None

        # The diagonal of the box bounds the radius where eps does not.
        nearest = jnp.minimum(eps, -best.value.astype(x.dtype))
        radius = jnp.minimum(nearest, norm.size(jnp.ones_like(x))) / 2
        run_key = jax.random.fold_in(jax.random.fold_in(key, rank), restart)
        noise = norm.random_on_sphere(run_key, x, radius)
        at_random = (restart > 0) | bool(random_start)
        start = jnp.where(at_random, jnp.clip(x + noise, 0.0, 1.0), x)
        (_, best), _ = jax.lax.scan(step, (start, best), length=num_steps)
        return best, None

    if own_target is not None:
        aims, at = own_target[None], jnp.zeros(1, jnp.int32)
    elif num_targets is None:
        aims, at = y[None], jnp.zeros(1, jnp.int32)  # unused
    else:
        aims, at = likeliest_wrong(logits, y, num_targets, ranks)
    runs = (
        jnp.repeat(aims, num_restarts),
        jnp.repeat(at, num_restarts),
        jnp.tile(jnp.arange(num_restarts), len(aims)),
    )
    wrong = succeeds(logits, y, own_target)
    best = Best(x, jnp.where(wrong, 0.0, -jnp.inf).astype(value_dtype(x)), wrong)
    best, _ = jax.lax.scan(run, best, runs)
    return best.x


def _boundaries(logits_of, y, own_target, settings: _Settings) -> Callable:
    """boundary_to(target, x_adv): z_t - z_y and its gradient, for the target or the nearest class.

    If the caller gives targets, which have to win, z_y is the largest other logit instead.
    """

    def to_target(target, x_adv):
        def gap(x_adv):
            logits = logits_of(x_adv)  # called once, for a single backward pass
            is_target = jnp.arange(len(logits), dtype=target.dtype) == target
            others = jnp.where(is_target, -jnp.inf, logits)
            return logits[target] - (logits[y] if own_target is None else others.max())

        return jax.value_and_grad(gap)(x_adv)

    def to_nearest(_, x_adv):
        logits, pull = jax.vjp(logits_of, x_adv)
        identity = jnp.eye(len(logits), dtype=logits.dtype)
        (gradients,) = jax.vmap(pull)(identity - identity[y])
        gaps = logits - logits[y]
        dual = jax.vmap(settings.norm.dual_size)(wide(gradients)).astype(wide_dtype(gaps.dtype))
        far = jnp.abs(wide(gaps)) / jnp.maximum(dual, tiny(dual.dtype))
        nearest = jnp.argmin(jnp.where(jnp.arange(len(logits), dtype=y.dtype) == y, jnp.inf, far))
        return gaps[nearest], gradients[nearest]

    return to_nearest if settings.num_targets is None and own_target is None else to_target


def _mixed(x_adv, x, value, gradient, settings: _Settings):
    """The next point, from both projections onto a linearised boundary."""
    norm = settings.norm
    assert norm.to_boundary is not None
    # An infinite entry would put the linearised boundary at x itself; the others lead away.
    gradient = jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0)
    # The select keeps XLA's CPU backend from summing the products in a slow way.
    change = jnp.where(gradient == 0, 0.0, gradient * (x - x_adv)).sum()
    value = value.astype(value_dtype(x))
    on = norm.to_boundary(x_adv, value, gradient)
    from_x = norm.to_boundary(x, value + change.astype(value.dtype), gradient)
    least = max(1e-8, tiny(x.dtype))
    size_on, size_from_x = (jnp.maximum(norm.size(delta), least) for delta in (on, from_x))
    share = jnp.minimum(size_on / (size_on + size_from_x), settings.alpha_max)
    eta = settings.eta
    x_adv = (1 - share) * (x_adv + eta * on) + share * (x + eta * from_x)
    return jnp.clip(jnp.nan_to_num(x_adv), 0.0, 1.0)
