"""Terms a training objective adds to its loss: per-example [B], smaller is better.

A single-half term is `term(logits_fn, half, labels, keys, **keywords)`, a pair term
`term(clean, adversarial, labels, **keywords)`. `logits_fn` is the evaluation-mode network,
differentiable in its parameters; `half` holds images and their training-mode logits; labels are
-1 where unknown, and terms in LABEL_FREE do not look at them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robust_jax import energy, losses, margins
from robust_jax import jacobian as jacobians
from robust_jax.attacks import Norm
from robust_jax.attacks.norms import L2
from robust_jax.types import Images, Labels, LogitsFn, PerExample

Keys = Key[Array, " b"]


class Half(NamedTuple):
    """The clean or the adversarial half of a batch: images [B,H,W,C] and their logits [B,K]."""

    images: Images
    logits: Float[Array, "b k"]


def entropy(logits_fn: LogitsFn, half: Half, labels: Labels, keys: Keys) -> PerExample:
    """-H(p) in nats: a positive weight promotes uncertainty (EntM, arXiv 2011.13538)."""
    return -losses.entropy(half.logits)


def complement_entropy(logits_fn: LogitsFn, half: Half, labels: Labels, keys: Keys) -> PerExample:
    """-H(q) in nats, q the softmax over the wrong classes: what COT adds to cross-entropy.

    There (arXiv 1903.01182) every iteration takes two steps, one on each of the two; here one step
    on their sum, our reading. The authors' code divides by K: a weight of 1/K.
    """
    return -losses.complement_entropy(half.logits, jnp.maximum(labels, 0))


def jacobian(
    logits_fn: LogitsFn, half: Half, labels: Labels, keys: Keys, *, num_projections: int = 1
) -> PerExample:
    """‖∇_x logits‖_F², unbiased, by num_projections random projections (arXiv 1908.02729)."""
    return jacobians.squared_frobenius_samples(
        logits_fn, half.images, keys, num_projections=num_projections
    ).mean(0)


def input_gradient(logits_fn: LogitsFn, half: Half, labels: Labels, keys: Keys) -> PerExample:
    """‖∇_x cross-entropy‖₂² (Drucker & LeCun 1992; arXiv 1711.09404)."""

    def total(images):
        # An unlabelled example has no loss, hence no gradient.
        losses_ = losses.cross_entropy(logits_fn(images), jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, losses_, 0.0).sum()

    return (jax.grad(total)(half.images) ** 2).sum((1, 2, 3))


def vat(
    logits_fn: LogitsFn,
    half: Half,
    labels: Labels,
    keys: Keys,
    *,
    eps: float,
    num_iterations: int = 1,
) -> PerExample:
    """Virtual adversarial loss KL(p(x) ‖ p(x + r)), r the worst direction at l2 norm eps (pixels).

    r follows the top eigenvector of the KL's Hessian, found by power iterations (arXiv 1704.03976,
    algorithm 1). The Hessian-vector product JᵀFJd is exact: the limit ξ → 0 of the paper's finite
    difference, which float32 cannot resolve at ξ = 1e-6. Label-free. Raises ValueError for a
    negative eps or num_iterations below 1.
    """
    if eps < 0 or num_iterations < 1:
        raise ValueError(
            f"vat needs eps >= 0 and num_iterations >= 1, not {eps!r} and {num_iterations!r}"
        )
    unit = jax.vmap(L2.steepest)
    reference = jax.lax.stop_gradient(logits_fn(half.images))
    p = jax.nn.softmax(reference)
    direction = unit(jax.vmap(lambda key: jax.random.normal(key, half.images.shape[1:]))(keys))
    for _ in range(num_iterations):
        _, change = jax.jvp(logits_fn, (half.images,), (direction,))
        fisher_change = p * (change - (p * change).sum(-1, keepdims=True))
        _, pull_back = jax.vjp(logits_fn, half.images)
        direction = unit(pull_back(fisher_change)[0])
    x_virtual = half.images + eps * jax.lax.stop_gradient(direction)
    return losses.kl(logits_fn(x_virtual), reference)


def average_margin(
    logits_fn: LogitsFn,
    half: Half,
    labels: Labels,
    keys: Keys,
    *,
    tau: float,
    norm: Norm = "linf",
    num_boundaries: int | None = None,
) -> PerExample:
    """ψ(m/τ) of the first-order input-space margin m (arXiv 1907.11780, our reading), in (0, 1).

    See `margins.truncate`; tau is in pixels, of the norm. Costs K-1 backward passes and their
    derivative; num_boundaries bounds that, at the price of Fisher consistency where more classes
    than that are about equally likely.
    """
    distances = margins.boundary_distances(
        logits_fn, half.images, jnp.maximum(labels, 0), norm=norm, num_boundaries=num_boundaries
    )
    return margins.truncate(distances, tau)


def energy_mean_square(
    logits_fn: LogitsFn,
    half: Half,
    labels: Labels,
    keys: Keys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_samples: int = 1,
) -> PerExample:
    """E (ℓ(x+r) - ℓ(x))² over the ball, in nats² (arXiv 1911.06479, our reading)."""
    y = jnp.maximum(labels, 0)
    return energy.mean_square(
        logits_fn, half.images, y, keys, eps=eps, norm=norm, num_samples=num_samples
    )


def energy_mean_square_label_free(
    logits_fn: LogitsFn,
    half: Half,
    labels: Labels,
    keys: Keys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_samples: int = 1,
) -> PerExample:
    """E KL(p(x) ‖ p(x+r))² over the ball, in nats² (arXiv 1911.06479, our reading)."""
    return energy.mean_square(
        logits_fn, half.images, None, keys, eps=eps, norm=norm, num_samples=num_samples
    )


def energy_oscillation(
    logits_fn: LogitsFn,
    half: Half,
    labels: Labels,
    keys: Keys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: float | None = None,
) -> PerExample:
    """(max ℓ - min ℓ)² over the ball, in nats² (arXiv 1911.06479, our reading)."""
    y = jnp.maximum(labels, 0)
    return energy.oscillation(
        logits_fn, half.images, y, keys,
        eps=eps, norm=norm, num_steps=num_steps, step_size=step_size,
    )  # fmt: skip


def energy_oscillation_label_free(
    logits_fn: LogitsFn,
    half: Half,
    labels: Labels,
    keys: Keys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: float | None = None,
) -> PerExample:
    """max KL(p(x) ‖ p(x+r))² over the ball, in nats² (arXiv 1911.06479, our reading)."""
    return energy.oscillation(
        logits_fn, half.images, None, keys,
        eps=eps, norm=norm, num_steps=num_steps, step_size=step_size,
    )  # fmt: skip


def kl(clean: Half, adversarial: Half, labels: Labels) -> PerExample:
    """KL(p(x) ‖ p(x_adv)), TRADES' term (arXiv 1901.08573). Label-free."""
    return losses.kl(adversarial.logits, clean.logits)


def weighted_kl(clean: Half, adversarial: Half, labels: Labels) -> PerExample:
    """KL(p(x) ‖ p(x_adv)) · (1 - p_y(x)), MART's term (ICLR 2020, eq. 9)."""
    doubt = 1 - losses.confidence(clean.logits, jnp.maximum(labels, 0))
    return losses.kl(adversarial.logits, clean.logits) * doubt


REGULARIZERS: Mapping[str, Callable[..., PerExample]] = {
    "entropy": entropy,
    "complement_entropy": complement_entropy,
    "jacobian": jacobian,
    "input_gradient": input_gradient,
    "vat": vat,
    "average_margin": average_margin,
    "energy_mean_square": energy_mean_square,
    "energy_mean_square_label_free": energy_mean_square_label_free,
    "energy_oscillation": energy_oscillation,
    "energy_oscillation_label_free": energy_oscillation_label_free,
}
PAIR_REGULARIZERS: Mapping[str, Callable[..., PerExample]] = {"kl": kl, "weighted_kl": weighted_kl}
LABEL_FREE = frozenset(
    {
        "entropy",
        "jacobian",
        "vat",
        "energy_mean_square_label_free",
        "energy_oscillation_label_free",
        "kl",
    }
)
