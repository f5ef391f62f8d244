"""LeNet-5, SmallCNN and PreActResNet in PyTorch, as robust_jax.models has them.

Weights convert both ways: layers are in lists with flax's names, `Conv.0` for Conv_0, so that
weights are copied by name. PGD and Jacobians are here too, for timing PyTorch.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional as F

from robust_jax import data, models

# Flax's and PyTorch's names for a layer's arrays, and the axes of kernels in both directions.
_PARTS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
_BATCH_SIZE = 64


class _Classifier(nn.Module):
    """Images [B,C,H,W] in [0,1], normalised, to logits [B,K]; a subclass makes the features."""

    def __init__(self, model: models.layers.Classifier):
        super().__init__()
        for name, values in (("mean", model.mean), ("std", model.std)):
            # A buffer, so that it moves to a GPU with the rest, but not one of the weights.
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, x):
        return self.head(self.features((x - self.mean) / self.std))


class LeNet5(_Classifier):
    """LeNet-5 for images of 28x28x1."""

    def __init__(self, model: models.LeNet5):
        super().__init__(model)
        self.Conv = nn.ModuleList([nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)])
        self.Dense = nn.ModuleList([nn.Linear(400, 120), nn.Linear(120, 84)])
        self.head = nn.Linear(84, model.num_classes)

    def features(self, x):
        for conv in self.Conv:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # in flax's order: height, width, channel
        for dense in self.Dense:
            x = F.relu(dense(x))
        return x


class SmallCNN(_Classifier):
    """SmallCNN of TRADES for images of 28x28x1."""

    def __init__(self, model: models.SmallCNN):
        super().__init__(model)
        widths = (1, 32, 32, 64, 64)
        self.Conv = nn.ModuleList([nn.Conv2d(i, o, 3) for i, o in pairwise(widths)])
        self.Dense = nn.ModuleList([nn.Linear(1024, 200), nn.Linear(200, 200)])
        self.head = nn.Linear(200, model.num_classes)

    def features(self, x):
        for i, conv in enumerate(self.Conv, start=1):
            x = F.relu(conv(x))
            x = F.max_pool2d(x, 2) if i % 2 == 0 else x
        x = x.permute(0, 2, 3, 1).flatten(1)
        for dense in self.Dense:
            x = F.relu(dense(x))
        return x


class PreActResNet(_Classifier):
    """PreActResNet of the model's depth and width, for images of three channels."""

    def __init__(self, model: models.PreActResNet):
        super().__init__(model)
        channels, stages = model.stages()
        self.Conv = nn.ModuleList([_conv(3, channels, 3)])
        self.BatchNorm = nn.ModuleList()
        self.is_projected = []
        for num_blocks, width, first_stride in stages:
            for stride in [first_stride] + [1] * (num_blocks - 1):
                self.is_projected.append(stride != 1 or channels != width)
                if self.is_projected[-1]:
                    self.Conv.append(_conv(channels, width, 1, stride))
                self.Conv.extend([_conv(channels, width, 3, stride), _conv(width, width, 3)])
                self.BatchNorm.extend([nn.BatchNorm2d(channels), nn.BatchNorm2d(width)])
                channels = width
        self.BatchNorm.append(nn.BatchNorm2d(channels))
        self.head = nn.Linear(channels, model.num_classes)

    def features(self, x):
        convs, norms = iter(self.Conv), iter(self.BatchNorm)
        x = next(convs)(x)
        for is_projected in self.is_projected:
            h = F.relu(next(norms)(x))
            x = next(convs)(h) if is_projected else x
            h = next(convs)(h)
            x = x + next(convs)(F.relu(next(norms)(h)))
        return F.relu(next(norms)(x)).mean((2, 3))


def from_flax(net: nn.Module, variables: Any) -> nn.Module:
    """The network with flax's variables, in evaluation mode and without gradients of its own."""
    state = net.state_dict()
    for path, array in jax.tree.leaves_with_path(variables):
        axes = _TO_TORCH[array.ndim]
        state[_torch_name(path)].copy_(torch.tensor(np.asarray(array)).permute(axes))
    return net.eval().requires_grad_(False)


def to_flax(net: nn.Module, template: Any) -> Any:
    """The network's weights as flax's variables; template holds arrays of their names and ranks."""
    state = net.state_dict()

    def find(path, leaf):
        return state[_torch_name(path)].permute(_TO_FLAX[len(leaf.shape)]).numpy()

    return jax.tree.map_with_path(find, template)


def train(net: nn.Module, split: data.Split, num_steps: int) -> None:
    """Ordinary training: SGD on random batches, cropped and flipped, with a one-cycle rate.

    A batch shares one crop, three quarters as high and wide, which takes half the time.
    """
    height, width = (3 * size // 4 for size in split.images.shape[1:3])
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=num_steps)
    net.train()
    for step in range(1, num_steps + 1):
        rows = torch.randint(len(split.labels), (_BATCH_SIZE,)).numpy()
        x = to_torch(data.to_pixels(split.images[rows]))
        row, column = (int(i) for i in torch.randint(height // 3 + 1, (2,)))
        x = x[:, :, row : row + height, column : column + width]
        x = torch.where(torch.rand(_BATCH_SIZE, 1, 1, 1) < 0.5, x, x.flip(3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x), torch.tensor(split.labels[rows], dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"training: step {step} of {num_steps}, loss {float(loss):.2f}", flush=True)


def pgd(loss: Callable, x: torch.Tensor, *, eps: float, step_size: float, num_steps: int):
    """The points of projected gradient ascent on loss(x) in linf, in [0,1], from a random start."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv = x + torch.empty_like(x).uniform_(-eps, eps)
    x_adv = torch.minimum(torch.maximum(x_adv, low), high)
    for _ in range(num_steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x_adv), x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, low), high)
    return x_adv


def jacobian_norms(net: nn.Module, x: torch.Tensor, chunk: int) -> torch.Tensor:
    """Exact Frobenius norms [B] of the logits' Jacobians, chunk images at a time."""
    one = torch.func.jacrev(lambda image: net(image[None])[0])
    parts = [torch.func.vmap(one)(part) for part in x.split(chunk)]
    return torch.cat([part.flatten(1).norm(dim=1) for part in parts])


def versions() -> str:
    """The device and both frameworks."""
    return f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, PyTorch {torch.__version__}"


def to_torch(x: Float[jax.Array | np.ndarray, "b h w c"]) -> torch.Tensor:
    """Images as PyTorch has them, [B,C,H,W]."""
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def to_numpy(x: torch.Tensor) -> Float[np.ndarray, "b h w c"]:
    """Images as robust_jax has them, [B,H,W,C]."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def _conv(channels: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)


def _torch_name(path) -> str:
    """The path params, Conv_0, kernel as "Conv.0.weight"."""
    _, layer, part = (key.key for key in path)
    return f"{layer.replace('_', '.')}.{_PARTS[part]}"
