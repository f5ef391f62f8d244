"""The input Jacobian J = ∇_x f(x) of each example: its norms, exact or estimated, and spectrum.

fn maps [B,H,W,C] to [B,K], each example on its own: logits, or probabilities with
`probabilities(logits_fn)`. Norms are in units of fn's output per pixel unit ([0,1]).
chunk_size bounds how many examples are in memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_jax._front import compiled
from robust_jax.batches import in_chunks
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, PerExample

Fn = Callable[[Float[Array, "b h w c"]], Float[Array, "b k"]]


class Estimate(NamedTuple):
    """An estimated norm [B] and the standard error [B] of that estimate."""

    norm: PerExample
    standard_error: PerExample


def probabilities(logits_fn: Fn) -> Fn:
    """The softmax of logits_fn, [B,H,W,C] -> [B,K]."""
    return lambda x: jax.nn.softmax(logits_fn(x))


@compiled
def jacobian(fn: Fn, x: Images, *, chunk_size: int | None = None) -> Float[Array, "b k h w c"]:
    """The exact Jacobian of each example, [B,H,W,C] -> [B,K,H,W,C].

    Costs a forward and K backward passes an example, or H·W·C forward-mode passes where an image
    has fewer pixel values than there are outputs; all those of chunk_size examples at once.
    """
    return in_chunks(lambda one: _jacobian_one(fn, one), x, chunk_size)


@compiled
def frobenius_norm(fn: Fn, x: Images, *, chunk_size: int | None = None) -> PerExample:
    """Exact ‖J‖_F, [B,H,W,C] -> [B].

    Costs a `jacobian` an example; at most chunk_size of them are held at a time.
    """
    return in_chunks(lambda one: jnp.sqrt((_jacobian_one(fn, one) ** 2).sum()), x, chunk_size)


@compiled
def singular_values(fn: Fn, x: Images, *, chunk_size: int | None = None) -> Float[Array, "b n"]:
    """All singular values of J, largest first, [B,H,W,C] -> [B,min(K,H·W·C)].

    Their squares sum to ‖J‖_F², and the first is the spectral norm, exactly. Costs a `jacobian`
    and an SVD of [K,H·W·C] an example; at most chunk_size of them are held at a time.
    """

    def singular_values_one(one):
        full = _jacobian_one(fn, one)
        return jnp.linalg.svd(full.reshape(full.shape[0], -1), compute_uv=False)

    return in_chunks(singular_values_one, x, chunk_size)


def squared_frobenius_samples(
    fn: Fn, x: Images, key: KeyOrKeys, *, num_projections: int
) -> Float[Array, "n b"]:
    """Unbiased samples ‖Jv‖² of ‖J‖_F², v ~ N(0, I) -> [num_projections, B].

    Differentiable in the network's parameters, so it serves as a regulariser too. Costs
    num_projections forward-mode passes (jax.jvp) of the whole batch, one at a time; its gradient
    keeps the activations of all. Raises ValueError for num_projections below 1.
    """
    if num_projections < 1:
        raise ValueError(f"num_projections must be at least 1, not {num_projections!r}")
    keys = example_keys(key, x.shape[0])

    def sample(i):
        tangent = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), x.shape[1:]))(keys)
        return (jax.jvp(fn, (x,), (tangent.astype(x.dtype),))[1] ** 2).sum(-1)

    return jax.lax.map(sample, jnp.arange(num_projections))


@compiled
def frobenius_norm_estimate(
    fn: Fn, x: Images, key: KeyOrKeys, *, num_projections: int, chunk_size: int | None = None
) -> Estimate:
    """‖J‖_F from num_projections ≥ 2 random projections, with its standard error; both [B].

    E‖Jv‖² = ‖J‖_F² for v ~ N(0, I) (Hutchinson; as a regulariser: arXiv 1908.02729). The error
    of the square is carried to the norm by the delta method. Costs num_projections forward-mode
    passes an example, chunk_size examples at a time. Raises ValueError for num_projections below 2.
    """
    if num_projections < 2:
        raise ValueError(
            f"num_projections must be at least 2 for a standard error, not {num_projections!r}"
        )

    def samples_one(one, key):
        return squared_frobenius_samples(fn, one[None], key[None], num_projections=num_projections)

    keys = example_keys(key, x.shape[0])
    squares = in_chunks(lambda args: samples_one(*args)[:, 0], (x, keys), chunk_size)
    norm = jnp.sqrt(squares.mean(-1))
    error_of_square = squares.std(-1, ddof=1) / jnp.sqrt(num_projections)
    return Estimate(norm, error_of_square / jnp.maximum(2 * norm, jnp.finfo(norm.dtype).tiny))


@compiled
def spectral_norm(
    fn: Fn,
    x: Images,
    key: KeyOrKeys,
    *,
    num_iterations: int = 20,
    chunk_size: int | None = None,
) -> PerExample:
    """The largest singular value of J by power iteration on JᵀJ -> [B].

    A lower bound that converges from below, at the rate (σ₂/σ₁)² an iteration. Costs num_iterations
    forward-mode and backward passes an example, chunk_size examples at a time. Raises ValueError
    for num_iterations below 1.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, not {num_iterations!r}")

    def spectral_norm_one(one, key):
        def f(image):
            return fn(image[None])[0]

        _, vjp = jax.vjp(f, one)

        def unit(v):
            return v / jnp.maximum(jnp.linalg.norm(v.ravel()), jnp.finfo(v.dtype).tiny)

        def iterate(_, v):
            return unit(vjp(jax.jvp(f, (one,), (v,))[1])[0])

        v = unit(jax.random.normal(key, one.shape, one.dtype))
        v = jax.lax.fori_loop(0, num_iterations, iterate, v)
        return jnp.linalg.norm(jax.jvp(f, (one,), (v,))[1])

    keys = example_keys(key, x.shape[0])
    return in_chunks(lambda args: spectral_norm_one(*args), (x, keys), chunk_size)


def _jacobian_one(fn: Fn, image: Float[Array, "h w c"]) -> Float[Array, "k h w c"]:
    def f(image):
        return fn(image[None])[0]

    num_outputs = jax.eval_shape(f, image).size
    return (jax.jacrev if num_outputs <= image.size else jax.jacfwd)(f)(image)
