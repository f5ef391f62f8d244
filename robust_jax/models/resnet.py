"""Residual networks: pre-activation ones for images of about 32x32, ResNet-50 for larger ones."""

import math
from typing import ClassVar

from flax import linen as nn
from jaxtyping import Array, Float

from robust_jax._convolution import global_avg_pool2d
from robust_jax.models.layers import (
    ACTIVATIONS,
    NORMS,
    Classifier,
    check_choice,
    check_sizes,
)


class _Normalized(Classifier, kw_only=True):
    """A network with a norm layer before its activations."""

    norm: str = "batch"
    activation: str = "relu"

    def __post_init__(self):
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        super().__post_init__()

    def normed(self, x: Array, train: bool) -> Array:
        if self.norm == "group":  # fewer groups than the paper's 32 if 32 does not divide
            return nn.GroupNorm(math.gcd(32, x.shape[-1]), epsilon=1e-5, dtype=self.dtype)(x)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )(x)

    def padded_conv(self, channels: int, size: int, x: Array, stride: int = 1) -> Array:
        """Pads all sides equally; with stride 2, "SAME" would pad the bottom and right more."""
        padding = ((size // 2, size // 2),) * 2
        conv = self.conv(channels, size, strides=(stride, stride), padding=padding, use_bias=False)
        return conv(x)

    def norm_and_activation(self, x: Array, train: bool) -> Array:
        return ACTIVATIONS[self.activation](self.normed(x, train))


class _PreActivationNet(_Normalized, kw_only=True):
    """Stem, stages of two-convolution blocks, norm, activation and pooling (1603.05027)."""

    def stages(self) -> tuple[int, list[tuple[int, int, int]]]:
        """Channels of the stem, and (blocks, channels, stride) of each stage."""
        raise NotImplementedError  # abstract: the two families differ in their stages alone

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        stem, stages = self.stages()
        x = self.padded_conv(stem, 3, x)
        self.sow("intermediates", "stem", x)
        for i, (blocks, channels, stride) in enumerate(stages, start=1):
            for block in range(blocks):
                x = self.block(channels, stride if block == 0 else 1, x, train)
            self.sow("intermediates", f"stage{i}", x)
        return global_avg_pool2d(self.norm_and_activation(x, train))

    def block(self, channels: int, stride: int, x: Array, train: bool) -> Array:
        """x + conv(act(norm(conv(act(norm(x)))))); where the shape changes, x is projected."""
        h = self.norm_and_activation(x, train)
        if stride != 1 or x.shape[-1] != channels:
            # The projection reads the activated input, as in both references.
            x = self.padded_conv(channels, 1, h, stride)
        h = self.padded_conv(channels, 3, h, stride)
        return x + self.padded_conv(channels, 3, self.norm_and_activation(h, train))


class PreActResNet(_PreActivationNet, kw_only=True):
    """PreActResNet with the final norm and activation of Rice et al. (2002.11569)."""

    BLOCKS: ClassVar[dict[int, tuple[int, ...]]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

    depth: int = 18
    width: float = 1.0  # multiplies 64, 128, 256, 512 channels

    def __post_init__(self):
        check_choice("depth", self.depth, self.BLOCKS)
        check_sizes("width", round(64 * self.width))
        super().__post_init__()

    def stages(self) -> tuple[int, list[tuple[int, int, int]]]:
        channels = [round(64 * 2**i * self.width) for i in range(4)]
        return channels[0], list(zip(self.BLOCKS[self.depth], channels, (1, 2, 2, 2), strict=True))


class WideResNet(_PreActivationNet, kw_only=True):
    """WideResNet-depth-width (1605.07146) without dropout, as in TRADES (1901.08573)."""

    depth: int = 28
    width: int = 10  # multiplies 16, 32, 64 channels

    def __post_init__(self):
        check_sizes("width", self.width)
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth!r} is not 6n + 4: one of 10, 16, 22, 28, 34, ...")
        super().__post_init__()

    def stages(self) -> tuple[int, list[tuple[int, int, int]]]:
        blocks = (self.depth - 4) // 6
        return 16, [
            (blocks, 16 * self.width, 1),
            (blocks, 32 * self.width, 2),
            (blocks, 64 * self.width, 2),
        ]


class ResNet50(_Normalized, kw_only=True):
    """ResNet-50 for images of about 224x224 (1512.03385), with the stride in the 3x3 (v1.5)."""

    width: float = 1.0  # multiplies 64, 128, 256, 512 channels of the blocks' 3x3

    def __post_init__(self):
        check_sizes("width", round(64 * self.width))
        super().__post_init__()

    def features(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b d"]:
        stem = self.padded_conv(round(64 * self.width), 7, x, stride=2)
        x = self.norm_and_activation(stem, train)
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        self.sow("intermediates", "stem", x)
        for i, blocks in enumerate((3, 4, 6, 3), start=1):
            channels = round(64 * 2 ** (i - 1) * self.width)
            for block in range(blocks):
                x = self.block(channels, 2 if i > 1 and block == 0 else 1, x, train)
            self.sow("intermediates", f"stage{i}", x)
        return global_avg_pool2d(x)

    def block(self, channels: int, stride: int, x: Array, train: bool) -> Array:
        """act(x + norm(1x1(act(norm(3x3(act(norm(1x1(x))))))))), x projected to a new shape."""
        h = self.norm_and_activation(self.padded_conv(channels, 1, x), train)
        h = self.norm_and_activation(self.padded_conv(channels, 3, h, stride), train)
        h = self.normed(self.padded_conv(4 * channels, 1, h), train)
        if stride != 1 or x.shape[-1] != 4 * channels:
            x = self.normed(self.padded_conv(4 * channels, 1, x, stride), train)
        return ACTIVATIONS[self.activation](x + h)
