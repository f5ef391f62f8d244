"""Whether an attack succeeded, and how far it went."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import wide
from robust_jax.attacks.norms import Measure, measure
from robust_jax.types import Images, Labels, Logits, LogitsFn, PerExample

# criterion(logits [B,K], reference [B,...]) -> [B]: whether points with these logits succeed. The
# reference is y, or the targets of an attack that has targets.
Criterion = Callable[[Logits, Array], Bool[Array, " b"]]


def misclassified(logits: Logits, y: Labels) -> Bool[Array, " b"]:
    """Whether a class other than the label wins: the criterion of an untargeted attack.

    Args:
        logits: [B,K].
        y: Labels [B].

    Returns:
        [B]. Logits with NaN, +inf or the label at -inf count as misclassified.

    Raises:
        ValueError: y does not hold labels.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> attacks.misclassified(jnp.array([[2.0, 1.0], [0.0, 1.0]]), jnp.array([0, 0]))
        Array([False,  True], dtype=bool)
    """
    _check_labels(y)
    return losses.correct(logits, y) == 0


def classified_as(logits: Logits, targets: Labels) -> Bool[Array, " b"]:
    """Whether the target wins: the criterion of a targeted attack.

    Args:
        logits: [B,K].
        targets: Classes [B].

    Returns:
        [B]. Logits with NaN, +inf or the target at -inf reach no target.

    Raises:
        ValueError: targets does not hold labels.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> attacks.classified_as(jnp.array([[2.0, 1.0], [0.0, 1.0]]), jnp.array([1, 1]))
        Array([False,  True], dtype=bool)
    """
    _check_labels(targets)
    return losses.correct(logits, targets) == 1


def never(logits: Logits, reference: Array) -> Bool[Array, " b"]:
    """No point succeeds: the criterion for a loss that compares outputs, such as losses.kl.

    Args:
        logits: [B,K].
        reference: What the loss compares them with, [B,...].

    Returns:
        [B], all False.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks, losses
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x = jnp.array([[0.2, 0.4]])
        >>> x_adv = attacks.pgd(logits_fn, x, logits_fn(x), jax.random.key(0), eps=0.1,
        ...                     loss=losses.kl, criterion=attacks.never)  # TRADES' adversary
        >>> bool(losses.kl(logits_fn(x_adv), logits_fn(x))[0] > 0.01)
        True
    """
    return jnp.zeros(len(logits), bool)


@compiled
def is_adversarial(
    logits_fn: LogitsFn, x_adv: Images, y: Labels, *, targets: Labels | None = None
) -> Bool[Array, " b"]:
    """Whether each point is misclassified, or classified as its target where there are targets.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x_adv: Points [B,...], pixels in [0,1].
        y: Their labels [B].
        targets: The classes [B] to reach; None for any but y.

    Returns:
        [B]. Logits with NaN, +inf or the class at -inf count as misclassified, and reach no target.

    Raises:
        ValueError: x_adv does not hold pixels in [0,1], y or targets do not hold labels of the
            network's classes, or logits_fn does not return logits [B,K].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4], [0.4, 0.5]]), jnp.array([0, 0])
        >>> x_adv = attacks.pgd(logits_fn, x, y, jax.random.key(0), eps=0.1)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True, False]
    """
    logits = logits_fn(jnp.asarray(x_adv))
    if targets is not None:
        return classified_as(logits, jnp.asarray(targets))
    return misclassified(logits, jnp.asarray(y))


def distances(x: Images, x_adv: Images, *, norm: str | Measure = "linf") -> PerExample:
    """The norm of each perturbation x_adv - x, in pixel units.

    Args:
        x: Examples [B,...].
        x_adv: As many points [B,...].
        norm: The name of a norm, "l0" (how many entries differ), or a record.

    Returns:
        [B], in float32 for 16-bit points.

    Raises:
        ValueError: The norm is unknown, the shapes differ, or pixels are not floats.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> attacks.distances(jnp.zeros((1, 2)), jnp.array([[0.3, 0.4]]), norm="l2")
        Array([0.5], dtype=float32)
    """
    x = jnp.asarray(x)
    _checks.floating(x, "x")
    x_adv = jnp.asarray(_checks.points(x_adv, x, "x_adv"))
    return jax.vmap(measure(norm).size)(jnp.asarray(wide(x_adv) - wide(x)))


def succeeds(
    logits: Float[Array, " k"], y: Int[Array, ""], target: Int[Array, ""] | None = None
) -> Bool[Array, ""]:
    """Whether one example is misclassified, or classified as its target where there is one."""
    if target is None:
        return misclassified(logits[None], y[None])[0]
    return classified_as(logits[None], target[None])[0]


def _check_labels(y: Labels) -> None:
    if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"success is judged by labels [B], and these are {y.dtype} {list(y.shape)}; give "
            "criterion=attacks.never where the loss compares outputs"
        )
