"""Pure per-example losses and output measures: logits [B,K] and labels [B] in, [B] out, in nats.

Nothing here reduces over the batch: the caller does, with (sum, count) pairs. All of it is
computed in log space, so values and gradients stay finite for logits of ±1e4 in float32.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_jax.types import Labels, Logits, PerExample

Loss = Callable[[Logits, Labels], PerExample]


def cross_entropy(logits: Logits, labels: Labels, *, label_smoothing: float = 0.0) -> PerExample:
    """Cross-entropy against (1-γ)·onehot + γ/K, with γ = label_smoothing (arXiv 1512.00567, §7).

    [B,K], [B] -> [B]. Raises ValueError where γ is outside [0, 1).
    """
    _check_range("label_smoothing", label_smoothing, 0.0, 1.0, half_open=True)
    log_p = jax.nn.log_softmax(logits)
    log_p_label = _at(log_p, labels)
    return -(1 - label_smoothing) * log_p_label - label_smoothing * log_p.mean(-1)


def guided_complement_entropy(
    logits: Logits, labels: Labels, *, alpha: float = 1 / 3
) -> PerExample:
    """Guided complement entropy, p_y^α · Σ_{j≠y} q_j log q_j / log(K-1) in [-1, 0], minimised.

    q is the softmax over the classes other than y. [B,K], [B] -> [B]. Raises ValueError for K < 3
    or α outside [0, 1]. Source: arXiv 1903.09799. The authors' code divides by log K instead: a
    constant factor on the gradient.
    """
    _check_range("alpha", alpha, 0.0, 1.0)
    num_classes = _check_classes("guided_complement_entropy", logits, 3)
    guide = jnp.exp(alpha * _at(jax.nn.log_softmax(logits), labels))
    return -guide * complement_entropy(logits, labels) / jnp.log(num_classes - 1.0)


def boosted_cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """MART's loss, -log p_y - log(1 - max_{j≠y} p_j), [B,K], [B] -> [B] (ICLR 2020, eq. 8)."""
    log_p = jax.nn.log_softmax(logits)
    runner_up = jnp.argmax(_without(logits, labels), -1)
    log_not_runner_up = jax.nn.logsumexp(complement(log_p, runner_up), -1)
    return -_at(log_p, labels) - log_not_runner_up


def margin_loss(logits: Logits, labels: Labels) -> PerExample:
    """Negated margin, max_{j≠y} z_j - z_y, as maximised by an attack.

    [B,K], [B] -> [B]. Source: arXiv 1608.04644, f6, untargeted and not cut off at 0.
    """
    return -margin(logits, labels)


def dlr(logits: Logits, labels: Labels) -> PerExample:
    """Difference of logits ratio, -(z_y - max_{i≠y} z_i) / (z_π1 - z_π3), maximised by an attack.

    [B,K], [B] -> [B]; invariant to shift and scale of the logits, and constant (-(z_y - z_π1) /
    (z_π1 - z_y) = 1) where the label has fallen to the third place. Raises ValueError for K < 3,
    where z_π3 does not exist: use margin_loss there. Source: arXiv 2003.01690, eq. 6.
    """
    _check_classes("dlr", logits, 3, "use margin_loss instead")
    ordered = jnp.sort(logits, axis=-1)
    return -margin(logits, labels) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """Targeted DLR, -(z_y - z_t) / (z_π1 - (z_π3 + z_π4)/2), maximised by an attack towards t.

    [B,K], [B], [B] -> [B]; invariant to shift and scale of the logits. Raises ValueError for
    K < 4, where z_π4 does not exist: use targeted_margin there. Source: arXiv 2003.01690, eq. 7.
    """
    _check_classes("targeted_dlr", logits, 4, "use targeted_margin instead")
    ordered = jnp.sort(logits, axis=-1)
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    return targeted_margin(logits, labels, targets) / (scale + 1e-12)


def targeted_margin(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """z_t - z_y, maximised by an attack from y towards t (arXiv 1910.09338).

    [B,K], [B], [B] -> [B].
    """
    return _at(logits, targets) - _at(logits, labels)


def kl(logits: Logits, reference: Logits) -> PerExample:
    """KL(p ‖ q) = Σ_k p_k log(p_k / q_k), p and q the softmax of reference and of logits.

    [B,K], [B,K] -> [B]. Source: TRADES, arXiv 1901.08573.
    """
    log_p = jax.nn.log_softmax(reference)
    return (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits))).sum(-1)


def entropy(logits: Logits) -> PerExample:
    """Shannon entropy -Σ_k p_k log p_k of p = softmax(logits), in [0, log K] nats, [B,K] -> [B]."""
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(-1)


def complement_entropy(logits: Logits, labels: Labels) -> PerExample:
    """Entropy -Σ_{j≠y} q_j log q_j of the softmax q over the classes other than y, in nats.

    [B,K], [B] -> [B], in [0, log(K-1)]. Raises ValueError for K < 3. Source: arXiv 1903.01182,
    eq. 2.
    """
    _check_classes("complement_entropy", logits, 3)
    return entropy(complement(logits, labels))


def margin(logits: Logits, labels: Labels) -> PerExample:
    """Output margin z_y - max_{j≠y} z_j, positive where classified right.

    [B,K], [B] -> [B], in units of the logits. Source: Crammer & Singer 2001.
    """
    return _at(logits, labels) - _without(logits, labels).max(-1)


def confidence(logits: Logits, labels: Labels) -> PerExample:
    """Probability of the label, p_y = exp(z_y) / Σ_k exp(z_k) in [0, 1], [B,K], [B] -> [B]."""
    return jnp.exp(_at(jax.nn.log_softmax(logits), labels))


def correct(logits: Logits, labels: Labels) -> PerExample:
    """1 where the label's logit is the largest, else 0: [B,K], [B] -> [B].

    Logits that are not all finite count as wrong.
    """
    finite = jnp.isfinite(logits).all(-1)
    return ((jnp.argmax(logits, -1) == labels) & finite).astype(jnp.float32)


def complement(logits: Logits, labels: Labels) -> Float[Array, "b k-1"]:
    """The logits of all classes but the label, in order, [B,K], [B] -> [B,K-1]."""
    columns = jnp.arange(logits.shape[-1] - 1)
    columns = columns + (columns >= labels[:, None])
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
    "margin_loss": margin_loss,
    "dlr": dlr,
}


def _at(values: Logits, labels: Labels) -> PerExample:
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _without(logits: Logits, labels: Labels) -> Logits:
    """The logits with the label's replaced by -inf."""
    return jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)


def _check_range(name: str, value: float, low: float, high: float, half_open: bool = False) -> None:
    if not (low <= value < high if half_open else low <= value <= high):
        raise ValueError(
            f"{name} must be in [{low:g}, {high:g}{')' if half_open else ']'}, not {value!r}"
        )


def _check_classes(name: str, logits: Logits, least: int, remedy: str = "") -> int:
    num_classes = logits.shape[-1]
    if num_classes < least:
        raise ValueError(
            f"{name} needs at least {least} classes, not {num_classes}"
            + (f"; {remedy}" if remedy else "")
        )
    return num_classes
