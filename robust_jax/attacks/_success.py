"""Whether an attack succeeded, and how far it went."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks.norms import Measure, measure
from robust_jax.types import Array, Images, Labels, Logits, LogitsFn, PerExample

# criterion(logits [B,K], reference [B,...]) -> [B]: whether points with these logits succeed. The
# reference is y, or the targets of an attack that has targets.
Criterion = Callable[[Logits, Array], Bool[Array, " b"]]


def misclassified(logits: Logits, y: Labels) -> Bool[Array, " b"]:
    """Whether another class than the label wins, or logits are not finite.

    Args:
        logits: [B,K].
        y: Labels [B].

    Returns:
        [B].

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> attacks.misclassified(jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([0, 1])).tolist()
        [False, True]
    """
    _check_labels(y)
    return losses.correct(logits, y) == 0


def classified_as(logits: Logits, targets: Labels) -> Bool[Array, " b"]:
    """Whether the target wins.

    Args:
        logits: [B,K].
        targets: Classes [B].

    Returns:
        [B].

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> attacks.classified_as(jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([0, 1])).tolist()
        [True, False]
    """
    _check_labels(targets)
    return losses.correct(logits, targets) == 1


def never(logits: Logits, reference: Array) -> Bool[Array, " b"]:
    """No point succeeds: for a loss that compares outputs, as losses.kl does.

    Args:
        logits: [B,K].
        reference: [B,...].

    Returns:
        [B].

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> attacks.never(jnp.zeros((1, 2)), jnp.zeros((1, 2))).tolist()
        [False]
    """
    return jnp.zeros(len(logits), bool)


@compiled
def is_adversarial(
    logits_fn: LogitsFn, x_adv: Images, y: Labels, *, targets: Int[Array, " b"] | None = None
) -> Bool[Array, " b"]:
    """Whether each point is misclassified, or classified as its target where there are targets.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x_adv: Points [B,...], pixels in [0,1].
        y: Their labels [B].
        targets: The classes [B] to reach; None for any but y.

    Returns:
        [B]. Logits that are not all finite count as misclassified, and reach no target.

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
        norm: The name of a norm (or "l0", how many entries differ), or a record.

    Returns:
        [B].

    Raises:
        ValueError: The norm has no such name.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> attacks.distances(jnp.zeros((1, 2)), jnp.array([[0.3, 0.4]]), norm="l2").tolist()
        [0.5]
    """
    return jax.vmap(measure(norm).size)(jnp.asarray(x_adv) - jnp.asarray(x))


def _check_labels(y: Array) -> None:
    if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"whether an attack succeeds is a matter of labels [B], not of {y.dtype} "
            f"{list(y.shape)}; give criterion=attacks.never where the loss compares outputs"
        )
