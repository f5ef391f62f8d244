"""The Jacobian-based saliency map attack, which changes a few pixel values as far as they go.

Written for one example and lifted over the batch by a single jax.vmap. Source: arXiv 1511.07528.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robust_jax import _checks
from robust_jax._front import compiled
from robust_jax.attacks._best import likeliest_wrong
from robust_jax.attacks._perturbations import finite, tiny
from robust_jax.attacks._success import succeeds
from robust_jax.attacks.norms import L0
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn

# How many pairs of features are held in memory at a time, for each example.
_PAIRS_AT_ONCE = 2**14


@compiled
def jsma(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Literal["l0"] = "l0",
    theta: float = 1.0,
    targets: Labels | None = None,
) -> Images:
    """Repeatedly changes the most salient pair of pixel values.

    Of the pairs that raise the target's logit and lower the sum of the others, each step moves the
    one with the largest product of the two effects by theta, within [0,1]. The search ends when the
    target is reached, no pair is left, or the next would change more than eps entries in all; with
    theta=±1 an odd eps is equivalent to eps - 1. A step takes one pass through the network and two
    gradients, and looks at all pairs of n pixel values, 16,384 at a time for each example.

    Args:
        logits_fn, x: As in `pgd`.
        y: Labels [B].
        key: Unused, since nothing is drawn.
        eps: How many entries of an example may change.
        norm: "l0".
        theta: The change, in pixel units, in [-1,1] and not 0. Below 0, pixels darken.
        targets: Classes [B] to reach. None aims at each example's likeliest wrong class and
            accepts any wrong class.

    Returns:
        [B,...]: the points where the search ended. Derivatives with respect to x and weights are 0.

    Raises:
        ValueError: eps is negative, theta 0 or outside [-1,1], or the norm not l0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 3 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4, 0.3, 0.1]]), jnp.array([1])
        >>> x_adv = attacks.jsma(logits_fn, x, y, jax.random.key(0), eps=2)
        >>> attacks.distances(x, x_adv, norm="l0")
        Array([2.], dtype=float32)

    Reference:
        Papernot et al. 2016, arXiv 1511.07528, alg. 3.
    """
    _checks.known_lengths(eps=eps)
    if not 0 < abs(theta) <= 1:
        raise ValueError(f"theta must be in [-1, 1] and not 0, not {theta!r}")
    if norm != L0.name and norm is not L0:
        raise ValueError(f"norm must be l0, not {norm!r}")
    # No gradient flows back through the search.
    x, y = jax.lax.stop_gradient(jnp.asarray(x)), jnp.asarray(y)
    towards = 1.0 if theta > 0 else -1.0

    def logits_of(x):
        return logits_fn(x[None])[0]

    def attack_one(x, y, target):
        aim = likeliest_wrong(logits_of(x), y, 1)[0][0] if target is None else target

        def step(state):
            x_adv, _ = state
            logits, pull = jax.vjp(logits_of, x_adv)
            onto = jax.nn.one_hot(aim[None], len(logits), dtype=logits.dtype)[0]
            gain, cost = (_scaled(towards * pull(along)[0].ravel()) for along in (onto, 1 - onto))
            # In 16 bits a small theta may be lost in rounding, even inside the box.
            free = (jnp.clip(x_adv + jnp.asarray(theta, x.dtype), 0, 1) != x_adv).ravel()
            changed = (x_adv != x).ravel()
            pair, found = most_salient_pair(gain, cost, free, changed, eps)
            change = jnp.where(found, theta, 0.0).astype(x.dtype)
            moved = x_adv.ravel().at[pair].add(change).reshape(x.shape)
            x_adv = jnp.clip(moved, 0.0, 1.0)
            return x_adv, ~found | succeeds(logits_of(x_adv), y, target)

        start = (x, succeeds(logits_of(x), y, target))
        return jax.lax.while_loop(lambda state: ~state[1], step, start)[0]

    return jax.vmap(attack_one)(x, y, None if targets is None else jnp.asarray(targets))


def most_salient_pair(
    gain: Float[Array, " p"],
    cost: Float[Array, " p"],
    free: Bool[Array, " p"],
    changed: Bool[Array, " p"],
    budget: Length,
) -> tuple[Int[Array, " 2"], Bool[Array, ""]]:
    """The pair (i, j) with the largest -(gain_i + gain_j)·(cost_i + cost_j), and if one exists.

    A pair counts only if both features are free, its gain is above 0 and its cost below 0, and it
    leaves no more than `budget` features changed.
    """
    features = jnp.arange(len(gain))
    gain = jnp.where(free, gain, -jnp.inf)
    new = (~changed).astype(jnp.float32)
    left = jnp.asarray(budget, jnp.float32) - changed.sum(dtype=jnp.float32)

    def saliency_with(i):
        gains, costs = gain[i] + gain, cost[i] + cost
        allowed = (gains > 0) & (costs < 0) & (new[i] + new <= left) & (features != i)
        return jnp.where(allowed, -gains * costs, 0.0)

    rows = min(max(_PAIRS_AT_ONCE // len(gain), 1), len(gain))
    saliency = jax.lax.map(lambda i: saliency_with(i).max(), features, batch_size=rows)
    i = jnp.argmax(saliency)
    return jnp.stack([i, jnp.argmax(saliency_with(i))]), saliency[i] > 0


def _scaled(gradient):
    """The gradient with its largest entry at ±1, so that products do not underflow; NaN as 0."""
    gradient = finite(gradient)
    return gradient / jnp.maximum(jnp.abs(gradient).max(), tiny(gradient.dtype))
