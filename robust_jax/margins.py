"""Margins in the input space: how far an example is from where the network changes class.

Four estimates of one quantity, [B] in pixel units of the threat norm: the distance to the nearest
point that is misclassified or, negated, from a misclassified example to the nearest that is not.
For correctly classified examples `linear` is exact, as is `first_order` on a linear network;
`minimum_norm` is never smaller in magnitude, and `lipschitz` never larger. In arXiv 1907.11780 the
minimum and the average margin are the least and the mean over the training set, measured from the
predicted class and unsigned, as in `clever`; the sign and the other estimates are ours.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robust_jax import _checks
from robust_jax._front import compiled
from robust_jax._precision import wide, wide_dtype
from robust_jax.analysis.spectra import GAINS, Layer, operator_norm
from robust_jax.attacks import Norm, ThreatModel, distances, fab, is_adversarial
from robust_jax.attacks.norms import L2, threat_model
from robust_jax.batches import in_chunks
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, Length, Logits, LogitsFn, PerExample

__all__ = [
    "boundary_distances",
    "clever",
    "first_order",
    "linear",
    "lipschitz",
    "minimum_norm",
    "truncate",
]


def __dir__() -> list[str]:
    return __all__


# The distance, in τ, assumed for a boundary that does not exist: too far to have a gradient.
_FAR = 1e12


def linear(
    weights: Float[Array | np.ndarray, "k d"],
    bias: Float[Array | np.ndarray, " k"],
    x: Images,
    y: Labels,
    *,
    norm: Norm = "linf",
) -> Float[np.ndarray, " b"]:
    """Margins of the classifier argmax(weights·x + bias), min_{j≠y} (z_y - z_j) / ‖w_y - w_j‖_q.

    q is dual to the norm; the bounds of [0,1] are ignored. It is exact where x is classified
    correctly and for two classes. Otherwise it is the distance to the furthest single boundary in
    between, which is at most the margin's magnitude. Costs B·K·D multiplications and holds K²
    differences of D weights.

    Args:
        weights: [K,D], for x flattened.
        bias: [K].
        x: Examples [B,...].
        y: Labels [B].
        norm: A name ("linf", "l2", "l1") or a `norms.ThreatModel`.

    Returns:
        [B], float64, in pixel units.

    Raises:
        ValueError: The norm is unknown.

    Example:
        >>> import numpy as np
        >>> from robust_jax import margins
        >>> weights, bias = np.array([[3.0, 4.0], [0.0, 0.0]]), np.zeros(2)
        >>> margins.linear(weights, bias, np.array([[0.2, 0.1]]), np.array([0]), norm="l2")
        array([0.2])

    Reference:
        The signed margin from the label is ours; its size from the predicted class is the margin of
        Wu & Yu 2019, arXiv 1907.11780.
    """
    rows, flat = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (weights, x))
    logits = flat @ rows.T + np.asarray(bias, np.float64)
    shaped = rows.reshape(len(rows), *x.shape[1:])
    return _over_weights(logits, y, shaped, threat_model(norm))


@compiled
def first_order(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    *,
    norm: Norm = "linf",
    num_boundaries: int | None = None,
    chunk_size: int | None = None,
) -> PerExample:
    """Margins of the linearised network, min_{j≠y} (z_y - z_j) / ‖∇_x (z_y - z_j)‖_q.

    q is dual to the norm. Costs a forward and K-1 (or num_boundaries) backward passes.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B].
        norm: A name or a record.
        num_boundaries: How many of the likeliest wrong classes to look at; None for all of them.
        chunk_size: How many examples are in memory at a time; None for all.

    Returns:
        [B], in pixel units: negative where another class wins, infinite where the gradient
        vanishes.

    Raises:
        ValueError: The norm is unknown, or num_boundaries not in 1…K-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import margins
        >>> logits_fn = lambda x: jnp.stack([3 * x[:, 0] + 4 * x[:, 1], 0 * x[:, 0]], -1)
        >>> x, y = jnp.array([[0.2, 0.1]]), jnp.array([0])
        >>> margins.first_order(logits_fn, x, y, norm="l2")
        Array([0.2], dtype=float32)

    Reference:
        Ours, as an estimate of the margin.
    """

    def nearest(x, y):
        return boundary_distances(logits_fn, x, y, norm=norm, num_boundaries=num_boundaries).min(-1)

    if chunk_size is None:
        return nearest(x, y)
    return in_chunks(lambda one: nearest(*(a[None] for a in one))[0], (x, y), chunk_size)


@compiled
def boundary_distances(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    *,
    norm: Norm = "linf",
    num_boundaries: int | None = None,
) -> Float[Array, "b n"]:
    """(z_y - z_j) / ‖∇_x (z_y - z_j)‖_q for n classes j ≠ y, q dual to the norm.

    Differentiable in the network's parameters. Costs a forward and n backward passes.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B].
        norm: A name or a record.
        num_boundaries: n; None for all K-1.

    Returns:
        [B,n], in pixel units, classes in descending order of their logits. ±inf where the gradient
        vanishes, inf for a class that the network rules out (a logit of -inf).

    Raises:
        ValueError: The norm is unknown, or num_boundaries not in 1…K-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import margins
        >>> logits_fn = lambda x: jnp.stack([3 * x[:, 0] + 4 * x[:, 1], 0 * x[:, 0]], -1)
        >>> x, y = jnp.array([[0.2, 0.1]]), jnp.array([0])
        >>> margins.boundary_distances(logits_fn, x, y, norm="l2")
        Array([[0.2]], dtype=float32)

    Reference:
        Ours; the regulariser `input_margin` is built on them.
    """
    threat = threat_model(norm)
    x, y = jnp.asarray(x), jnp.asarray(y)
    logits, pull_back = jax.vjp(logits_fn, x)
    num_classes = logits.shape[-1]
    n = num_classes - 1 if num_boundaries is None else num_boundaries
    if not 1 <= n < num_classes:
        raise ValueError(f"num_boundaries must be in 1…{num_classes - 1}, not {num_boundaries!r}")
    label = jax.nn.one_hot(y, num_classes, dtype=logits.dtype)
    others = jnp.maximum(logits, jnp.finfo(logits.dtype).min)  # a class at -inf is not the label
    _, nearest = jax.lax.top_k(jnp.where(label == 1, -jnp.inf, others), n)
    differences = label[:, None] - jax.nn.one_hot(nearest, num_classes, dtype=logits.dtype)
    of_label = jnp.take_along_axis(logits, y[:, None], -1)
    gaps = of_label - jnp.take_along_axis(logits, nearest, -1)
    gradients = jax.vmap(lambda d: pull_back(d)[0], in_axes=1, out_axes=1)(differences)
    slopes = jax.vmap(jax.vmap(threat.slope))(gradients).astype(wide_dtype(gaps.dtype))
    steep = slopes > 0
    nowhere = jnp.where(gaps == 0, 0, jnp.copysign(jnp.inf, gaps)).astype(gaps.dtype)
    distances = wide(gaps) / jnp.where(steep, slopes, 1)
    return jnp.where(steep, distances.astype(gaps.dtype), nowhere)


def truncate(boundaries: Float[Array, "b n"], tau: Length) -> PerExample:
    """ψ(m/τ), with ψ(u) = 1/(1 + e^u) and m the smooth minimum of the distances to boundaries.

    m = -τ log Σ_j exp(-m_j/τ) is below the least distance by at most τ log n. ψ is strictly
    decreasing and flat at both ends, so neither a safe example nor a hopeless one pulls. Ours: the
    regulariser of arXiv 1907.11780 is the ramp of output margins (`train.regularizers`).

    Cross-entropy + λψ is Fisher-consistent if the gradients of all differences of logits have the
    same norm, but not in general: with class probabilities .393, .364, .243, norms .64 (first
    and second class), 1.8 and .61, τ = 1 and λ = 20 the minimiser prefers the second class. A hard
    minimum fails even with equal norms: its kink where two classes tie holds the minimiser there.

    Args:
        boundaries: [B,n], in pixel units, possibly infinite (see `boundary_distances`).
        tau: In pixel units.

    Returns:
        [B], in (0, 1); finite gradients.

    Raises:
        ValueError: tau is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import margins
        >>> margins.truncate(jnp.array([[jnp.inf, 0.0]]), 0.1)
        Array([0.5], dtype=float32)

    """
    if isinstance(tau, int | float) and not tau > 0:
        raise ValueError(f"tau must be above 0, not {tau!r} (pixels are in [0,1])")
    # Infinite distances are clipped, since infinities have no derivative. The clip comes after the
    # division because XLA may fuse multiply and subtract, and then no entry equals the rounded
    # maximum.
    scaled = jnp.clip(wide(boundaries) / tau, -_FAR, _FAR)
    return jax.nn.sigmoid(jax.nn.logsumexp(-scaled, -1)).astype(boundaries.dtype)


@compiled
def minimum_norm(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    norm: Norm = "linf",
    attack: Callable = fab,
    chunk_size: int | None = None,
) -> PerExample:
    """Margins that a minimum-norm attack finds: an upper bound of their magnitude.

    Where x is misclassified, it attacks a network of two logits, "any other" and "the label", to
    reach the label. Costs two attacks per example, one of them on two classes. The points found are
    constants, so the derivative in the network's parameters is 0.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B].
        key: One key, or one for each example [B].
        norm: A name or a record.
        attack: `attacks.fab` or another that looks for the nearest point, called with norm alone.
        chunk_size: How many examples are in memory at a time; None for all.

    Returns:
        [B], in pixel units. Infinite, of either sign, where nothing was found.

    Raises:
        ValueError: As the attack does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import margins
        >>> logits_fn = lambda x: jnp.stack([3 * x[:, 0] + 4 * x[:, 1], 0 * x[:, 0] + 2], -1)
        >>> x, y = jnp.array([[0.4, 0.5], [0.2, 0.2]]), jnp.array([0, 0])
        >>> margins.minimum_norm(logits_fn, x, y, jax.random.key(0), norm="l2")
        Array([ 0.24, -0.12], dtype=float32)

    Reference:
        Ours, as an estimate of the margin; it bounds its size from above.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)

    def margin_one(args):
        x, y, key = (a[None] for a in args)

        def label_last(x):
            logits = logits_fn(x)
            is_label = jnp.arange(logits.shape[-1], dtype=y.dtype) == y[0]
            return jnp.stack(
                [jnp.where(is_label[None], -jnp.inf, logits).max(-1), logits[:, y[0]]], axis=-1
            )

        def distance(logits_fn, y):
            x_adv = jax.lax.stop_gradient(attack(logits_fn, x, y, key, norm=norm))
            found = is_adversarial(logits_fn, x_adv, y)
            return jnp.where(found, distances(x, x_adv, norm=norm), jnp.inf)[0]

        wrong = is_adversarial(logits_fn, x, y)[0]
        return jnp.where(wrong, -distance(label_last, jnp.zeros_like(y)), distance(logits_fn, y))

    return in_chunks(margin_one, (x, y, example_keys(key, len(x))), chunk_size)


