"""Types for what half precision is too coarse for: sums over classes, pixels and examples."""

from typing import Any, overload

import jax
import jax.numpy as jnp
from jaxtyping import Float

from robust_jax.types import Array, Length, Scalar


def wide_dtype(dtype: Any) -> Any:
    """The dtype, or float32 if it has 16 bits."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


@overload
def wide(x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]: ...
@overload
def wide(x: Float[Array, "..."]) -> Float[Array, "..."]: ...
def wide(x):
    """x in float32 if it has 16 bits, else as it is."""
    return x.astype(wide_dtype(x.dtype))


def length_in(eps: Length, dtype: Any) -> Scalar:
    """eps in the examples' dtype, rounded down in 16 bits so that the ball does not grow."""
    found = jnp.asarray(eps, dtype)
    if jnp.finfo(dtype).bits >= 32:
        return found
    too_large = wide(found) > jnp.asarray(eps, jnp.float32)
    return jnp.where(too_large, jnp.nextafter(found, jnp.zeros((), dtype)), found)
