"""Terms a training objective adds to its loss: per-example [B], smaller is better.

A regulariser is a function here and a line in REGULARIZERS. The names of its positional parameters
say what it looks at:

    half                the half of the batch it is taken on, a `Half`
    clean, adversarial  both halves, for a term that compares them
    logits_fn           the evaluation-mode network, differentiable in its parameters
    labels              [B]; such a term leaves unlabelled examples out, and sees class 0 for them
    keys                [B], a random key for each example
    params              the network's parameters

Its keywords come from a config. If one of them is label_free, True makes it ignore the labels.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robust_jax import energy, losses, margins
from robust_jax import jacobian as jacobians
from robust_jax.attacks import Norm
from robust_jax.attacks.norms import L2
from robust_jax.train.optimizer import is_kernel
from robust_jax.types import Images, Labels, LogitsFn, PerExample

Keys = Key[Array, " b"]
LossOn = Literal["clean", "adversarial", "both"]
HALVES: Mapping[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "adversarial": ("adversarial",),
    "both": ("clean", "adversarial"),
}
_INPUTS = ("half", "clean", "adversarial", "logits_fn", "labels", "keys", "params")


class Half(NamedTuple):
    """The clean or the adversarial half of a batch: images [B,H,W,C] and their logits [B,K]."""

    images: Images
    logits: Float[Array, "b k"]


@dataclasses.dataclass(frozen=True)
class Term:
    """A regulariser with its keywords bound, its weight and the half it is taken on.

    Raises TypeError for a function that asks for something a term cannot see.
    """

    fn: Callable
    weight: float
    on: LossOn

    def __post_init__(self):
        if unknown := [name for name in self.inputs if name not in _INPUTS]:
            raise TypeError(
                f"a regulariser cannot look at {', '.join(unknown)}; choices: {', '.join(_INPUTS)}"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it looks at: the names of its positional parameters."""
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)

    @property
    def halves(self) -> tuple[str, ...]:
        """The halves of the batch that it looks at."""
        if "half" in self.inputs:
            return HALVES[self.on]
        return tuple(name for name in HALVES["both"] if name in self.inputs)

    @property
    def needs_labels(self) -> bool:
        """Whether it leaves out examples without a label."""
        label_free = inspect.signature(self.fn).parameters.get("label_free")
        return "labels" in self.inputs and not (label_free and label_free.default)

    def __call__(self, halves: Mapping[str, Half], **rest: Any) -> PerExample:
        """The values [B], or one for all; for two halves the mean. rest: the other inputs."""
        if "half" not in self.inputs:
            return self._of({**halves, **rest})
        return mean(self._of({"half": halves[name], **rest}) for name in self.halves)

    def _of(self, available: Mapping[str, Any]) -> PerExample:
        return self.fn(*(available[name] for name in self.inputs))


def mean(values: Iterable[PerExample]) -> PerExample:
    """The mean of several arrays of one shape."""
    values = list(values)
    return sum(values[1:], values[0]) / len(values)


def entropy(half: Half) -> PerExample:
    """-H(p) in nats: a positive weight promotes uncertainty (EntM, arXiv 2011.13538)."""
    return -losses.entropy(half.logits)


def complement_entropy(half: Half, labels: Labels) -> PerExample:
    """-H(q) in nats, q the softmax over the wrong classes: what COT adds to cross-entropy.

    In COT (arXiv 1903.01182) every iteration takes two steps, one on each of the two; we take one
    step on their sum, our reading. The authors' code divides by K, which is a weight of 1/K.
    """
    return -losses.complement_entropy(half.logits, labels)


def jacobian(
    logits_fn: LogitsFn, half: Half, keys: Keys, *, num_projections: int = 1
) -> PerExample:
    """‖∇_x logits‖_F², unbiased, by num_projections random projections (arXiv 1908.02729)."""
    return jacobians.squared_frobenius_samples(
        logits_fn, half.images, keys, num_projections=num_projections
    ).mean(-1)


def input_gradient(logits_fn: LogitsFn, half: Half, labels: Labels) -> PerExample:
    """‖∇_x cross-entropy‖₂² (Drucker & LeCun 1992; arXiv 1711.09404)."""

    def total(images):
        return losses.cross_entropy(logits_fn(images), labels).sum()

    return (jax.grad(total)(half.images) ** 2).sum((1, 2, 3))


