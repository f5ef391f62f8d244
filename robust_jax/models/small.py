"""Networks for small images, each without normalisation layers."""

from flax import linen as nn
from jaxtyping import Array, Float

from robust_jax._convolution import max_pool2d
from robust_jax.models.layers import (
    ACTIVATIONS,
    MONOTONE,
    Classifier,
    check_choice,
    check_sizes,
    flatten,
)


class Linear(Classifier):
    """Logistic regression on the pixels."""

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        return flatten(x)


class _Activated(Classifier, kw_only=True):
    """A classifier with one activation function throughout, its layers recorded by name."""

    activation: str = "relu"

    def __post_init__(self):
        check_choice("activation", self.activation, ACTIVATIONS)
        super().__post_init__()

    def layer(self, name: str, linear: nn.Module, x: Array, *, pool: int = 1) -> Array:
        """activation(linear(x)), recorded under name; returned after max pooling, if pool > 1."""
        activation = ACTIVATIONS[self.activation]
        x = linear(x)
        activated = activation(x)
        self.sow("intermediates", name, activated)
        if pool == 1:
            return activated
        if self.activation in MONOTONE:  # the same result from fewer pixels
            return activation(max_pool2d(x, pool))
        return max_pool2d(activated, pool)


class MLP(_Activated, kw_only=True):
    """Dense layers on the pixels."""

    hidden: tuple[int, ...] = (256, 256)

    def __post_init__(self):
        check_sizes("hidden", self.hidden)
        super().__post_init__()

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        x = flatten(x)
        for i, width in enumerate(self.hidden, start=1):
            x = self.layer(f"dense{i}", self.dense(width), x)
        return x


class LeNet5(_Activated):
    """LeNet-5 with ReLU and max pooling, as Guided Complement Entropy uses it (1903.09799)."""

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        x = self.layer("conv1", self.conv(6, 5), x, pool=2)
        x = self.layer("conv2", self.conv(16, 5, padding="VALID"), x, pool=2)
        x = self.layer("dense1", self.dense(120), flatten(x))
        return self.layer("dense2", self.dense(84), x)


class CNN(_Activated, kw_only=True):
    """One 3x3 convolution per width, each pooled while the image is 8 pixels or more."""

    widths: tuple[int, ...] = (16, 32)
    hidden: int = 64

    def __post_init__(self):
        check_sizes("widths", self.widths)
        check_sizes("hidden", self.hidden)
        super().__post_init__()

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        for i, width in enumerate(self.widths, start=1):
            pool = 2 if min(x.shape[1:3]) >= 8 else 1
            x = self.layer(f"conv{i}", self.conv(width, 3), x, pool=pool)
        return self.layer("dense1", self.dense(self.hidden), flatten(x))


class MadryCNN(_Activated):
    """The network of the MNIST challenge (Madry et al., 1706.06083)."""

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        x = self.layer("conv1", self.conv(32, 5), x, pool=2)
        x = self.layer("conv2", self.conv(64, 5), x, pool=2)
        return self.layer("dense1", self.dense(1024), flatten(x))


class SmallCNN(_Activated, kw_only=True):
    """Valid 3x3 convolutions, every second one pooled, and dense layers.

    The default is TRADES' SmallCNN (1901.08573) without its dropout of 0.5 after the first dense
    layer, which is the MNIST network of 1907.11780. The CIFAR-10 network there has the widths 64,
    64, 128 and 128, two dense layers of 256 and a dropout of 0.5 after each.
    """

    widths: tuple[int, ...] = (32, 32, 64, 64)
    hidden: tuple[int, ...] = (200, 200)
    dropout_rate: float = 0.0

    def __post_init__(self):
        check_sizes("widths", self.widths)
        check_sizes("hidden", self.hidden)
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate!r} must be in [0, 1)")
        super().__post_init__()

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        for i, width in enumerate(self.widths, start=1):
            pool = 2 if i % 2 == 0 else 1
            x = self.layer(f"conv{i}", self.conv(width, 3, padding="VALID"), x, pool=pool)
        x = flatten(x)
        for i, width in enumerate(self.hidden, start=1):
            x = self.layer(f"dense{i}", self.dense(width), x)
            if train and self.dropout_rate:
                x = self.dropout(x, self.dropout_rate, i)
        return x
