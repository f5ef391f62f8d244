"""Small sequential PyTorch networks: training, conversion to JAX, and the authors' AutoAttack."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from benchmarks.torch_models import to_torch


def train(
    module: nn.Sequential, x: np.ndarray, y: np.ndarray, *, eps: float, num_epochs: int
) -> nn.Sequential:
    """The module after adversarial training in linf by one step from a random start.

    x: [N,H,W,C] in [0,1].
    """
    torch.manual_seed(0)
    images, labels = to_torch(x), torch.tensor(y.astype(np.int64))
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    loss_of = nn.functional.cross_entropy
    for _ in range(num_epochs):
        for rows in torch.randperm(len(images)).split(64):
            x_rows, y_rows = images[rows], labels[rows]
            delta = (2 * torch.rand_like(x_rows) - 1).mul(eps).requires_grad_(True)
            (slope,) = torch.autograd.grad(loss_of(module(x_rows + delta), y_rows), delta)
            delta = (delta.detach() + 1.25 * eps * slope.sign()).clamp(-eps, eps)
            optimizer.zero_grad()
            loss_of(module((x_rows + delta).clamp(0, 1)), y_rows).backward()
            optimizer.step()
    return module.eval().requires_grad_(False)


def converted(module: nn.Sequential, image_shape: tuple[int, ...]) -> Callable:
    """The same network in plain jax.lax, with the module's weights.

    Knows convolutions, ReLU, max-pooling, a flatten and linear layers; raises TypeError for
    others.
    """
    layers: list[Callable] = []
    flat = None
    x = to_torch(np.zeros((1, *image_shape), np.float32))
    for layer in module:
        if isinstance(layer, nn.Flatten):
            flat = x.shape[1:]
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            kernel = jnp.asarray(layer.weight.permute(2, 3, 1, 0).numpy())
            layers.append(_convolution(kernel, jnp.asarray(layer.bias.numpy()), layer))
        elif isinstance(layer, nn.Linear):
            weight = layer.weight
            if flat is not None and len(flat) == 3:  # it reads C,H,W, and ours H,W,C
                weight = weight.reshape(-1, *flat).permute(0, 2, 3, 1).reshape(weight.shape)
                flat = None
            layers.append(_linear(jnp.asarray(weight.T.numpy()), jnp.asarray(layer.bias.numpy())))
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(_pool)
        elif isinstance(layer, nn.ReLU):
            layers.append(jax.nn.relu)
        elif isinstance(layer, nn.Flatten):
            layers.append(lambda x: x.reshape(x.shape[0], -1))
        else:
            raise TypeError(f"no conversion is written for {type(layer).__name__}")

    def network(x):
        for layer in layers:
            x = layer(x)
        return x

    return network


def _convolution(kernel, bias, layer):
    padding = [(size, size) for size in layer.padding]
    numbers = ("NHWC", "HWIO", "NHWC")

    def apply(x):
        return bias + jax.lax.conv_general_dilated(
            x, kernel, layer.stride, padding, dimension_numbers=numbers
        )

    return apply


def _linear(matrix, bias):
    return lambda x: x @ matrix + bias


def _pool(x):
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")


def authors_autoattack(
    module: nn.Module, x: np.ndarray, y: np.ndarray, *, eps: float, norm: str
) -> np.ndarray:
    """Which points [N] withstand the authors' standard AutoAttack, which must be importable."""
    from autoattack import AutoAttack

    images, labels = to_torch(x), torch.tensor(y.astype(np.int64))
    attack = AutoAttack(
        module, norm=norm.capitalize(), eps=eps, device="cpu", seed=0, verbose=False
    )
    x_adv = attack.run_standard_evaluation(images, labels, bs=min(len(x), 500))
    return (module(x_adv).argmax(1) == labels).numpy()
