"""Runs an attack and reports which points succeeded and how far away they are."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from robust_jax import _checks
from robust_jax.attacks._autoattack import is_autoattack
from robust_jax.attacks._success import distances, is_adversarial
from robust_jax.attacks.norms import Norm
from robust_jax.types import Images, KeyOrKeys, Labels, LogitsFn


class Outcome(NamedTuple):
    """What an attack found for B examples at one radius, or at each of E radii.

    x_adv: The points, [B,...] or [E,B,...]; x itself where a minimum-norm attack's point is beyond
    the radius. success: Whether they are misclassified, or classified as their targets, [B] or
    [E,B]. distance: How far they are from x, in pixel units, where they succeed, and inf elsewhere.
    """

    x_adv: Images
    success: Bool[Array, "..."]
    distance: Float[Array, "..."]


def run(
    attack: Callable,
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    /,
    *,
    eps: float | Sequence[float],
    norm: Norm | None = None,
    targets: Labels | None = None,
    **keywords: Any,
) -> Outcome:
    """Runs an attack at one radius or several and returns points, success and distances.

    A minimum-norm attack (fab, carlini_wagner, deepfool) runs once, without a bound, for all radii;
    any other attack runs once for each.

    Args:
        attack: One of ATTACKS except autoattack, or a function that is called alike.
        logits_fn: The network, [B,...] -> [B,K].
        x, y, key: As in `pgd`.
        eps: The radius in pixel units, or several.
        norm: A name or a record; None for the attack's default (`transfer` has none).
        targets: As in `pgd`, for attacks that take them.
        keywords: The attack's other arguments.

    Returns:
        An `Outcome`; with several radii its arrays have a leading axis for them.

    Raises:
        ValueError: As the attack does, or eps is empty, or there is no norm.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 1 - x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.2, 0.4], [0.4, 0.5]]), jnp.array([0, 0])
        >>> found = attacks.run(attacks.pgd, logits_fn, x, y, jax.random.key(0), eps=(0.1, 0.3))
        >>> found.success.tolist()
        [[True, False], [True, True]]
    """
    radii: list[Any] = [eps] if np.ndim(eps) == 0 else [*np.asarray(eps).tolist()]
    if not radii:
        raise ValueError("eps is empty; give a radius in pixel units, or several")
    if is_autoattack(attack):
        raise ValueError(
            "autoattack returns its own mask and distances: call it directly, once for each radius"
        )
    parameters = inspect.signature(attack).parameters.items()
    own = {name: p.default for name, p in parameters if p.default is not p.empty}
    if {**own, **keywords}.get("eot_samples"):
        raise ValueError(
            "a network that takes a key, as eot_samples has it, may answer otherwise each time: "
            "call the attack directly, and judge its points over several keys"
        )
    seeks_nearest = own.get("eps") == np.inf
    for radius in radii:
        _checks.known_lengths(eps=radius, infinite=seeks_nearest)
    norm = own.get("norm") if norm is None else norm
    if norm is None:
        raise ValueError(
            "norm is None and the attack has none of its own; give one, e.g. norm='linf'"
        )
    keywords |= {} if targets is None else {"targets": targets}

    def points(eps):
        return attack(logits_fn, x, y, key, eps=eps, norm=norm, **keywords)

    if seeks_nearest:
        nearest = points(np.inf)
        how_far = distances(x, nearest, norm=norm)
        shape = (-1, *[1] * (nearest.ndim - 1))
        found = [jnp.where((how_far <= r).reshape(shape), nearest, jnp.asarray(x)) for r in radii]
    else:
        found = list(map(points, radii))
    success = [is_adversarial(logits_fn, x_adv, y, targets=targets) for x_adv in found]
    distance = [
        jnp.where(ok, distances(x, x_adv, norm=norm), jnp.inf)
        for ok, x_adv in zip(success, found, strict=True)
    ]
    if np.ndim(eps) == 0:
        return Outcome(found[0], success[0], distance[0])
    return Outcome(*map(jnp.stack, (found, success, distance)))