@compiled
def clever(
    logits_fn: LogitsFn,
    x: Images,
    key: KeyOrKeys,
    *,
    norm: Norm = "l2",
    eps: Length = 5.0,
    num_samples: int = 1024,
    chunk_size: int | None = None,
) -> PerExample:
    """Distances from the predicted class, with Lipschitz constants from sampled gradients.

    min_{j≠c} min(eps, (z_c - z_j) / max_r ‖∇_x (z_c - z_j)(x + r)‖_q), r uniform in the ball, not
    cut to [0,1], and c the class predicted at x. The estimate is exact for a linear network, and a
    lower bound with enough samples. CLEVER proper fits an extreme-value distribution to the
    gradients; this is what arXiv 1907.11780 measures, in l2 with eps 5 and 51,200 samples. Costs a
    forward and K backward passes per sample.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x: Examples [B,...], pixels in [0,1].
        key: One key, or one for each example [B].
        norm: A name or a record.
        eps: The radius of the ball, in pixel units, and the largest distance returned.
        num_samples: The number of samples r that the largest gradient is taken over.
        chunk_size: How many examples are in memory at a time; None for all.

    Returns:
        [B], in pixel units, at least 0, whether the prediction is right or not.

    Raises:
        ValueError: The norm is unknown, eps negative or num_samples below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import margins
        >>> logits_fn = lambda x: jnp.stack([3 * x[:, 0] + 4 * x[:, 1], 0 * x[:, 0]], -1)
        >>> x, key = jnp.array([[0.2, 0.1]]), jax.random.key(0)
        >>> margins.clever(logits_fn, x, key, norm="l2", num_samples=8)
        Array([0.2], dtype=float32)

    Reference:
        Wu & Yu 2019, arXiv 1907.11780, their code; after Weng et al. 2018, arXiv 1801.10578.
    """
    _checks.known_lengths(eps=eps)
    _checks.counts(num_samples=num_samples)
    threat, x = threat_model(norm), jnp.asarray(x)
    radius = jnp.asarray(eps, x.dtype)

    def distance_one(args):
        x, key = args
        logits = logits_fn(x[None])[0]
        top = logits.argmax()

        def steepest(most, i):
            r = threat.random_in_ball(jax.random.fold_in(key, i), x, radius)
            rows = jax.jacrev(lambda x: logits_fn(x[None])[0])(x + r)
            slopes = jax.vmap(threat.slope)(rows[top][None] - rows)
            return jnp.maximum(most, slopes.astype(most.dtype)), None

        zeros = jnp.zeros(logits.shape, wide_dtype(x.dtype))
        slopes, _ = jax.lax.scan(steepest, zeros, jnp.arange(num_samples))
        gaps = (logits[top] - logits).astype(slopes.dtype)
        reached = jnp.where(slopes > 0, gaps / jnp.where(slopes > 0, slopes, 1), jnp.inf)
        others = jnp.arange(len(logits), dtype=top.dtype) != top
        return jnp.minimum(jnp.where(others, reached, jnp.inf).min(), radius.astype(slopes.dtype))

    return in_chunks(distance_one, (x, example_keys(key, len(x))), chunk_size)


