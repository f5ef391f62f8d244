"""Types that signatures share: b examples of any shape, k classes; pixels are in [0,1]."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Integer, Key, Real

__all__ = [
    "Array",
    "Images",
    "KeyOrKeys",
    "Labels",
    "Length",
    "Logits",
    "LogitsFn",
    "Pair",
    "PerExample",
    "Perturbation",
    "Reference",
    "Scalar",
]


def __dir__() -> list[str]:
    return __all__


# What a caller may pass; functions return JAX arrays.
Array = jax.Array | np.ndarray

# Usually images [B,H,W,C]; what does not say so takes examples of any shape.
Images = Float[Array, "b ..."]
Labels = Integer[Array, " b"]
Logits = Float[Array, "b k"]
PerExample = Float[Array, " b"]
# A network with its parameters bound, in evaluation mode.
LogitsFn = Callable[[Images], Logits]
# Usually labels [B]; logits [B,K] for a loss that compares two outputs, such as losses.kl.
Reference = Labels | Logits
# Within an attack: an example or its perturbation, of any shape, and a number.
Perturbation = Float[jax.Array, "..."]
Scalar = Float[jax.Array, ""]
# A radius, in units of a norm.
Length = float | Real[jax.Array, ""]
# Heights and widths: of kernels, strides and images; low and high: of padding.
Pair = tuple[int, int]
# One key, folded with each example's place in the batch, or a key for each example.
KeyOrKeys = Key[jax.Array, ""] | Key[jax.Array, " b"]
