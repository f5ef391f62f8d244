"""Projected gradient attacks: PGD and its special cases FGSM, BIM and MIM.

Each is written for one example and lifted over the batch by a single jax.vmap.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import length_in, wide, wide_dtype
from robust_jax.attacks._best import Best, Goal
from robust_jax.attacks._perturbations import finite, tiny
from robust_jax.attacks._success import Criterion
from robust_jax.attacks.norms import L1, Norm, ThreatModel, threat_model
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn, Reference


class _Settings(NamedTuple):
    """How PGD climbs; see `pgd`."""

    norm: ThreatModel
    eps: Length
    step_size: Length
    num_steps: int
    num_restarts: int = 1
    random_start: bool = False
    momentum: float = 0.0
    keep_best: bool = True


@compiled
def pgd(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: Length | None = None,
    num_restarts: int = 1,
    random_start: bool = True,
    momentum: float = 0.0,
    keep_best: bool = True,
    loss: Callable = losses.cross_entropy,
    targets: Labels | None = None,
    criterion: Criterion | None = None,
) -> Images:
    """Projected gradient ascent on the loss within the eps-ball and [0,1].

    Args:
        logits_fn: The network, [B,...] -> [B,K], independent for each example.
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B], or whatever `loss` compares logits with, [B,...].
        key: One key, folded with each example's place in the batch, or a key per example [B]. The
            same example with the same key gives the same result in any batch.
        eps: The radius of the ball, in pixel units.
        norm: A name ("linf", "l2", "l1") or a `norms.ThreatModel`. In l1 a step moves the pixels
            of largest gradient, each at most to 0 or 1.
        num_steps: Gradients for each restart.
        step_size: In pixel units; 2.5·eps/num_steps by default.
        num_restarts: How many runs; the best point of all of them is returned.
        random_start: Whether a run starts at a random point of the ball instead of x.
        momentum: How much of the last step's direction is kept, in [0,1].
        keep_best: Whether to return the best point visited. The last one, as in adversarial
            training, saves a forward pass.
        loss: loss(logits, y) -> [B], to be maximised.
        targets: Classes [B] to reach instead of leaving y: the loss towards them is minimised.
        criterion: criterion(logits, y) -> [B], what counts as success; y is the targets if there
            are any. The default is misclassification, or classification as the target; use
            `attacks.never` for a loss that compares outputs, such as losses.kl.

    Returns:
        [B,...]: the best point visited: success counts first, then the loss. With keep_best it is
        never worse than the start.

    Raises:
        ValueError: eps or step_size is negative, a count below 1, momentum outside [0,1], the norm
            unknown, or keep_best=False with several restarts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> weights = jax.random.normal(jax.random.key(0), (12, 3))
        >>> logits_fn = lambda x: x.reshape(len(x), -1) @ weights
        >>> x = jax.random.uniform(jax.random.key(1), (4, 2, 2, 3))
        >>> y = logits_fn(x).argmax(-1)
        >>> x_adv = attacks.pgd(logits_fn, x, y, jax.random.key(2), eps=0.5)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True, True, True, True]

    Reference:
        Madry et al. 2018, arXiv 1706.06083.
    """
    if num_restarts > 1 and not keep_best:
        raise ValueError("num_restarts above 1 needs keep_best=True: restarts are compared")
    if step_size is None:
        _checks.counts(num_steps=num_steps)
        step_size = 2.5 * eps / num_steps
    settings = _Settings(
        threat_model(norm),
        eps,
        step_size,
        num_steps,
        num_restarts,
        random_start,
        momentum,
        keep_best,
    )
    return _climb(logits_fn, x, y, key, settings, Goal(loss, targets, criterion))


@compiled
def fgsm(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    loss: Callable = losses.cross_entropy,
    targets: Labels | None = None,
    criterion: Criterion | None = None,
) -> Images:
    """Fast gradient sign method: one step of length eps from x.

    Args:
        logits_fn, x, y, eps, norm, loss, targets, criterion: As in `pgd`.
        key: Unused, since nothing is drawn.

    Returns:
        [B,...]: the better of x and the point one step away.

    Raises:
        ValueError: As `pgd` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4]]), jnp.array([0])
        >>> attacks.fgsm(logits_fn, x, y, jax.random.key(0), eps=0.1)
        Array([[0.1, 0.3]], dtype=float32)

    Reference:
        Goodfellow et al. 2015, arXiv 1412.6572.
    """
    settings = _Settings(threat_model(norm), eps, step_size=eps, num_steps=1)
    return _climb(logits_fn, x, y, key, settings, Goal(loss, targets, criterion))


@compiled
def bim(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: Length | None = None,
    loss: Callable = losses.cross_entropy,
    targets: Labels | None = None,
    criterion: Criterion | None = None,
) -> Images:
    """Basic iterative method: PGD started at x itself.

    Args:
        logits_fn, x, y, eps, norm, loss, targets, criterion: As in `pgd`.
        key: Unused, since nothing is drawn.
        num_steps: How many gradients.
        step_size: In pixel units; eps/num_steps by default.

    Returns:
        [B,...]: the best point visited, including x.

    Raises:
        ValueError: As `pgd` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.bim(logits_fn, x, y, jax.random.key(0), eps=0.1, num_steps=5)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True]

    Reference:
        Kurakin et al. 2017, arXiv 1607.02533.
    """
    settings = _Settings(threat_model(norm), eps, _even(step_size, eps, num_steps), num_steps)
    return _climb(logits_fn, x, y, key, settings, Goal(loss, targets, criterion))


@compiled
def mim(
    logits_fn: LogitsFn,
    x: Images,
    y: Reference,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: Length | None = None,
    momentum: float = 1.0,
    loss: Callable = losses.cross_entropy,
    targets: Labels | None = None,
    criterion: Criterion | None = None,
) -> Images:
    """Momentum iterative method: steps along a decayed sum of l1-normalised gradients.

    Args:
        logits_fn, x, y, eps, norm, loss, targets, criterion: As in `pgd`.
        key: Unused, since nothing is drawn.
        num_steps: How many gradients.
        step_size: In pixel units; eps/num_steps by default.
        momentum: How much of the sum is kept at a step, in [0,1].

    Returns:
        [B,...]: the best point visited, including x.

    Raises:
        ValueError: As `pgd` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.mim(logits_fn, x, y, jax.random.key(0), eps=0.1, num_steps=5)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True]

    Reference:
        Dong et al. 2018, arXiv 1710.06081.
    """
    step_size = _even(step_size, eps, num_steps)
    settings = _Settings(threat_model(norm), eps, step_size, num_steps, momentum=momentum)
    return _climb(logits_fn, x, y, key, settings, Goal(loss, targets, criterion))


def _even(step_size, eps, num_steps):
    _checks.counts(num_steps=num_steps)
    return eps / num_steps if step_size is None else step_size


def _climb(logits_fn, x, y, key, settings: _Settings, goal: Goal) -> Images:
    _checks.known_lengths(eps=settings.eps, step_size=settings.step_size)
    _checks.counts(num_steps=settings.num_steps, num_restarts=settings.num_restarts)
    if not 0 <= settings.momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], not {settings.momentum!r}")
    x, y = jnp.asarray(x), jnp.asarray(y)
    settings = settings._replace(
        eps=length_in(settings.eps, x.dtype),
        step_size=jnp.asarray(settings.step_size, wide_dtype(x.dtype)),
    )

    def climb_one(x, reference, key):
        return _climb_one(partial(goal.at, logits_fn), x, reference, key, settings)

    return jax.vmap(climb_one)(x, goal.reference(y), example_keys(key, len(x)))


def _climb_one(score, x, reference, key, settings: _Settings):
    """The best of the runs for one example x [...]; score(x, reference) -> (value, hit)."""
    norm, eps, step_size, num_steps, num_restarts, random_start, momentum, keep_best = settings

    def run(best, key_data):
        start = x
        if random_start:
            restart_key = jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(key))
            start = norm.random_neighbour(restart_key, x, eps)

        def step(carry, _):
            x_adv, velocity, best = carry
            (value, hit), gradient = jax.value_and_grad(score, has_aux=True)(x_adv, reference)
            best = best.updated(x_adv, value, hit)
            # NaN counts as 0; if every entry is NaN, only momentum moves the point.
            gradient = wide(finite(gradient))
            gradient = gradient / jnp.maximum(L1.size(gradient), tiny(gradient.dtype))
            velocity = momentum * velocity + gradient
            move = norm.steepest_step(wide(x_adv), velocity, step_size)
            x_adv = x_adv + move.astype(x.dtype)
            return (norm.project_to_ball_and_box(x_adv, x, eps), velocity, best), None

        carry = (start, jnp.zeros_like(wide(x)), best)
        (x_adv, _, best), _ = jax.lax.scan(step, carry, length=num_steps)
        if not keep_best:
            return best._replace(x=x_adv), None
        return best.updated(x_adv, *score(x_adv, reference)), None

    # Key data, since jax_debug_key_reuse counts the keys of a scan as used twice.
    keys = jax.random.key_data(jax.random.split(key, num_restarts))
    best, _ = jax.lax.scan(run, Best.nothing(x), keys)
    return best.x