def lipschitz(
    logits: Logits,
    y: Labels,
    layers: Mapping[str, Layer],
    *,
    norm: Norm = "linf",
    std: tuple[float, ...] = (1.0,),
) -> Float[np.ndarray, " b"]:
    """Margins that the layers' norms guarantee: a lower bound of their magnitude.

    min_{j≠y} (z_y - z_j) / (‖w_y - w_j‖_q · L), w the rows of the last layer, L the product of the
    others' norms over the least std (exact where there is no other layer). Either all norms are in
    the threat norm, if `spectra.operator_norm` supports it, or all are in l2 and the distance is
    converted by ‖δ‖_2 ≤ l2_radius·‖δ‖ (l2_radius is √D in linf), whichever guarantees more. It
    holds for a chain of layers with only maps of Lipschitz constant at most 1 in between: ReLU,
    maxima or means of disjoint tiles, flattening. Costs two `spectra.operator_norm` per layer for
    all examples together.

    Args:
        logits: [B,K].
        y: Labels [B].
        layers: As `spectra.layers` lists them.
        norm: A name or a record.
        std: What the network divides its input by, one number per channel.

    Returns:
        [B], float64, in pixel units.

    Raises:
        ValueError: The last layer is not dense, or the norm unknown.

    Example:
        >>> import numpy as np
        >>> from robust_jax import margins
        >>> from robust_jax.analysis.spectra import Layer
        >>> layers = {"head": Layer(np.array([[3.0, 0.0], [4.0, 0.0]]))}
        >>> margins.lipschitz(np.array([[1.0, 0.0]]), np.array([0]), layers, norm="l2")
        array([0.2])

    Reference:
        Tsuzuku et al. 2018, arXiv 1802.04034, with the last layer taken pair by pair.
    """
    first, *_ = *hidden, head = layers.values()
    if head.kernel.ndim != 2:
        raise ValueError(f"the last layer, {list(layers)[-1]}, must be dense")
    threat = threat_model(norm)

    def guaranteed(threat):
        constant = np.prod([operator_norm(layer, threat) for layer in hidden]) / min(std)
        logits_ = np.asarray(logits, np.float64)
        return _over_weights(logits_, y, head.kernel.T, threat) / constant

    num_pixels = int(first.kernel.shape[-2] * np.prod(first.image))
    by_l2 = guaranteed(L2) / threat.l2_radius(num_pixels)
    if threat not in GAINS:
        return by_l2
    direct = guaranteed(threat)
    return np.where(np.abs(direct) > np.abs(by_l2), direct, by_l2)


def _over_weights(logits, y, weights, threat: ThreatModel):
    """min_{j≠y} (z_y - z_j) / ‖w_y - w_j‖_q, float64 logits [B,K] and weights [K,...] -> [B]."""
    y = np.asarray(y)
    _checks.labels(y, len(weights))
    with jax.enable_x64(True):
        slopes = np.asarray(jax.vmap(jax.vmap(threat.dual_size))(weights[:, None] - weights))
    others = np.arange(len(weights)) != y[:, None]
    gaps = logits[np.arange(len(y)), y][:, None] - logits
    boundaries = np.where(others, 0.0, np.inf)
    with np.errstate(divide="ignore"):  # classes of the same weights are infinitely far apart
        np.divide(gaps, slopes[y], out=boundaries, where=others & (gaps != 0))
    return boundaries.min(-1)
