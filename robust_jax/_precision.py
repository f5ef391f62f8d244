"""What half precision is too coarse for: sums over classes, pixels and examples."""

from typing import Any, overload

import jax
import jax.numpy as jnp
from jaxtyping import Float

from robust_jax.types import Array


def wide_dtype(dtype: Any) -> Any:
    """The dtype, or float32 where it has 16 bits."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


@overload
def wide(x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]: ...
@overload
def wide(x: Float[Array, "..."]) -> Float[Array, "..."]: ...
def wide(x):
    """x in float32 where it has 16 bits, else as it is."""
    return x.astype(wide_dtype(x.dtype))
