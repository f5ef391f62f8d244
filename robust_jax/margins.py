"""Input-space margins to first order: how far an example is from where the network changes class.

Distances are in pixel units ([0,1]) of the threat norm, negative where another class wins. They
are exact for a linear network.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_jax._front import compiled
from robust_jax.attacks import Norm
from robust_jax.types import Images, Labels, LogitsFn, PerExample

# A gradient of a smaller norm counts as none, and then the boundary is this far away.
_FLAT = 1e-12
_FAR = 1e12


@compiled
def first_order(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    *,
    norm: Norm = "linf",
    num_boundaries: int | None = None,
) -> PerExample:
    """min_{j≠y} (z_y - z_j) / ‖∇_x (z_y - z_j)‖_q, the least of `boundary_distances` -> [B]."""
    distances = boundary_distances(logits_fn, x, y, norm=norm, num_boundaries=num_boundaries)
    return distances.min(-1)


@compiled
def boundary_distances(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    *,
    norm: Norm = "linf",
    num_boundaries: int | None = None,
) -> Float[Array, "b n"]:
    """(z_y - z_j) / ‖∇_x (z_y - z_j)‖_q for n classes j ≠ y, q dual to norm (arXiv 1907.11780).

    [B,H,W,C], [B] -> [B,n], the classes in falling order of their logits: the num_boundaries
    first ones, or all K-1. Costs a forward and n backward passes. ±1e12 where the gradient
    vanishes. Raises ValueError for an unknown norm or num_boundaries outside 1…K-1.
    """
    if norm not in _DUAL_NORM:
        raise ValueError(f"norm must be one of {', '.join(_DUAL_NORM)}, not {norm!r}")
    logits, pull_back = jax.vjp(logits_fn, x)
    num_classes = logits.shape[-1]
    n = num_classes - 1 if num_boundaries is None else num_boundaries
    if not 1 <= n < num_classes:
        raise ValueError(f"num_boundaries must be in 1…{num_classes - 1}, not {num_boundaries!r}")
    label = jax.nn.one_hot(y, num_classes, dtype=logits.dtype)
    _, nearest = jax.lax.top_k(jnp.where(label == 1, -jnp.inf, logits), n)
    differences = label[:, None] - jax.nn.one_hot(nearest, num_classes, dtype=logits.dtype)
    gaps = (differences * logits[:, None]).sum(-1)
    gradients = jax.vmap(lambda d: pull_back(d)[0], in_axes=1, out_axes=1)(differences)
    slopes = _DUAL_NORM[norm](gradients.reshape(*gaps.shape, -1))
    steep = slopes > _FLAT
    return jnp.where(steep, gaps / jnp.where(steep, slopes, 1.0), _FAR * jnp.sign(gaps))


def truncate(distances: Float[Array, "b n"], tau: float) -> PerExample:
    """ψ(m/τ) in (0, 1), with ψ(u) = 1/(1 + e^u) and m the smooth minimum of the distances -> [B].

    m = -τ log Σ_j exp(-m_j/τ) is below the least distance by τ log n at most. ψ falls strictly, and
    flattens out on both sides: neither a safe example nor a hopeless one pulls. Our reading of
    arXiv 1907.11780. A hard minimum would not do: its kink where two classes tie holds the
    minimiser there, so that cross-entropy + λψ would not be Fisher-consistent.
    """
    if isinstance(tau, int | float) and not tau > 0:
        raise ValueError(f"tau must be above 0, not {tau!r} (pixels are in [0,1])")
    return jax.nn.sigmoid(jax.nn.logsumexp(-distances / tau, -1))


def _l2(gradients: Float[Array, "b n p"]) -> Float[Array, "b n"]:
    # Kept off 0, where the square root has no derivative.
    return jnp.sqrt(jnp.maximum((gradients**2).sum(-1), _FLAT**2))


_DUAL_NORM: Mapping[str, Callable] = {
    "linf": lambda gradients: jnp.abs(gradients).sum(-1),
    "l2": _l2,
    "l1": lambda gradients: jnp.abs(gradients).max(-1),
}
