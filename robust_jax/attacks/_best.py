"""What the attacks share: the best point met so far, what they look for, checks of arguments."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_jax._precision import wide_dtype
from robust_jax.attacks._success import Criterion, classified_as, misclassified


class Best(NamedTuple):
    """The best point [...] met so far: a hit comes before the value, which is maximised."""

    x: Float[Array, "..."]
    value: Float[Array, ""]
    hit: Bool[Array, ""]

    @classmethod
    def nothing(cls, x) -> "Best":
        """x itself, worse than anything that will be met."""
        return cls(x, jnp.asarray(-jnp.inf, value_dtype(x)), jnp.asarray(False))

    def updated(self, x, value, hit) -> "Best":
        better = (hit & ~self.hit) | ((hit == self.hit) & (value > self.value))
        return jax.tree.map(partial(jnp.where, better), Best(x, value, hit), self)


def value_dtype(x):
    """The dtype in which losses at points like x are compared: float32 at least."""
    return wide_dtype(x.dtype)


class Objective(NamedTuple):
    """What an attack raises and when it has succeeded, both of logits and a reference.

    The reference is y, or the targets where there are any; the loss towards those is lowered.
    """

    loss: Callable
    targets: Int[Array, " b"] | None = None
    criterion: Criterion | None = None

    def reference(self, y):
        return y if self.targets is None else jnp.asarray(self.targets)

    def judged(self, logits, reference):
        """Values and hits [S] of logits [S,K], for references [S]."""
        values = self.loss(logits, reference)
        default = misclassified if self.targets is None else classified_as
        hits = (self.criterion or default)(logits, reference)
        return values if self.targets is None else -values, hits

    def at(self, logits_fn, x_adv, reference):
        """Value and hit of one point."""
        values, hits = self.judged(logits_fn(x_adv[None]), reference[None])
        return values[0].astype(value_dtype(x_adv)), hits[0]


def check_lengths(*, infinite: bool = False, **lengths) -> None:
    """Raises ValueError for the first that is no number, negative or, unless it may be, infinite.

    None and arrays, which may be traced, are not looked at.
    """
    for name, value in lengths.items():
        if value is not None and not isinstance(value, jax.Array | np.ndarray | np.generic):
            if not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, not {value!r} (pixels are in [0,1])")
            if not value >= 0:
                raise ValueError(
                    f"{name} must not be negative, not {value!r} (pixels are in [0,1])"
                )
            if value == math.inf and not infinite:
                raise ValueError(f"{name} must be finite, not inf (pixels are in [0,1])")


def check_counts(**counts) -> None:
    """Raises ValueError for the first count that is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_shares(**shares) -> None:
    """Raises ValueError for the first value outside (0, 1]."""
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {value!r}")
