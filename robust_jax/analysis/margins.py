"""Margins in the input space: how far an example is from where its class changes.

Four estimates of one quantity, [B] in pixel units of the threat norm: the distance to the nearest
point that is misclassified or, negated, from a misclassified example to the nearest that is not.
`linear` is exact, `first_order` exact for a linear network; `minimum_norm` is never smaller and
`lipschitz` never larger in magnitude. Source: arXiv 1907.11780, which means by minimum and average
margin the least and the mean over the training set.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from robust_jax import margins
from robust_jax._front import compiled
from robust_jax.analysis.spectra import Layer, operator_norm
from robust_jax.attacks import Nearest, Norm
from robust_jax.batches import in_chunks
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, LogitsFn, PerExample

# nearest(logits_fn, x, y, key): `attacks.nearest_adversarial` with its norm and steps bound.
NearestAttack = Callable[[LogitsFn, Images, Labels, KeyOrKeys], Nearest]

# The order of the norm dual to each, in which gradients are measured.
_DUAL_ORDER: Mapping[str, float] = {"linf": 1, "l2": 2, "l1": np.inf}


def linear(
    weights: Float[np.ndarray, "k d"],
    bias: Float[np.ndarray, " k"],
    x: Float[np.ndarray, "b ..."],
    y: Int[np.ndarray, " b"],
    *,
    norm: Norm,
) -> Float[np.ndarray, " b"]:
    """Margins of the classifier argmax(weights·x + bias), min_{j≠y} (z_y - z_j) / ‖w_y - w_j‖_q.

    q is the order dual to norm; the walls of [0,1] are not looked at. Exact where x is classified
    right, and for two classes; otherwise no larger in magnitude than the margin, for of the
    boundaries in between it goes to the furthest alone. Costs B·K·D multiplications and holds K²
    differences of D weights. Raises ValueError for an unknown norm.
    """
    weights, x = np.asarray(weights, np.float64), np.asarray(x, np.float64)
    logits = x.reshape(len(x), -1) @ weights.T + np.asarray(bias, np.float64)
    return _over_weights(logits, np.asarray(y), weights, norm)


@compiled
def first_order(
    logits_fn: LogitsFn, x: Images, y: Labels, *, norm: Norm, chunk_size: int | None = None
) -> PerExample:
    """Margins of the linearised network, min_{j≠y} (z_y - z_j) / ‖∇_x (z_y - z_j)‖_q.

    [B], q the order dual to norm: `margins.first_order`, for measuring. Infinite where the gradient
    vanishes. Costs a forward and K-1 backward passes an example; chunk_size bounds how many
    examples are in memory. Raises ValueError for an unknown norm.
    """

    def margin_one(args):
        image, label = args
        return margins.first_order(logits_fn, image[None], label[None], norm=norm)[0]

    found = in_chunks(margin_one, (x, y), chunk_size)
    # A number that training can go on with, and a mean cannot, stands for "no gradient" there.
    return jnp.where(jnp.abs(found) < 1e9, found, jnp.copysign(jnp.inf, found))


def minimum_norm(
    nearest: NearestAttack,
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    chunk_size: int | None = None,
) -> PerExample:
    """Margins as far as a minimum-norm attack finds them: an upper bound of their magnitude, [B].

    nearest: `attacks.nearest_adversarial` (FAB), or an attack of its shape, with all keywords
    bound. Where x is misclassified it attacks the two logits "any other" and "the label", to reach
    the label. Infinite, of either sign, where nothing was found. Costs two attacks an example, one
    of them on two classes; chunk_size bounds how many examples are in memory.
    """

    def margin_one(args):
        image, label, key = args

        def label_last(x):
            logits = logits_fn(x)
            is_label = jnp.arange(logits.shape[-1]) == label
            return jnp.stack(
                [jnp.where(is_label, -jnp.inf, logits).max(-1), logits[:, label]], axis=-1
            )

        def distance(logits_fn, label):
            return nearest(logits_fn, image[None], label[None], key[None]).distance[0]

        # One of them is 0: an attack does not leave a point that is where it should get to.
        return distance(logits_fn, label) - distance(label_last, jnp.zeros_like(label))

    return in_chunks(margin_one, (x, y, example_keys(key, x.shape[0])), chunk_size)


def lipschitz(
    logits: Float[np.ndarray, "b k"],
    y: Int[np.ndarray, " b"],
    layers: Mapping[str, Layer],
    *,
    norm: Norm,
    std: tuple[float, ...] = (1.0,),
) -> Float[np.ndarray, " b"]:
    """Margins that the layers' norms guarantee: a lower bound of their magnitude, [B].

    min_{j≠y} (z_y - z_j) / (‖w_y - w_j‖_q · L), w the rows of the last layer, L the product of the
    others' norms over the least std, by which the input is divided (arXiv 1802.04034, with the
    last layer taken pair by pair: exact where there is no other). The norms are all of the threat
    norm, or all l2 and the distance carried over by ‖δ‖_2 ≤ ‖δ‖_1 and ‖δ‖_2 ≤ √D ‖δ‖_∞: whichever
    guarantees more. It holds for layers that follow one another, as `spectra.layers` lists them,
    with nothing in between but maps of Lipschitz constant at most 1: ReLU, maxima or means of
    disjoint tiles, flattening. Costs two `operator_norm` a layer, in norm and in l2, for all
    examples together. Raises ValueError for a last layer that is not dense, or an unknown norm.
    """
    first, *_ = *hidden, head = layers.values()
    if head.kernel.ndim != 2:
        raise ValueError(f"the last layer, {list(layers)[-1]}, must be dense")
    _dual_order(norm)

    def guaranteed(norm):
        constant = np.prod([operator_norm(layer, norm) for layer in hidden]) / min(std)
        logits_ = np.asarray(logits, np.float64)
        return _over_weights(logits_, np.asarray(y), head.kernel.T, norm) / constant

    num_pixels = first.kernel.shape[-2] * np.prod(first.image)
    direct, by_l2 = guaranteed(norm), guaranteed("l2")
    if norm == "linf":
        by_l2 /= np.sqrt(num_pixels)
    return np.where(np.abs(direct) > np.abs(by_l2), direct, by_l2)


def _over_weights(logits, y, weights, norm):
    """min_{j≠y} (z_y - z_j) / ‖w_y - w_j‖_q, float64 logits [B,K] and weights [K,D] -> [B]."""
    slopes = np.linalg.norm(weights[:, None] - weights, _dual_order(norm), axis=-1)
    others = np.arange(len(weights)) != y[:, None]
    gaps = logits[np.arange(len(y)), y][:, None] - logits
    distances = np.where(others, 0.0, np.inf)
    with np.errstate(divide="ignore"):  # classes of the same weights are infinitely far apart
        np.divide(gaps, slopes[y], out=distances, where=others & (gaps != 0))
    return distances.min(-1)


def _dual_order(norm: str) -> float:
    if norm not in _DUAL_ORDER:
        raise ValueError(f"norm must be one of {', '.join(_DUAL_ORDER)}, not {norm!r}")
    return _DUAL_ORDER[norm]
