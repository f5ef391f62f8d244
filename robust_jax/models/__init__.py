"""Networks by name: images in [0, 1], [b, h, w, c], to logits [b, num_classes]."""

from flax import linen as nn

from robust_jax.models.layers import num_parameters
from robust_jax.models.resnet import PreActResNet, ResNet50, WideResNet
from robust_jax.models.small import CNN, MLP, LeNet5, Linear, MadryCNN, SmallCNN

MODELS: dict[str, type[nn.Module]] = {
    "linear": Linear,
    "mlp": MLP,
    "lenet5": LeNet5,
    "cnn": CNN,
    "madry_cnn": MadryCNN,
    "small_cnn": SmallCNN,
    "preact_resnet": PreActResNet,
    "resnet50": ResNet50,
    "wide_resnet": WideResNet,
}

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "LeNet5",
    "Linear",
    "MadryCNN",
    "PreActResNet",
    "ResNet50",
    "SmallCNN",
    "WideResNet",
    "num_parameters",
]
