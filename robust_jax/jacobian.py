"""The input Jacobian J = ∇_x f(x) of each example: its norms, exact or estimated, and spectrum.

fn maps x [B,...] to [B,K], each example on its own: logits, or probabilities with
`probabilities(logits_fn)`. Norms are in units of fn's output per pixel unit ([0,1]); 16-bit values
are summed and returned in float32. chunk_size bounds how many examples are in memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from robust_jax import _checks
from robust_jax._front import compiled
from robust_jax._network import has_forward_mode
from robust_jax._precision import wide
from robust_jax.attacks.norms import Norm, threat_model
from robust_jax.batches import in_chunks
from robust_jax.keys import example_keys
from robust_jax.types import Array, Images, KeyOrKeys, Labels, LogitsFn, PerExample

__all__ = [
    "Estimate",
    "frobenius_norm",
    "frobenius_norm_estimate",
    "jacobian",
    "probabilities",
    "relative_slope",
    "singular_values",
    "spectral_norm",
    "squared_frobenius_samples",
]


def __dir__() -> list[str]:
    return __all__


class Estimate(NamedTuple):
    """An estimated norm [B] and the standard error [B] of that estimate."""

    norm: PerExample
    standard_error: PerExample


def probabilities(logits_fn: LogitsFn) -> LogitsFn:
    """The softmax of a network, for taking its Jacobians.

    Its Jacobians are exact however confident the network is. Those of jax.nn.softmax are not: where
    the largest probability is rounded to 1, its row would be 0.

    Args:
        logits_fn: The network, [B,...] -> [B,K].

    Returns:
        A function [B,...] -> [B,K].

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> jacobian.probabilities(lambda x: 0 * x)(jnp.ones((1, 2)))
        Array([[0.5, 0.5]], dtype=float32)
    """

    def probabilities_of(x):
        logits = logits_fn(x)
        top = jnp.take_along_axis(logits, logits.argmax(-1)[:, None], axis=-1)
        return jax.nn.softmax(logits - top)

    return probabilities_of


@compiled
def jacobian(fn: LogitsFn, x: Images, *, chunk_size: int | None = None) -> Float[Array, "b k ..."]:
    """The exact Jacobian of each example.

    Costs a forward and K backward passes per example, or one forward-mode pass per pixel value if
    there are fewer of them than outputs. All passes of chunk_size examples run at once.

    Args:
        fn: [B,...] -> [B,K].
        x: [B,...].
        chunk_size: How many examples are in memory at a time; None: all.

    Returns:
        [B,K,...].

    Raises:
        ValueError: x is not a batch of floats, is empty or holds NaN, or fn does not return one
            array.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> jacobian.jacobian(lambda x: x**2, jnp.array([[1.0, 3.0]]))
        Array([[[2., 0.],
                [0., 6.]]], dtype=float32)
    """
    return in_chunks(lambda one: _jacobian_one(fn, one), x, chunk_size)


@compiled
def frobenius_norm(fn: LogitsFn, x: Images, *, chunk_size: int | None = None) -> PerExample:
    """Exact Frobenius norm ‖J‖_F.

    Costs a `jacobian` per example; at most chunk_size of them are held at a time.

    Args:
        fn: [B,...] -> [B,K].
        x: [B,...].
        chunk_size: How many examples are in memory at a time; None: all.

    Returns:
        [B].

    Raises:
        ValueError: As `jacobian` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> jacobian.frobenius_norm(lambda x: x**2, jnp.array([[1.5, 2.0]]))
        Array([5.], dtype=float32)

    Reference:
        Jin et al. 2020, arXiv 2011.13538, claims that entropy maximisation shrinks ‖∇f‖; our
        reading is that this norm, of logits or of probabilities, is meant.
    """

    def norm_one(one):
        return _euclidean(_jacobian_one(fn, one))

    return in_chunks(norm_one, x, chunk_size)


@compiled
def singular_values(
    fn: LogitsFn, x: Images, *, chunk_size: int | None = None
) -> Float[Array, "b n"]:
    """All singular values of J, largest first.

    Their squares sum to ‖J‖_F², and the first is exactly the spectral norm. Costs a `jacobian` and
    its SVD per example; at most chunk_size of them are held at a time.

    Args:
        fn: [B,...] -> [B,K].
        x: [B,...].
        chunk_size: How many examples are in memory at a time; None: all.

    Returns:
        [B,N], N the smaller of K and the number of an example's pixel values.

    Raises:
        ValueError: As `jacobian` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> jacobian.singular_values(lambda x: x**2, jnp.array([[1.0, 3.0]]))
        Array([[6., 2.]], dtype=float32)
    """

    def singular_values_one(one):
        full = wide(_jacobian_one(fn, one))
        return jnp.linalg.svd(full.reshape(full.shape[0], -1), compute_uv=False)

    return in_chunks(singular_values_one, x, chunk_size)


@compiled
def squared_frobenius_samples(
    fn: LogitsFn, x: Images, key: KeyOrKeys, *, num_projections: int
) -> Float[Array, "b n"]:
    """Unbiased samples ‖Jv‖² of ‖J‖_F², v ~ N(0, I).

    Differentiable in the network's parameters, so they also serve as a regulariser. Costs
    num_projections forward-mode passes (jax.jvp) of the whole batch, one at a time; the gradient
    keeps all their activations.

    Args:
        fn: [B,...] -> [B,K].
        x: [B,...].
        key: One key, folded with each example's place in the batch, or a key per example [B].
        num_projections: The number of samples per example.

    Returns:
        [B,num_projections].

    Raises:
        ValueError: num_projections is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> x = jnp.array([[1.5, 2.0]])
        >>> samples = jacobian.squared_frobenius_samples(
        ...     lambda x: x**2, x, jax.random.key(0), num_projections=10_000
        ... )
        >>> bool(abs(samples.mean() - 25) < 1)
        True

    Reference:
        Hutchinson 1989; as a regulariser Hoffman et al. 2019, arXiv 1908.02729, who project the
        outputs instead.
    """
    _checks.counts(num_projections=num_projections)
    keys = example_keys(key, x.shape[0])

    def sample(i):
        def draw(key):
            return jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype)

        return (wide(jax.jvp(fn, (x,), (jax.vmap(draw)(keys),))[1]) ** 2).sum(-1)

    return jax.lax.map(sample, jnp.arange(num_projections)).T


@compiled
def frobenius_norm_estimate(
    fn: LogitsFn, x: Images, key: KeyOrKeys, *, num_projections: int, chunk_size: int | None = None
) -> Estimate:
    """‖J‖_F from random projections, with its standard error.

    E‖Jv‖² = ‖J‖_F² for v ~ N(0, I). The error of the square is carried to the norm by the delta
    method. Costs num_projections forward-mode passes per example, chunk_size examples at a time.

    Args:
        fn: [B,...] -> [B,K].
        x: [B,...].
        key: One key, folded with each example's place in the batch, or a key per example [B].
        num_projections: At least 2.
        chunk_size: How many examples are in memory at a time; None: all.

    Returns:
        The norm and its standard error, both [B].

    Raises:
        ValueError: num_projections is below 2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> x = jnp.array([[1.5, 2.0]])
        >>> norm, error = jacobian.frobenius_norm_estimate(
        ...     lambda x: x**2, x, jax.random.key(0), num_projections=1000
        ... )
        >>> bool(abs(norm[0] - 5) < 3 * error[0])
        True

    Reference:
        Hutchinson 1989; as a regulariser Hoffman et al. 2019, arXiv 1908.02729.
    """
    if num_projections < 2:
        raise ValueError(
            f"num_projections must be at least 2 for a standard error, not {num_projections!r}"
        )

    def samples_one(one, key):
        return squared_frobenius_samples(fn, one[None], key[None], num_projections=num_projections)

    keys = example_keys(key, x.shape[0])
    squares = in_chunks(lambda args: samples_one(*args)[0], (x, keys), chunk_size)
    norm = jnp.sqrt(squares.mean(-1))
    error_of_square = squares.std(-1, ddof=1) / num_projections**0.5
    return Estimate(norm, error_of_square / jnp.maximum(2 * norm, jnp.finfo(norm.dtype).tiny))


@compiled
def spectral_norm(
    fn: LogitsFn,
    x: Images,
    key: KeyOrKeys,
    *,
    num_iterations: int = 20,
    chunk_size: int | None = None,
) -> PerExample:
    """The largest singular value of J by power iteration on JᵀJ.

    A lower bound that converges from below: each iteration shrinks its error by (σ₂/σ₁)⁴. Costs
    num_iterations forward-mode and backward passes per example, chunk_size examples at a time.

    Args:
        fn: [B,...] -> [B,K].
        x: [B,...].
        key: One key, folded with each example's place in the batch, or a key per example [B]; it
            draws the starting point.
        num_iterations: Steps of the power iteration.
        chunk_size: How many examples are in memory at a time; None: all.

    Returns:
        [B], in units of fn's output per pixel unit.

    Raises:
        ValueError: num_iterations is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> jacobian.spectral_norm(lambda x: x**2, jnp.array([[1.0, 3.0]]), jax.random.key(0))
        Array([6.], dtype=float32)

    Reference:
        Jin et al. 2020, arXiv 2011.13538, claims that entropy maximisation shrinks ‖∇f‖; our
        reading is that this norm, of logits or of probabilities, is meant.
    """
    _checks.counts(num_iterations=num_iterations)

    def spectral_norm_one(one, key):
        def f(image):
            return fn(image[None])[0]

        _, vjp = jax.vjp(f, one)

        def forwards(v):
            return jax.jvp(f, (one,), (v,))[1]

        def iterate(_, v):
            return _unit(vjp(_unit(forwards(v)))[0])

        v = _unit(jax.random.normal(key, one.shape, one.dtype))
        v = jax.lax.fori_loop(0, num_iterations, iterate, v)
        return _euclidean(forwards(v))

    keys = example_keys(key, x.shape[0])
    return in_chunks(lambda args: spectral_norm_one(*args), (x, keys), chunk_size)


@compiled
def relative_slope(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    *,
    norm: Norm = "l2",
    chunk_size: int | None = None,
) -> PerExample:
    """max_{j≠y} ‖∇_x (z_y - z_j)‖_q / abs(z_y - z_j), which no scale of the logits changes.

    q is dual to the norm. For a correctly classified example it is the inverse of the first-order
    margin, so it does not shrink merely because the logits do. Multiplying the logits by a constant
    changes ‖J‖ but no decision. Costs a `jacobian` per example; at most chunk_size of them are held
    at a time.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x: Examples [B,...].
        y: Labels [B].
        norm: A name or a record.
        chunk_size: How many examples are in memory at a time; None: all.

    Returns:
        [B], per pixel unit of the norm; infinite where two logits are equal and their gradients
        are not.

    Raises:
        ValueError: The norm is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import jacobian
        >>> logits_fn = lambda x: 7 * jnp.stack([3 * x[:, 0] + 4 * x[:, 1], 0 * x[:, 0]], -1)
        >>> x, y = jnp.array([[0.2, 0.1]]), jnp.array([0])
        >>> jacobian.relative_slope(logits_fn, x, y)  # 1 / 0.2, whatever the 7
        Array([5.], dtype=float32)

    Reference:
        Ours, for the claim of arXiv 2011.13538 that uncertainty shrinks the Jacobian.
    """
    threat = threat_model(norm)

    def slope_one(args):
        one, label = args
        rows, logits = wide(_jacobian_one(logits_fn, one)), wide(logits_fn(one[None])[0])
        slopes = jax.vmap(threat.slope)(rows[label][None] - rows).astype(logits.dtype)
        gaps = jnp.abs(logits[label] - logits)
        ratios = slopes / jnp.where(gaps > 0, gaps, 1)
        ratios = jnp.where((gaps == 0) & (slopes > 0), jnp.inf, ratios)
        # The label's own slope is 0 up to rounding.
        return jnp.where(jnp.arange(len(gaps), dtype=label.dtype) == label, 0, ratios).max()

    return in_chunks(slope_one, (x, jnp.asarray(y)), chunk_size)


def _scaled(v: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """v over its largest entry, so that no square under- or overflows, and that entry."""
    v = wide(v)
    largest = jax.lax.stop_gradient(jnp.abs(v).max())
    largest = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return v / largest, largest


def _euclidean(v: Float[Array, "..."]) -> Float[Array, ""]:
    scaled, largest = _scaled(v)
    return largest * jnp.sqrt((scaled**2).sum())


def _unit(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """v over its norm, in v's dtype; 0 if v is 0."""
    scaled, _ = _scaled(v)
    return (scaled / jnp.maximum(jnp.sqrt((scaled**2).sum()), 1)).astype(v.dtype)


def _jacobian_one(fn: LogitsFn, one: Float[Array, "..."]) -> Float[Array, "k ..."]:
    def f(one):
        return fn(one[None])[0]

    is_wide = jax.eval_shape(f, one).size > one.size
    return (jax.jacfwd if is_wide and has_forward_mode(f, one) else jax.jacrev)(f)(one)
