"""What the iterative attacks share: the best point met so far, and checks of their arguments."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Best(NamedTuple):
    """The best point [H,W,C] met so far: a hit comes before the value, which is maximised."""

    x: Float[Array, "h w c"]
    value: Float[Array, ""]
    hit: Bool[Array, ""]

    def updated(self, x, value, hit) -> "Best":
        better = (hit & ~self.hit) | ((hit == self.hit) & (value > self.value))
        return jax.tree.map(partial(jnp.where, better), Best(x, value, hit), self)


def check_lengths(*, infinite: bool = False, **lengths) -> None:
    """Raises ValueError for the first number that is negative or, unless it may be, infinite.

    None and what is traced are not looked at.
    """
    for name, value in lengths.items():
        if isinstance(value, int | float):
            if not value >= 0:
                raise ValueError(
                    f"{name} must not be negative, not {value!r} (pixels are in [0,1])"
                )
            if value == math.inf and not infinite:
                raise ValueError(f"{name} must be finite, not inf (pixels are in [0,1])")


def check_counts(**counts) -> None:
    """Raises ValueError for the first count that is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_shares(**shares) -> None:
    """Raises ValueError for the first value outside (0, 1]."""
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {value!r}")
