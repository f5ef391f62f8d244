"""Transfer attacks: what fools one network, shown to another."""

from collections.abc import Callable

import jax.numpy as jnp

from robust_jax._front import compiled
from robust_jax.attacks._autoattack import is_autoattack
from robust_jax.attacks._pgd import pgd
from robust_jax.attacks._success import is_adversarial
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn


@compiled
def transfer(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    surrogate: LogitsFn,
    attack: Callable = pgd,
    eps: Length,
    **keywords,
) -> Images:
    """Adversarials made on a surrogate network, to be tried on this one.

    Args:
        logits_fn: The network, [B,...] -> [B,K]; it is only evaluated, at x.
        x, y, key, eps: As in `pgd`.
        surrogate: The network that is attacked instead.
        attack: One of ATTACKS except autoattack, or a function that is called alike.
        keywords: The attack's other keywords: norm, num_steps and so on.

    Returns:
        [B,...]: x itself where logits_fn is already wrong (or, with targets, already at the
        target), so that no such point becomes correct by chance.

    Raises:
        ValueError: As the attack does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> other = lambda x: jnp.stack([x[:, 0], 0.4 - x[:, 0]], -1)
        >>> x, y = jnp.array([[0.25, 0.3]]), jnp.array([0])
        >>> x_adv = attacks.transfer(
        ...     logits_fn, x, y, jax.random.key(0), surrogate=other, attack=attacks.fgsm, eps=0.1
        ... )
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True]

    Reference:
        Papernot et al. 2016, arXiv 1605.07277.
    """
    if is_autoattack(attack):
        raise ValueError(
            "autoattack is a loop on the host: call it with the surrogate, and show its x_adv to "
            "logits_fn with is_adversarial"
        )
    x, y = jnp.asarray(x), jnp.asarray(y)
    x_adv = attack(surrogate, x, y, key, eps=eps, **keywords)
    wrong = is_adversarial(logits_fn, x, y, targets=keywords.get("targets"))
    return jnp.where(wrong.reshape(-1, *[1] * (x.ndim - 1)), x, x_adv)
