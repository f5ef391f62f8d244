"""What a change of the image does to each layer of a network.

A features_fn maps examples [B,...] to a dict of arrays [B,...], one per layer, each example on
its own. `captured` makes one from a linen network; for any other, write your own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_jax import _checks
from robust_jax._front import compiled
from robust_jax._precision import wide
from robust_jax.attacks.norms import Norm, threat_model
from robust_jax.batches import in_chunks
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Length

__all__ = [
    "FeaturesFn",
    "captured",
    "change",
    "point_at_distance",
]


def __dir__() -> list[str]:
    return __all__


FeaturesFn = Callable[[Images], Mapping[str, Float[Array, "b ..."]]]


def captured(model: Any, variables: Any, *, every_module: bool = False) -> FeaturesFn:
    """The features_fn of a linen network: what it sows as "intermediates", then its logits.

    The networks of `models` sow their hidden layers after the activation, and "features", the
    input of the last layer. Values sown several times are numbered. A call costs one forward pass
    and holds every layer's values for the whole batch.

    Args:
        model: The linen network.
        variables: Its variables.
        every_module: Whether the outputs of all submodules count too, under their paths, for a
            network that sows nothing.

    Returns:
        features_fn(x), [B,...] -> arrays [B,...] by layer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import models
        >>> from robust_jax.analysis import features
        >>> x = jnp.zeros((1, 2, 2, 1))
        >>> model = models.MLP(num_classes=3, hidden=(4,))
        >>> features_fn = features.captured(model, model.init(jax.random.key(0), x))
        >>> features_fn(x)["logits"].shape
        (1, 3)
    """
    from flax.traverse_util import flatten_dict

    def features_fn(x):
        logits, state = model.apply(
            variables, x, mutable=["intermediates"], capture_intermediates=every_module
        )
        sown = flatten_dict(state.get("intermediates", {}), sep="/")
        found: dict[str, Array] = {}
        for path, values in sown.items():
            name = path.removesuffix("__call__").rstrip("/")
            if name:  # else it is the network's own output
                one = len(values) == 1
                found |= {name if one else f"{name}[{i}]": v for i, v in enumerate(values)}
        return found | {"logits": logits}

    return features_fn


def change(
    features_fn: FeaturesFn,
    x: Images,
    x_moved: Images,
    *,
    relative: bool = False,
    chunk_size: int | None = None,
) -> dict[str, Float[Array, " b"]]:
    """‖h(x_moved) - h(x)‖₂ / ‖x_moved - x‖₂ of each layer h.

    Layers differ in scale, and so does one layer between two networks (a norm layer may undo what
    the weights do): if relative, the change is also divided by ‖h(x)‖₂. Costs two forward passes
    per example.

    Args:
        features_fn: As `captured` makes it, [B,...] -> arrays [B,...] by layer.
        x: Examples [B,...].
        x_moved: As many points, adversarial ones from any attack, or `point_at_distance`.
        relative: Whether the change is a share of the layer's values at x.
        chunk_size: How many examples are in memory at a time; None for all.

    Returns:
        By layer [B], in its units (or 1, if relative) per pixel unit; NaN where x did not move.

    Raises:
        ValueError: x_moved does not have the shape of x, or one of them does not hold floats.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax.analysis import features
        >>> x = jnp.array([[0.2, 0.4]])
        >>> features.change(lambda x: {"doubled": 2 * x}, x, x + 0.1)
        {'doubled': Array([2.], dtype=float32)}

    Reference:
        Wen, Li & Jia 2020, arXiv 2011.07478; the relative form is ours.
    """
    x = jnp.asarray(x)
    changes = _change(features_fn, x, x_moved, relative=relative, chunk_size=chunk_size)
    layers: list[str] = []  # in their own order, which a program's outputs lose
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    jax.eval_shape(lambda x: layers.extend(features_fn(x)), one)
    return {name: changes[name] for name in layers}


@compiled
def _change(
    features_fn: FeaturesFn, x: Images, x_moved: Images, *, relative: bool, chunk_size: int | None
):
    def change_one(pair):
        before, after = (features_fn(one[None]) for one in pair)
        distance = _l2(pair[1] - pair[0])
        moved = {name: _l2(after[name] - before[name]) / distance for name in before}
        return {n: v / _l2(before[n]) for n, v in moved.items()} if relative else moved

    return in_chunks(change_one, (x, x_moved), chunk_size)


@compiled
def point_at_distance(x: Images, key: KeyOrKeys, *, eps: Length, norm: Norm = "linf") -> Images:
    """A random point at distance eps from each x, clipped to [0,1].

    The random counterpart of an adversarial point. Costs only the draw; no network is called.

    Args:
        x: Examples [B,...], pixels in [0,1].
        key: One key, or one for each example [B].
        eps: The distance, in pixel units.
        norm: A name or a record.

    Returns:
        [B,...].

    Raises:
        ValueError: eps is negative or the norm unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> from robust_jax.analysis import features
        >>> x = jnp.full((1, 3), 0.5)
        >>> moved = features.point_at_distance(x, jax.random.key(0), eps=0.1, norm="l2")
        >>> attacks.distances(x, moved, norm="l2")
        Array([0.1], dtype=float32)
    """
    _checks.known_lengths(eps=eps)
    threat = threat_model(norm)
    x = jnp.asarray(x)
    radius = jnp.asarray(eps, x.dtype)

    def move(x, key):
        return jnp.clip(x + threat.random_on_sphere(key, x, radius), 0.0, 1.0)

    return jax.vmap(move)(x, example_keys(key, x.shape[0]))


def _l2(values: Array) -> Float[Array, ""]:
    return jnp.linalg.norm(wide(values).ravel())