def vat(
    logits_fn: LogitsFn,
    half: Half,
    keys: Keys,
    *,
    eps: float,
    num_iterations: int = 1,
) -> PerExample:
    """Virtual adversarial loss KL(p(x) ‖ p(x + r)), r the worst direction at l2 norm eps (pixels).

    r follows the top eigenvector of the KL's Hessian, found by power iterations (arXiv 1704.03976,
    algorithm 1). The Hessian-vector product JᵀFJd is exact: the limit ξ → 0 of the paper's finite
    difference, which float32 cannot resolve at ξ = 1e-6. Raises ValueError for a negative eps or
    num_iterations below 1.
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


def output_margin_ramp(half: Half, labels: Labels, *, tau: float) -> PerExample:
    """τ - clip(α, 0, τ) of the output margin α, in units of the logits (arXiv 1907.11780).

    As published, it acts on examples that are right by less than tau, not on those that are wrong.
    The output margin stands for an input-space margin if the layers' norms are near 1: see
    `orthogonality`. A later version of the authors' code clamps -α to [0, τ] instead, which is a
    different function.
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0, not {tau!r} (in units of the logits)")
    return tau - jnp.clip(losses.margin(half.logits, labels), 0, tau)


def orthogonality(params: Any) -> Float[Array, ""]:
    """Σ ‖W Wᵀ - I‖_F² over dense matrices and kernels, W as [out, rest] (arXiv 1907.11780).

    Biases and normalisation scales are left out. The authors' code adds each layer's term twice,
    once when it visits the layer's bias, so the weight here is twice their β.
    """

    def deviation(kernel):
        rows = kernel.reshape(-1, kernel.shape[-1])
        # ‖W Wᵀ - I‖² is ‖Wᵀ W - I‖² plus a constant, so the smaller product will do.
        constant = max(rows.shape[1] - rows.shape[0], 0)
        small = rows.T if constant else rows
        # Both factors are the same, so the derivative is twice that with respect to one of them.
        product = small.T @ jax.lax.stop_gradient(small)
        value = ((product - jnp.eye(len(product), dtype=rows.dtype)) ** 2).sum()
        return 2 * value - jax.lax.stop_gradient(value) + constant

    leaves = zip(jax.tree.leaves(is_kernel(params)), jax.tree.leaves(params), strict=True)
    return sum((deviation(leaf) for kernel, leaf in leaves if kernel), jnp.zeros(()))


def input_margin(
    logits_fn: LogitsFn,
    half: Half,
    labels: Labels,
    *,
    tau: float,
    norm: Norm = "linf",
    num_boundaries: int | None = None,
) -> PerExample:
    """ψ(m/τ) of the first-order input-space margin m, in (0, 1): ours, not a paper's.

    See `margins.truncate`; tau is a distance in the norm, in pixel units. Costs K-1 backward
    passes and their derivatives, or num_boundaries of both.
    """
    distances = margins.boundary_distances(
        logits_fn, half.images, labels, norm=norm, num_boundaries=num_boundaries
    )
    return margins.truncate(distances, tau)


def _energy(fn: Callable[..., PerExample]) -> Callable[..., PerExample]:
    """An energy over the ball around each image of a half: our reading of arXiv 1911.06479.

    That paper was withdrawn; see `robust_jax.energy` for it and its successor.

    The loss is cross-entropy, or KL(p(x) ‖ p(x+r)) with label_free=True. Takes fn's keywords.
    """

    def term(
        logits_fn: LogitsFn,
        half: Half,
        labels: Labels,
        keys: Keys,
        *,
        label_free: bool = False,
        **keywords: Any,
    ) -> PerExample:
        y = None if label_free else labels
        return fn(logits_fn, half.images, y, keys, **keywords)

    def parameters(of, kind):
        return [p for p in inspect.signature(of).parameters.values() if p.kind == kind]

    inputs = parameters(term, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = parameters(fn, inspect.Parameter.KEYWORD_ONLY)
    free = parameters(term, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.Signature([*inputs, *own, *free])
    # A config is checked against it; mypy does not know a function's __signature__.
    term.__signature__ = signature  # type: ignore[attr-defined]  # as inspect reads it
    term.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return term


def kl(clean: Half, adversarial: Half) -> PerExample:
    """KL(p(x) ‖ p(x_adv)), TRADES' term (arXiv 1901.08573)."""
    return losses.kl(adversarial.logits, clean.logits)


def weighted_kl(clean: Half, adversarial: Half, labels: Labels) -> PerExample:
    """KL(p(x) ‖ p(x_adv)) · (1 - p_y(x)), MART's term (ICLR 2020, eq. 9)."""
    doubt = 1 - losses.confidence(clean.logits, labels)
    return losses.kl(adversarial.logits, clean.logits) * doubt


REGULARIZERS: Mapping[str, Callable[..., PerExample]] = {
    "entropy": entropy,
    "complement_entropy": complement_entropy,
    "kl": kl,
    "weighted_kl": weighted_kl,
    "vat": vat,
    "jacobian": jacobian,
    "input_gradient": input_gradient,
    "output_margin_ramp": output_margin_ramp,
    "orthogonality": orthogonality,
    "input_margin": input_margin,
    "energy_mean_square": _energy(energy.mean_square),
    "energy_oscillation": _energy(energy.oscillation),
    "energy_total_variation": _energy(energy.total_variation),
    "energy_path": _energy(energy.path),
}
