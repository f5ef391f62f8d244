"""Noise of a given size: the baselines that any attack has to beat.

Each is written for one example and lifted over the batch by a single jax.vmap.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import length_in
from robust_jax.attacks._best import Best, Goal
from robust_jax.attacks._success import Criterion
from robust_jax.attacks.norms import Norm, ThreatModel, threat_model
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn


@compiled
def uniform_noise(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_samples: int = 1,
    loss: Callable = losses.cross_entropy,
    criterion: Criterion | None = None,
) -> Images:
    """The worst of num_samples points drawn uniformly from the eps-ball, moved into [0,1].

    Args:
        logits_fn, x, y, key, eps, norm, loss, criterion: As in `pgd`.
        num_samples: How many draws.

    Returns:
        [B,...]: the best draw: success counts first, then the largest loss. x itself is not one of
        the draws.

    Raises:
        ValueError: eps is negative, num_samples below 1, or the norm unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.full((1, 2), 0.3), jnp.array([0])
        >>> x_adv = attacks.uniform_noise(logits_fn, x, y, jax.random.key(0), eps=0.1)
        >>> bool((attacks.distances(x, x_adv) <= 0.1).all())
        True
    """
    threat, goal = threat_model(norm), Goal(loss, criterion=criterion)
    draw = threat.random_in_ball
    return _worst_draw(draw, logits_fn, x, y, key, eps, threat, num_samples, goal)


@compiled
def gaussian_noise(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_samples: int = 1,
    loss: Callable = losses.cross_entropy,
    criterion: Criterion | None = None,
) -> Images:
    """The worst of num_samples draws of Gaussian noise whose typical norm is eps.

    The standard deviation of each of n pixels is eps/√n in l2. In l1 it is such that the norm has
    the mean eps, in linf such that the norm, the largest of n draws, has the median eps. Draws are
    projected onto the ball, then moved into [0,1].

    Args:
        logits_fn, x, y, key, eps, norm, loss, criterion: As in `pgd`.
        num_samples: How many draws.

    Returns:
        [B,...], as in `uniform_noise`.

    Raises:
        ValueError: As `uniform_noise` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.full((1, 2), 0.3), jnp.array([0])
        >>> x_adv = attacks.gaussian_noise(logits_fn, x, y, jax.random.key(0), eps=0.1, norm="l2")
        >>> bool((attacks.distances(x, x_adv, norm="l2") <= 0.1).all())
        True
    """
    threat, goal = threat_model(norm), Goal(loss, criterion=criterion)

    def draw(key, x, eps):
        return jax.random.normal(key, x.shape, x.dtype) * (eps / threat.gaussian_size(x.size))

    return _worst_draw(draw, logits_fn, x, y, key, eps, threat, num_samples, goal)


def _worst_draw(
    draw, logits_fn, x, y, key, eps: Length, threat: ThreatModel, num_samples: int, goal: Goal
) -> Images:
    _checks.known_lengths(eps=eps)
    _checks.counts(num_samples=num_samples)
    x, y = jnp.asarray(x), jnp.asarray(y)
    eps = length_in(eps, x.dtype)

    def attack_one(x, reference, key):
        def sample(best, number):
            moved = x + draw(jax.random.fold_in(key, number), x, eps)
            x_adv = threat.project_to_ball_and_box(moved, x, eps)
            return best.updated(x_adv, *goal.at(logits_fn, x_adv, reference)), None

        best, _ = jax.lax.scan(sample, Best.nothing(x), jnp.arange(num_samples))
        return best.x

    return jax.vmap(attack_one)(x, goal.reference(y), example_keys(key, len(x)))
