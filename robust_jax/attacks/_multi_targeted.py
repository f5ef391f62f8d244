"""MultiTargeted: PGD towards one wrong class after another. Source: arXiv 1910.09338."""

import jax
import jax.numpy as jnp

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax.attacks._best import Best, likeliest_wrong, value_dtype
from robust_jax.attacks._pgd import pgd
from robust_jax.attacks._success import misclassified
from robust_jax.attacks.norms import Norm
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn


@compiled
def multi_targeted(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 20,
    step_size: Length | None = None,
    num_targets: int | None = None,
    num_restarts: int = 1,
) -> Images:
    """PGD on z_t - z_y for each wrong class t in turn.

    Costs num_targets · num_restarts · num_steps gradients per example.

    Args:
        logits_fn, x, key, eps, norm, num_steps, step_size: As in `pgd`.
        y: Labels [B].
        num_targets: How many of the likeliest wrong classes to aim at; None for all of them.
        num_restarts: Runs towards each class.

    Returns:
        [B,...]: the best point of all runs: misclassification as any class counts first, then the
        least margin.

    Raises:
        ValueError: As `pgd` does, and for num_targets below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4]]), jnp.array([0])
        >>> x_adv = attacks.multi_targeted(logits_fn, x, y, jax.random.key(0), eps=0.1)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True]

    Reference:
        Gowal et al. 2019, arXiv 1910.09338.
    """
    if num_targets is not None:
        _checks.counts(num_targets=num_targets)
    x, y = jnp.asarray(x), jnp.asarray(y)

    def attack_one(x, y, key):
        logits = logits_fn(x[None])[0]

        def run(best, target_and_rank):
            target, rank = target_and_rank
            x_adv = pgd(
                logits_fn,
                x[None],
                y[None],
                jax.random.fold_in(key, rank)[None],
                eps=eps,
                norm=norm,
                num_steps=num_steps,
                step_size=step_size,
                num_restarts=num_restarts,
                loss=lambda logits, y: losses.targeted_margin(logits, y, target[None]),
            )
            logits = logits_fn(x_adv)
            value = -losses.margin(logits, y[None])[0].astype(value_dtype(x))
            return best.updated(x_adv[0], value, misclassified(logits, y[None])[0]), None

        runs = likeliest_wrong(logits, y, num_targets or len(logits))
        best, _ = jax.lax.scan(run, Best.nothing(x), runs)
        return best.x

    return jax.vmap(attack_one)(x, y, example_keys(key, len(x)))
