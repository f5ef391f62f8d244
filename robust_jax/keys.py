"""Random keys that follow the example, not the batch or the device it happens to be in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from robust_jax.types import KeyOrKeys


def example_keys(key: KeyOrKeys, num_examples: int) -> Key[Array, " b"]:
    """A key for each example: the key folded with 0…B-1, or the keys [B] themselves."""
    if key.ndim == 1:
        return key
    return fold_in_each(key, jnp.arange(num_examples))


def fold_in_each(key: Key[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """The key folded with each example's index, [] and [B] -> [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def fold_each(keys: Key[Array, " b"], data: int | Int[Array, ""]) -> Key[Array, " b"]:
    """Each example's key folded with the same number: one for every use of randomness."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)
