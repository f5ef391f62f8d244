"""Sums, steps and thresholds over the pixels of one example, which the norms are made of."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax._precision import wide, wide_dtype
from robust_jax.types import Array, Length, Perturbation, Scalar


def tiny(dtype: Any) -> float:
    """A floor that keeps division by a vanishing norm finite, far below the norms a dtype holds."""
    return max(1e-30, float(jnp.finfo(dtype).tiny))


def finite(gradient: Perturbation) -> Perturbation:
    """The gradient with NaN as 0 and entries of at most 1e30 (or what the dtype holds).

    In float32 these are safe to sum and to divide by; with the largest float, the sum of two would
    be infinite and the inverse 0.
    """
    most = min(1e30, float(jnp.finfo(gradient.dtype).max))
    return jnp.clip(jnp.where(jnp.isnan(gradient), 0, gradient), -most, most)


def add(x: Perturbation, delta: Perturbation) -> Perturbation:
    """x + delta within [0,1], each pixel rounded towards x, so that no norm of the change grows.

    Rounding to nearest would take pixels near 1 out of a linf ball of 1/255 by 7e-6 of its radius.
    """
    moved = _rounded(x + delta)
    # The next float towards x: moved·eps is between one and two ulps.
    step = 0.6 * float(jnp.finfo(moved.dtype).eps)
    nearer = moved - moved * (step * jnp.sign(delta))
    too_far = jnp.abs(wide(moved) - wide(x)) > jnp.abs(wide(delta))
    return jnp.clip(jnp.where(too_far, nearer, moved), 0.0, 1.0)


def _rounded(x: Perturbation) -> Perturbation:
    """x rounded to its 16 bits, since XLA would otherwise keep the sum in float32."""
    known = jnp.finfo(x.dtype)
    return x if known.bits >= 32 else jax.lax.reduce_precision(x, known.nexp, known.nmant)


def room_in(x: Perturbation, direction: Perturbation) -> Perturbation:
    """How far each pixel may go in a direction before it meets a wall of [0,1]."""
    return jnp.where(direction > 0, 1 - x, x)


def summing(fn: Callable) -> Callable:
    """fn, which sums over pixels, in at least float32; the result has the last argument's dtype."""

    @wraps(fn)
    def call(*args, **keywords):
        dtype = args[-1].dtype
        return fn(*(jnp.asarray(a, wide_dtype(dtype)) for a in args), **keywords).astype(dtype)

    return call


@summing
def fill(amount: Length, priority: Perturbation, room: Perturbation) -> Perturbation:
    """The amount handed out in order of decreasing priority, to each pixel up to its room."""
    threshold = largest_where(lambda t: jnp.where(priority >= t, room, 0).sum() >= amount, room)
    first = priority > threshold
    rest = amount - jnp.where(first, room, 0).sum()
    ties = jnp.where(priority == threshold, room, 0)
    before = (jnp.cumsum(ties.ravel()) - ties.ravel()).reshape(ties.shape)
    return jnp.where(first, room, jnp.clip(rest - before, 0, ties))


def largest_where(holds: Callable[[Scalar], Array], like: Array) -> Scalar:
    """The largest number up to which holds is true; 0 if there is none.

    The search goes bit by bit, with one pass over the pixels for each: a sort takes several times
    as long. like: an array of the number's type. Negative numbers are not considered.
    """
    width = 8 * like.dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    masks = np.array([1 << bit for bit in range(width - 2, -1, -1)], unsigned)

    def refine(found, mask):
        number = jax.lax.bitcast_convert_type(found | mask, like.dtype)
        return jnp.where(jnp.isfinite(number) & holds(number), found | mask, found), None

    found, _ = jax.lax.scan(refine, jnp.zeros((), unsigned), masks)
    return jax.lax.bitcast_convert_type(found, like.dtype)
