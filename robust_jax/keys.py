"""Random keys that follow the example, not the batch or the device it happens to be in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer, Key

from robust_jax.batches import MapExamples
from robust_jax.types import KeyOrKeys


def example_keys(key: KeyOrKeys, num_examples: int) -> Key[Array, " b"]:
    """A key for each example: the key folded with 0…B-1, or the keys [B] themselves."""
    if key.ndim == 1:
        return key
    return fold_in_each(key, jnp.arange(num_examples))


def drawn_one_by_one(key: KeyOrKeys) -> KeyOrKeys:
    """The same key for JAX's default generator, whose draws under vmap are those of each key alone.

    Under vmap, draws of "rbg" depend on the neighbouring keys.
    """
    if jnp.shape(jax.random.key_data(key))[-1] == 2:  # two words: it is already threefry
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key)[..., :2], impl="threefry2x32")


def fold_in_each(key: Key[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """The key folded with each example's index, [] and [B] -> [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def fold_each(keys: Key[Array, " b"], data: int | Integer[Array, ""]) -> Key[Array, " b"]:
    """Each example's key folded with the same number, one for each use of randomness."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def with_keys(map_examples: MapExamples, keys: Key[Array, " b"]) -> MapExamples:
    """The mapping that gives fn keys like these, made from the key data in rows["key"]."""
    return lambda fn: map_examples(_WithKeys(fn, jax.random.key_impl(keys)))


@dataclasses.dataclass(frozen=True)
class _WithKeys:
    """fn(logits_fn, rows, *scalars), given keys; equal instances share one program."""

    fn: Callable
    impl: Any

    def __call__(self, logits_fn, rows, *scalars):
        keys = jax.random.wrap_key_data(rows["key"], impl=self.impl)
        return self.fn(logits_fn, {**rows, "key": keys}, *scalars)
