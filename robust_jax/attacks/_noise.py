"""Noise of a given size: the baselines that any attack has to beat.

Each is written for one example and lifted over the batch by jax.vmap, once.
"""

from collections.abc import Callable, Mapping
from math import pi, sqrt
from statistics import NormalDist

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks import norms
from robust_jax.attacks._best import Best, check_counts, check_lengths
from robust_jax.attacks.norms import Norm
from robust_jax.keys import example_keys, fold_in_each
from robust_jax.types import Images, KeyOrKeys, LogitsFn

# The norm that n draws from N(0, 1) typically have: the median (linf), the root of the mean
# square (l2), the mean (l1).
_TYPICAL_SIZE: Mapping[str, Callable[[int], float]] = {
    "linf": lambda n: NormalDist().inv_cdf((1 + 0.5 ** (1 / n)) / 2),
    "l2": sqrt,
    "l1": lambda n: n * sqrt(2 / pi),
}


@compiled
def uniform_noise(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_samples: int = 1,
    loss: Callable = losses.cross_entropy,
) -> Images:
    """The worst of num_samples points drawn uniformly from the eps-ball, clipped to [0,1].

    logits_fn, x, y, key, eps: as in `pgd`; y: labels [B]. Returns [B,H,W,C]: of the draws, where
    being misclassified counts first, the one of largest loss; x itself is none of them. Raises
    ValueError for a negative eps, num_samples below 1, an unknown norm.
    """

    def draw(key, shape):
        return norms.random_in_ball(key, shape, eps, norm)

    return _worst_draw(draw, logits_fn, x, y, key, eps, norm, num_samples, loss)


@compiled
def gaussian_noise(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_samples: int = 1,
    loss: Callable = losses.cross_entropy,
) -> Images:
    """The worst of num_samples draws of Gaussian noise whose typical norm is eps.

    The deviation of each pixel is eps/√n in l2, for n = H·W·C; in linf that for which the largest
    of n draws has the median eps. What is drawn beyond the ball is projected onto it, then clipped
    to [0,1]. Everything else as in `uniform_noise`.
    """
    norms.check(norm)

    def draw(key, shape):
        noise = jax.random.normal(key, shape)
        return noise * (eps / _TYPICAL_SIZE[norm](noise.size))

    return _worst_draw(draw, logits_fn, x, y, key, eps, norm, num_samples, loss)


def _worst_draw(draw, logits_fn, x, y, key, eps, norm, num_samples, loss) -> Images:
    check_lengths(eps=eps)
    check_counts(num_samples=num_samples)

    def attack_one(x, y, key):
        def sample(best, key):
            x_adv = norms.project_to_ball_and_box(x + draw(key, x.shape), x, eps, norm)
            logits = logits_fn(x_adv[None])
            hit = jnp.argmax(logits[0]) != y
            return best.updated(x_adv, loss(logits, y[None])[0], hit), None

        nothing = Best(x, jnp.asarray(-jnp.inf, x.dtype), jnp.asarray(False))
        best, _ = jax.lax.scan(sample, nothing, fold_in_each(key, jnp.arange(num_samples)))
        return best.x

    return jax.vmap(attack_one)(x, y, example_keys(key, x.shape[0]))
