"""What half precision is too coarse for: sums over classes, pixels and examples."""

import jax.numpy as jnp
from jaxtyping import Float

from robust_jax.types import Array


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32 where it has 16 bits, else as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
