"""Types that signatures share: b examples of any shape, k classes; pixels are in [0,1]."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Integer, Key

__all__ = [
    "Array",
    "Images",
    "KeyOrKeys",
    "Labels",
    "Logits",
    "LogitsFn",
    "PerExample",
    "Reference",
]


def __dir__() -> list[str]:
    return __all__


# What a caller may give; what comes back is JAX's.
Array = jax.Array | np.ndarray

# Images [B,H,W,C] as a rule; whatever does not say so takes examples of any shape.
Images = Float[Array, "b ..."]
Labels = Integer[Array, " b"]
Logits = Float[Array, "b k"]
PerExample = Float[Array, " b"]
# A network with its parameters bound, in evaluation mode.
LogitsFn = Callable[[Images], Logits]
# Labels [B] as a rule; logits [B,K] for a loss that compares two outputs, such as losses.kl.
Reference = Labels | Logits
# One key, folded with each example's place in the batch, or a key for each example.
KeyOrKeys = Key[jax.Array, ""] | Key[jax.Array, " b"]
