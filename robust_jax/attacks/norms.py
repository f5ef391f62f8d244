"""Geometry of the threat models, for one example: norms, projections, steps and random starts.

A perturbation has the image's shape [H,W,C] and pixel units ([0,1]).
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Norm = Literal["linf", "l2"]
Perturbation = Float[Array, "h w c"]
Scalar = Float[Array, ""]

# Keeps a division by a vanishing norm finite; far below any gradient norm float32 can hold.
_TINY = 1e-30


def size(delta: Perturbation, norm: Norm) -> Scalar:
    """The norm of a perturbation, in pixel units."""
    check(norm)
    return jnp.abs(delta).max() if norm == "linf" else jnp.sqrt((delta**2).sum())


def project(delta: Perturbation, eps: float | Scalar, norm: Norm) -> Perturbation:
    """The nearest perturbation (in l2) whose norm is at most eps."""
    check(norm)
    if norm == "linf":
        return jnp.clip(delta, -eps, eps)
    return delta * jnp.minimum(1.0, eps / jnp.maximum(size(delta, norm), _TINY))


def project_to_ball_and_box(
    x_adv: Perturbation, x: Perturbation, eps: float | Scalar, norm: Norm
) -> Perturbation:
    """x_adv moved into the eps-ball around x, then into [0,1].

    Clipping moves each pixel towards x, which is in the box, so it never leaves the ball.
    """
    return jnp.clip(x + project(x_adv - x, eps, norm), 0.0, 1.0)


def steepest(gradient: Perturbation, norm: Norm) -> Perturbation:
    """The direction of norm 1 with the largest inner product with the gradient (0 for 0)."""
    check(norm)
    if norm == "linf":
        return jnp.sign(gradient)
    # Scaled by the largest entry first, so that squares neither underflow nor overflow.
    gradient = gradient / jnp.maximum(jnp.abs(gradient).max(), _TINY)
    return gradient / jnp.maximum(size(gradient, norm), _TINY)


def random_in_ball(
    key: Key[Array, ""], shape: tuple[int, ...], eps: float | Scalar, norm: Norm
) -> Perturbation:
    """A perturbation drawn uniformly from the ball of radius eps."""
    check(norm)
    if norm == "linf":
        return eps * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    direction_key, radius_key = jax.random.split(key)
    direction = steepest(jax.random.normal(direction_key, shape), norm)
    return eps * direction * jax.random.uniform(radius_key) ** (1 / direction.size)


def random_on_sphere(
    key: Key[Array, ""], shape: tuple[int, ...], eps: float | Scalar, norm: Norm
) -> Perturbation:
    """A perturbation of norm eps: uniform noise (linf) or Gaussian noise (l2), rescaled to it."""
    check(norm)
    draw = jax.random.normal if norm == "l2" else partial(jax.random.uniform, minval=-1.0)
    noise = draw(key, shape)
    return eps * (noise / jnp.maximum(size(noise, norm), _TINY))


def check(norm: str) -> None:
    """Raises ValueError for a norm that is not one of these."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {norm!r}")
