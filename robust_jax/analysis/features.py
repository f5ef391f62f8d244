"""What a change of the image does to each layer of a network.

A features_fn maps images [B,H,W,C] to a dict of arrays [B,…], one a layer, each example on its own.
`captured` makes one of a linen network; for any other write one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_jax._front import compiled
from robust_jax.attacks._best import check_lengths
from robust_jax.attacks.norms import Norm, threat_model
from robust_jax.batches import in_chunks
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys

FeaturesFn = Callable[[Images], Mapping[str, Float[Array, "b ..."]]]


def captured(model: Any, variables: Any, *, every_module: bool = False) -> FeaturesFn:
    """The features_fn of a linen network: what it sows as "intermediates", then its logits.

    The networks of `models` sow their hidden layers after the activation, and "features", the
    input of the last layer. every_module: the outputs of all submodules too, under their paths,
    for a network that sows nothing. Something sown several times is numbered. A call costs one
    forward pass and holds every layer's values of the whole batch.
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
    features_fn: FeaturesFn, x: Images, x_moved: Images, *, chunk_size: int | None = None
) -> dict[str, Float[Array, " b"]]:
    """‖h(x_moved) - h(x)‖₂ / ‖x_moved - x‖₂ of each layer h, [B], in its units per pixel unit.

    After arXiv 2011.07478. x_moved: adversarial points from any attack, or `random_neighbour`.
    NaN where x did not move. Costs two forward passes an example; chunk_size bounds how many
    examples are in memory.
    """

    changes = _change(features_fn, x, x_moved, chunk_size=chunk_size)
    return {name: changes[name] for name in features_fn(x[:1])}  # in the order of the layers


@compiled
def _change(features_fn: FeaturesFn, x: Images, x_moved: Images, *, chunk_size: int | None):
    def change_one(pair):
        before, after = (features_fn(one[None]) for one in pair)
        distance = _l2(pair[1] - pair[0])
        return {name: _l2(after[name] - before[name]) / distance for name in before}

    return in_chunks(change_one, (x, x_moved), chunk_size)


def random_neighbour(x: Images, key: KeyOrKeys, *, eps: float, norm: Norm = "linf") -> Images:
    """A random point at distance eps from each x, clipped to [0,1].

    The random counterpart of an adversarial point, at the cost of the draw: no network is called.
    Raises ValueError for a negative eps or an unknown norm.
    """
    check_lengths(eps=eps)
    threat = threat_model(norm)
    x = jnp.asarray(x)
    radius = jnp.asarray(eps, x.dtype)

    def move(x, key):
        return jnp.clip(x + threat.random_on_sphere(key, x, radius), 0.0, 1.0)

    return jax.vmap(move)(x, example_keys(key, x.shape[0]))


def _l2(values: Array) -> Float[Array, ""]:
    return jnp.linalg.norm(values.ravel())
