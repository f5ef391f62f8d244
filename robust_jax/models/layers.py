"""What the models share: the normalised input, the logits, activations and norm layers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from robust_jax import types
from robust_jax._convolution import IMPLEMENTATIONS, Padding, conv2d

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": nn.relu, "silu": nn.silu}
MONOTONE = ("relu",)  # activations that commute with a maximum
NORMS = ("batch", "group")

dense_init = nn.initializers.he_normal()
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al., 1502.01852


def check_choice(field: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a ValueError that names the field, the value and the choices."""
    if value not in (choices := tuple(choices)):
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_sizes(field: str, sizes: float | Iterable[float]) -> None:
    """Raises a ValueError that names the field and the value if a size is not above 0."""
    values = (sizes,) if isinstance(sizes, int | float) else tuple(sizes)
    if not all(size > 0 for size in values):
        raise ValueError(f"{field}={sizes!r} must be above 0")


def num_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays or of ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def normalize(
    x: Float[types.Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...], dtype: Any
) -> Float[Array, "b h w c"]:
    """(x - mean) / std per channel, computed in at least float32 and returned in dtype."""
    for field, value in (("mean", mean), ("std", std)):
        check_choice(f"len({field})", len(value), sorted({1, x.shape[-1]}))
    # numpy's promotion, since JAX may be configured to allow none.
    wide = np.promote_types(dtype, np.float32)
    return ((jnp.asarray(x, wide) - jnp.asarray(mean, wide)) / jnp.asarray(std, wide)).astype(dtype)


class Conv(nn.Module):
    """`conv2d` with parameters `kernel` and `bias`, named and shaped as `flax.linen.Conv`'s."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "SAME"
    use_bias: bool = True
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b v u o"]:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[-1:], jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv2d(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            implementation=self.implementation,
        )
        return y if bias is None else y + bias


class Classifier(nn.Module, kw_only=True):
    """Images in [0, 1] to logits; a subclass maps the normalised images to features [b, d]."""

    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32  # of the computation; parameters are float32, logits at least float32
    axis_name: str | None = None  # mapped axis over which BatchNorm synchronises when training
    conv_implementation: str = "auto"
    dropout_keys: Any = None  # [b], one key per example, for training with dropout

    def __post_init__(self):
        check_choice("conv_implementation", self.conv_implementation, IMPLEMENTATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[types.Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b k"]:
        features = self.features(normalize(x, self.mean, self.std, self.dtype), train)
        self.sow("intermediates", "features", features)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(features)
        return logits.astype(np.promote_types(self.dtype, np.float32))

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        """The input of the last dense layer."""
        raise NotImplementedError  # abstract: networks differ in their features alone

    def conv(self, features: int, size: int, **kwargs) -> Conv:
        """A size x size convolution that follows the model's fields."""
        return Conv(
            features,
            (size, size),
            dtype=self.dtype,
            kernel_init=conv_init,
            implementation=self.conv_implementation,
            **kwargs,
        )

    def dense(self, features: int) -> nn.Dense:
        """A hidden dense layer that follows the model's fields."""
        return nn.Dense(features, dtype=self.dtype, kernel_init=dense_init)

    def dropout(self, x: Float[Array, "b d"], rate: float, index: int) -> Float[Array, "b d"]:
        """Sets a share of each example's values to 0 at random and scales up the others for it.

        The draws use the example's own key, folded with the index of the layer, so that nothing
        depends on the batch or the device.
        """
        if self.dropout_keys is None:
            raise ValueError("a network with dropout needs dropout_keys to train")

        def drop(x, key):
            kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape)
            return jnp.where(kept, x / (1 - rate), 0)

        return jax.vmap(drop)(x, self.dropout_keys)


def flatten(x: Float[Array, "b ..."]) -> Float[Array, "b d"]:
    """All axes but the first as one; for images in the order height, width, channel."""
    return x.reshape(x.shape[0], -1)
