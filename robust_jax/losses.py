"""Pure per-example losses and output measures: logits [B,K] and labels [B] in, [B] out, in nats.

Nothing here reduces over the batch: the caller does, with (sum, count) pairs. Values and gradients
stay finite for logits of ±1e4 in float32, since all is computed in log space except the form of
guided complement entropy that follows its authors' code, epsilons and all. 16-bit logits are
computed and returned in float32.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_jax import _checks
from robust_jax._precision import wide
from robust_jax.types import Labels, Logits, PerExample

__all__ = [
    "ATTACK_LOSSES",
    "LOSSES",
    "Form",
    "Loss",
    "boosted_cross_entropy",
    "complement",
    "complement_entropy",
    "confidence",
    "correct",
    "cross_entropy",
    "dlr",
    "entropy",
    "guided_complement_entropy",
    "kl",
    "margin",
    "margin_loss",
    "targeted_dlr",
    "targeted_margin",
]


def __dir__() -> list[str]:
    return __all__


Loss = Callable[[Logits, Labels], PerExample]
Form = Literal["exact", "published"]


def cross_entropy(logits: Logits, labels: Labels, *, label_smoothing: float = 0.0) -> PerExample:
    """Cross-entropy against (1-γ)·onehot + γ/K, with γ = label_smoothing.

    In float32 the value, and its derivative by the label's logit, are 0 where that logit is more
    than about 17 above the others, as in other libraries; use `margin_loss` there.

    Args:
        logits: [B,K].
        labels: [B].
        label_smoothing: γ, in [0, 1).

    Returns:
        [B], in nats, at least 0.

    Raises:
        ValueError: label_smoothing is outside [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.cross_entropy(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([0]))
        Array([0.408], dtype=float32)

    Reference:
        Szegedy et al. 2016, arXiv 1512.00567, section 7; LS of arXiv 2011.13538.
    """
    _check_share("label_smoothing", label_smoothing, half_open=True)
    log_p = _log_softmax(logits)
    log_p_label = _at(log_p, labels)
    if label_smoothing == 0:  # where a class at -inf contributes nothing
        return -log_p_label
    return -(1 - label_smoothing) * log_p_label - label_smoothing * log_p.mean(-1)


def guided_complement_entropy(
    logits: Logits,
    labels: Labels,
    *,
    alpha: float = 1 / 3,
    form: Form = "exact",
) -> PerExample:
    """Guided complement entropy, p_y^α · Σ_{j≠y} q_j log q_j / log(K-1), to be minimised.

    q is the softmax over the classes other than y. The authors' code ("published") has q_j =
    p_j / (1 - p_y + 1e-7), adds 1e-7 to p_y and 1e-10 within the log, and divides by log K. This is
    a different loss where the network is confident: with 10 classes and equal wrong logits it is
    least at a gap of 10.0 between the label's logit and theirs and rises again beyond, while the
    exact loss keeps falling. In effect it caps the confidence.

    Args:
        logits: [B,K], K at least 3.
        labels: [B].
        alpha: α, in [0, 1].
        form: "exact", or "published" with the constants of the authors' code.

    Returns:
        [B], in [-1, 0].

    Raises:
        ValueError: there are fewer than 3 classes, alpha is outside [0, 1] or form unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> logits = jnp.array([[9.0, 0.0, 0.0], [9.0, 7.0, 0.0]])
        >>> losses.guided_complement_entropy(logits, jnp.array([0, 0]))
        Array([-1., -0.], dtype=float32)

    Reference:
        Chen et al. 2019, arXiv 1903.09799; code: github.com/henry8527/GCE.
    """
    _check_share("alpha", alpha)
    num_classes = _check_classes("guided_complement_entropy", logits, 3)
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, not {form!r}")
    log_p = _log_softmax(logits)
    if form == "exact":
        guide = jnp.exp(alpha * _at(log_p, labels))
        return -guide * complement_entropy(logits, labels) / math.log(num_classes - 1)
    wrong = jnp.exp(complement(log_p, labels))
    q = wrong / (wrong.sum(-1, keepdims=True) + 1e-7)
    guide = (jnp.exp(_at(log_p, labels)) + 1e-7) ** alpha
    return guide * (q * jnp.log(q + 1e-10)).sum(-1) / math.log(num_classes)


def boosted_cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """MART's loss, -log p_y - log(1 - max_{j≠y} p_j).

    Args:
        logits: [B,K].
        labels: [B].

    Returns:
        [B], in nats, at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> logits = jnp.log(jnp.array([[0.5, 0.4, 0.1]]))
        >>> losses.boosted_cross_entropy(logits, jnp.array([0]))  # -log(0.5 · 0.6)
        Array([1.204], dtype=float32)

    Reference:
        Wang et al., ICLR 2020, equation 8.
    """
    log_p = _log_softmax(logits)
    runner_up = jnp.argmax(_without(logits, labels), -1)
    log_not_runner_up = jax.nn.logsumexp(complement(log_p, runner_up), -1)
    return -_at(log_p, labels) - log_not_runner_up


def margin_loss(logits: Logits, labels: Labels) -> PerExample:
    """Negated margin, max_{j≠y} z_j - z_y, which an attack maximises.

    Args:
        logits: [B,K].
        labels: [B].

    Returns:
        [B], in units of the logits, positive where misclassified.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.margin_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([1]))
        Array([1.], dtype=float32)

    Reference:
        Carlini & Wagner 2017, arXiv 1608.04644: f6, untargeted and not cut off at 0.
    """
    return -margin(logits, labels)


def dlr(logits: Logits, labels: Labels) -> PerExample:
    """Difference of logits ratio, -(z_y - max_{i≠y} z_i) / (z_π1 - z_π3).

    Attacks maximise it. It is invariant to shift and scale of the logits, and constant (-(z_y -
    z_π1) / (z_π1 - z_y) = 1) where the label has fallen to the third place.

    Args:
        logits: [B,K], K at least 3.
        labels: [B].

    Returns:
        [B], positive where misclassified.

    Raises:
        ValueError: there are fewer than 3 classes, so that z_π3 does not exist; use margin_loss.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.dlr(jnp.array([[3.0, 2.0, 1.0, 0.0]]), jnp.array([0]))
        Array([-0.5], dtype=float32)

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, equation 6.
    """
    _check_classes("dlr", logits, 3, "use margin_loss instead")
    ordered = jnp.sort(wide(logits), axis=-1)
    return -margin(logits, labels) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """Targeted DLR, -(z_y - z_t) / (z_π1 - (z_π3 + z_π4)/2), which an attack towards t maximises.

    Invariant to shift and scale of the logits.

    Args:
        logits: [B,K], K at least 4.
        labels: [B].
        targets: [B], the classes to be reached.

    Returns:
        [B], positive where the target's logit is above the label's.

    Raises:
        ValueError: there are fewer than 4 classes, so that z_π4 does not exist; use
            targeted_margin.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> logits = jnp.array([[3.0, 2.0, 1.0, 0.0]])
        >>> losses.targeted_dlr(logits, jnp.array([0]), jnp.array([2]))
        Array([-0.8], dtype=float32)

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, equation 7.
    """
    _check_classes("targeted_dlr", logits, 4, "use targeted_margin instead")
    ordered = jnp.sort(wide(logits), axis=-1)
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    return targeted_margin(logits, labels, targets) / (scale + 1e-12)


def targeted_margin(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """z_t - z_y, which an attack from y towards t maximises.

    Args:
        logits: [B,K].
        labels: [B].
        targets: [B], the classes to be reached.

    Returns:
        [B], in units of the logits.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> logits = jnp.array([[3.0, 2.0, 1.0]])
        >>> losses.targeted_margin(logits, jnp.array([0]), jnp.array([2]))
        Array([-2.], dtype=float32)

    Reference:
        Gowal et al. 2019, arXiv 1910.09338.
    """
    logits = wide(logits)
    return _at(logits, targets) - _at(logits, labels)


def kl(logits: Logits, reference: Logits) -> PerExample:
    """KL(p ‖ q) = Σ_k p_k log(p_k / q_k), p and q the softmax of reference and of logits.

    Args:
        logits: [B,K], of q.
        reference: [B,K], of p.

    Returns:
        [B], in nats, at least 0 up to rounding.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 5.0]]))
        Array([0.653], dtype=float32)

    Reference:
        TRADES' term: Zhang et al. 2019, arXiv 1901.08573.
    """
    log_p = _log_softmax(reference)
    return _mean_over(log_p, log_p - _log_softmax(logits))


def entropy(logits: Logits) -> PerExample:
    """Shannon entropy -Σ_k p_k log p_k of p = softmax(logits).

    Args:
        logits: [B,K].

    Returns:
        [B], in [0, log K] nats.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.entropy(jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]])))
        Array([0.693, 0.325], dtype=float32)

    Reference:
        What EntM (arXiv 2011.13538) promotes: cross-entropy - λ · entropy.
    """
    log_p = _log_softmax(logits)
    return -_mean_over(log_p, log_p)


def complement_entropy(logits: Logits, labels: Labels) -> PerExample:
    """Entropy -Σ_{j≠y} q_j log q_j of the softmax q over the classes other than y.

    Args:
        logits: [B,K], K at least 3.
        labels: [B].

    Returns:
        [B], in [0, log(K-1)] nats.

    Raises:
        ValueError: there are fewer than 3 classes.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.complement_entropy(jnp.array([[7.0, 1.0, 1.0]]), jnp.array([0]))
        Array([0.693], dtype=float32)

    Reference:
        Chen et al. 2019, arXiv 1903.01182, equation 2.
    """
    _check_classes("complement_entropy", logits, 3)
    return entropy(complement(logits, labels))


def margin(logits: Logits, labels: Labels) -> PerExample:
    """Output margin z_y - max_{j≠y} z_j.

    Args:
        logits: [B,K].
        labels: [B].

    Returns:
        [B], in units of the logits, positive where classified correctly.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.margin(jnp.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), jnp.array([0, 2]))
        Array([ 1., -2.], dtype=float32)

    Reference:
        Crammer & Singer 2001; the margin of arXiv 1907.11780 and 2011.07478.
    """
    logits = wide(logits)
    return _at(logits, labels) - _without(logits, labels).max(-1)


def confidence(logits: Logits, labels: Labels) -> PerExample:
    """Probability of the label, p_y = exp(z_y) / Σ_k exp(z_k).

    Args:
        logits: [B,K].
        labels: [B].

    Returns:
        [B], in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.confidence(jnp.log(jnp.array([[0.7, 0.2, 0.1]])), jnp.array([1]))
        Array([0.2], dtype=float32)

    Reference:
        The confidence of arXiv 2011.07478, which measures its mean.
    """
    return jnp.exp(_at(_log_softmax(logits), labels))


def correct(logits: Logits, labels: Labels) -> PerExample:
    """1 where the label's logit is the largest, else 0.

    Args:
        logits: [B,K]. An example with NaN, +inf or a label at -inf counts as wrong. Another class
            at -inf counts as ruled out by the network.
        labels: [B].

    Returns:
        [B], float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.correct(jnp.array([[2.0, 1.0], [2.0, jnp.nan]]), jnp.array([0, 0]))
        Array([1., 0.], dtype=float32)
    """
    known = (logits < jnp.inf).all(-1)  # and not NaN
    top = jnp.argmax(logits, -1).astype(jnp.int32)
    return ((top == _indices(labels)) & known & (logits.max(-1) > -jnp.inf)).astype(jnp.float32)


def complement(logits: Logits, labels: Labels) -> Float[Array, "b k-1"]:
    """The logits of all classes but the label, in order.

    Args:
        logits: [B,K].
        labels: [B].

    Returns:
        [B,K-1].

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> losses.complement(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([1]))
        Array([[2., 0.]], dtype=float32)
    """
    columns = jnp.arange(logits.shape[-1] - 1, dtype=jnp.int32)[None]
    columns += (columns >= _indices(labels)[:, None]).astype(jnp.int32)
    return jnp.take_along_axis(logits, columns, axis=-1)


# What a config can name. LOSSES are minimised in training, ATTACK_LOSSES maximised by an attack.
LOSSES: Mapping[str, Callable[..., PerExample]] = {
    "cross_entropy": cross_entropy,
    "guided_complement_entropy": guided_complement_entropy,
    "boosted_cross_entropy": boosted_cross_entropy,
}
ATTACK_LOSSES: Mapping[str, Loss] = {
    "cross_entropy": cross_entropy,
    "guided_complement_entropy": guided_complement_entropy,
    "guided_complement_entropy_published": partial(guided_complement_entropy, form="published"),
    "margin_loss": margin_loss,
    "dlr": dlr,
}


def _log_softmax(logits: Logits) -> Logits:
    return jax.nn.log_softmax(wide(logits))


def _mean_over(log_p: Logits, values: Logits) -> PerExample:
    """Σ_k p_k v_k, to which a class of probability 0 contributes nothing."""
    return (jnp.exp(log_p) * jnp.where(log_p > -jnp.inf, values, 0)).sum(-1)


def _indices(labels: Labels) -> Labels:
    """The labels in a type that holds any class, as 8-bit ones end at 255."""
    _checks.type_of_labels(labels, "labels")
    return labels.astype(jnp.int32)


def _at(values: Logits, labels: Labels) -> PerExample:
    return jnp.take_along_axis(values, _indices(labels)[:, None], axis=-1)[:, 0]


def _without(logits: Logits, labels: Labels) -> Logits:
    """The logits with the label's replaced by -inf."""
    return jnp.where(
        jax.nn.one_hot(_indices(labels), logits.shape[-1], dtype=bool), -jnp.inf, logits
    )


def _check_share(name: str, value: float, half_open: bool = False) -> None:
    if not (0 <= value < 1 if half_open else 0 <= value <= 1):
        raise ValueError(f"{name} must be in [0, 1{')' if half_open else ']'}, not {value!r}")


def _check_classes(name: str, logits: Logits, least: int, remedy: str = "") -> int:
    num_classes = logits.shape[-1]
    if num_classes < least:
        raise ValueError(
            f"{name} needs at least {least} classes, not {num_classes}"
            + (f"; {remedy}" if remedy else "")
        )
    return num_classes
