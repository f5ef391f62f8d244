"""Geometry of the threat models, for one example: norms, projections, steps and random starts.

A perturbation has the image's shape [H,W,C] and pixel units ([0,1]).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Norm = Literal["linf", "l2", "l1"]
Perturbation = Float[Array, "h w c"]
Scalar = Float[Array, ""]

# The largest inner product with a perturbation of norm 1 is the size in this norm.
DUAL: Mapping[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}

# Keeps a division by a vanishing norm finite; far below any gradient norm float32 can hold.
_TINY = 1e-30


def size(delta: Perturbation, norm: Norm) -> Scalar:
    """The norm of a perturbation, in pixel units."""
    check(norm)
    # Not of jnp.abs: XLA's CPU backend takes ten times as long to reduce what it is fused with.
    if norm == "linf":
        return jnp.maximum(delta.max(), -delta.min())
    if norm == "l1":
        return jnp.where(delta < 0, -delta, delta).sum()
    return jnp.sqrt((delta**2).sum())


def project(delta: Perturbation, eps: float | Scalar, norm: Norm) -> Perturbation:
    """The nearest perturbation (in l2) whose norm is at most eps (l1: Duchi et al. 2008)."""
    check(norm)
    if norm == "linf":
        return jnp.clip(delta, -eps, eps)
    if norm == "l1":
        return _shrink(delta, jnp.full_like(delta, jnp.inf), eps)
    return delta * jnp.minimum(1.0, eps / jnp.maximum(size(delta, norm), _TINY))


def project_to_ball_and_box(
    x_adv: Perturbation, x: Perturbation, eps: float | Scalar, norm: Norm
) -> Perturbation:
    """x_adv moved into the eps-ball around x, then into [0,1]; for l1 to the nearest point of both.

    Clipping moves each pixel towards x, which is in the box, so it never leaves the ball. In l1
    that would throw a part of eps away, which other pixels could use (arXiv 2103.01208).
    """
    delta = x_adv - x
    if norm == "l1":
        delta = _shrink(delta, jnp.where(delta > 0, 1 - x, x), eps)
    else:
        delta = project(delta, eps, norm)
    return add(x, delta)


def add(x: Perturbation, delta: Perturbation) -> Perturbation:
    """x + delta within [0,1], each pixel rounded towards x, so that no norm of the change grows.

    Rounded to the nearest, pixels near 1 would leave a linf ball of 1/255 by 7e-6 of its radius.
    """
    moved = x + delta
    # The next number towards x: moved·eps is between one and two of the steps there.
    nearer = moved - moved * (0.6 * jnp.finfo(moved.dtype).eps * jnp.sign(delta))
    return jnp.clip(jnp.where(jnp.abs(moved - x) > jnp.abs(delta), nearer, moved), 0.0, 1.0)


def steepest(gradient: Perturbation, norm: Norm) -> Perturbation:
    """The direction of norm 1 with the largest inner product with the gradient (0 for 0)."""
    check(norm)
    if norm == "linf":
        return jnp.sign(gradient)
    if norm == "l1":
        first = jnp.arange(gradient.size).reshape(gradient.shape) == jnp.argmax(jnp.abs(gradient))
        return jnp.where(first, jnp.sign(gradient), 0.0)
    # Scaled by the largest entry first, so that squares neither underflow nor overflow.
    gradient = gradient / jnp.maximum(size(gradient, "linf"), _TINY)
    return gradient / jnp.maximum(size(gradient, norm), _TINY)


def steepest_step(
    x: Perturbation, gradient: Perturbation, length: float | Scalar, norm: Norm
) -> Perturbation:
    """The change of x of norm `length` with the largest inner product with the gradient.

    In l1 it keeps to [0,1] too: pixels of the largest gradient first, each as far as its wall
    (arXiv 2103.01208, prop. 2.2). The steepest direction would spend it all on one pixel.
    """
    if norm == "l1":
        room = jnp.where(gradient > 0, 1 - x, x)
        return jnp.sign(gradient) * fill(length, jnp.abs(gradient), room)
    return length * steepest(gradient, norm)


def fill(amount: float | Scalar, priority: Perturbation, room: Perturbation) -> Perturbation:
    """The amount handed out in order of falling priority, to each pixel as much as it has room."""
    places = jnp.arange(room.size)
    _, places, sorted_room = jax.lax.sort((-priority.ravel(), places, room.ravel()), num_keys=1)
    before = jnp.cumsum(sorted_room) - sorted_room
    handed_out = jnp.clip(amount - before, 0.0, sorted_room)
    return jax.lax.sort((places, handed_out), num_keys=1)[1].reshape(room.shape)


def random_in_ball(
    key: Key[Array, ""], shape: tuple[int, ...], eps: float | Scalar, norm: Norm
) -> Perturbation:
    """A perturbation drawn uniformly from the ball of radius eps."""
    check(norm)
    if norm == "linf":
        return eps * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    if norm == "l1":  # shares of a sum of exponential variables, one of them left out
        noise_key, rest_key = jax.random.split(key)
        noise = jax.random.laplace(noise_key, shape)
        return eps * (noise / (size(noise, norm) + jax.random.exponential(rest_key)))
    direction_key, radius_key = jax.random.split(key)
    direction = steepest(jax.random.normal(direction_key, shape), norm)
    return eps * direction * jax.random.uniform(radius_key) ** (1 / direction.size)


def random_on_sphere(
    key: Key[Array, ""], shape: tuple[int, ...], eps: float | Scalar, norm: Norm
) -> Perturbation:
    """A perturbation of norm eps: uniform, Gaussian (l2) or Laplace noise (l1), rescaled to it."""
    check(norm)
    draws: Mapping[str, Callable] = {
        "linf": partial(jax.random.uniform, minval=-1.0),
        "l2": jax.random.normal,
        "l1": jax.random.laplace,
    }
    noise = draws[norm](key, shape)
    return eps * (noise / jnp.maximum(size(noise, norm), _TINY))


def check(norm: str) -> None:
    """Raises ValueError for a norm that is not one of these."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {norm!r}")


def _shrink(delta: Perturbation, room: Perturbation, eps: float | Scalar) -> Perturbation:
    """The nearest perturbation of l1 norm at most eps in which no pixel exceeds its room.

    Pixel i keeps min(max(|δ_i| - λ, 0), room_i), for the λ ≥ 0 at which that is eps in all: a root
    of a falling function made of straight pieces, found among their sorted ends.
    """
    wanted = jnp.abs(delta)
    # A pixel begins to shrink at the one λ and is gone at the other.
    ends = jnp.stack([jnp.maximum(wanted - room, 0), wanted]).ravel()
    turns = jnp.repeat(jnp.array([1.0, -1.0]), wanted.size)
    ends, turns = jax.lax.sort((ends, turns), num_keys=1)
    shrinking = jnp.cumsum(turns)
    lost = shrinking * jnp.diff(ends, append=ends[-1:])
    # Added up from the end, where nothing is left, so that a small eps is met exactly.
    kept = jnp.cumsum(lost[::-1])[::-1]
    at = jnp.maximum((kept > eps).sum() - 1, 0)
    root = ends[at] + (kept[at] - eps) / jnp.maximum(shrinking[at], 1)
    root = jnp.where(kept[at] > eps, root, 0)
    shrunk = jnp.sign(delta) * jnp.clip(wanted - root, 0, room)
    within = eps * (1 - 4e-6)  # the size is a rounded sum of many pixels
    return shrunk * jnp.minimum(1.0, within / jnp.maximum(size(shrunk, "l1"), _TINY))
