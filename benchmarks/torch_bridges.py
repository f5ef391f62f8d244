"""AutoAttack on one PyTorch module: ours through the bridges, and the authors' own code.

    python -m benchmarks.torch_bridges --reference=../auto-attack [--num_examples=200] [--eps=0.1]

Trains a small network on scikit-learn's digits with PyTorch, then runs the standard AutoAttack on
the same weights four times: the authors' code on the module, and ours on it through torchax (where
it is installed), through jax.pure_callback, and converted to JAX. --reference is a checkout of
github.com/fra31/auto-attack. Prints a markdown table with the points on which ours and theirs
differ. Minutes on 2 CPU cores.
"""

import argparse
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from robust_jax import attacks, data

NUM_EPOCHS = 30


def trained() -> tuple[torch.nn.Sequential, np.ndarray, np.ndarray]:
    """A module trained on digits by noise, and the test images [N,8,8,1] with their labels."""
    dataset = data.load("digits", validation_size=197)
    x = np.asarray(data.to_pixels(dataset.train.images)).transpose(0, 3, 1, 2).copy()
    x, y = torch.tensor(x), torch.tensor(dataset.train.labels.astype(np.int64))
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            noisy = (x[rows] + 0.2 * torch.randn_like(x[rows])).clamp(0, 1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(noisy), y[rows]).backward()
            optimizer.step()
    module.eval().requires_grad_(False)
    return module, np.asarray(data.to_pixels(dataset.test.images)), dataset.test.labels


def through_torchax(module: torch.nn.Module) -> Callable:
    """The module as JAX operations. Raises ImportError without torchax."""
    try:
        import torchax
    except AttributeError as error:  # where PyTorch is too new for it
        raise ImportError(str(error)) from error
    weights, forward = torchax.extract_jax(module)
    return lambda x: forward(weights, (jnp.transpose(x, (0, 3, 1, 2)),))


def through_callback(module: torch.nn.Module) -> Callable:
    """PyTorch computes the logits and their gradient."""

    def logits(x):
        return module(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).numpy()

    def gradient(x, cotangent):
        x = torch.tensor(np.asarray(x), requires_grad=True)
        out = module(x.permute(0, 3, 1, 2))
        return torch.autograd.grad(out, x, torch.tensor(np.asarray(cotangent)))[0].numpy()

    @jax.custom_vjp
    def network(x):
        return jax.pure_callback(logits, jax.ShapeDtypeStruct((len(x), 10), jnp.float32), x)

    def backward(x, cotangent):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.pure_callback(gradient, shape, x, cotangent),)

    network.defvjp(lambda x: (network(x), x), backward)
    return network


def converted(module: torch.nn.Sequential) -> Callable:
    """The same layers in JAX, with the module's weights."""
    conv1, _, _, conv2, _, _, _, dense, _, head = module
    kernels = [jnp.asarray(c.weight.permute(2, 3, 1, 0).numpy()) for c in (conv1, conv2)]
    # The first dense matrix reads C,H,W, and ours H,W,C.
    rows = dense.weight.reshape(64, 32, 2, 2).permute(2, 3, 1, 0).reshape(128, 64)
    first, last = jnp.asarray(rows.numpy()), jnp.asarray(head.weight.T.numpy())
    biases = [jnp.asarray(layer.bias.numpy()) for layer in (conv1, conv2, dense, head)]

    def network(x):
        for kernel, bias in zip(kernels, biases, strict=False):
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + bias)
            window = (1, 2, 2, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        x = jax.nn.relu(x.reshape(len(x), -1) @ first + biases[2])
        return x @ last + biases[3]

    return network


def by_the_authors(module: torch.nn.Module, x: np.ndarray, y: np.ndarray, eps: float) -> np.ndarray:
    """Which points hold against the authors' AutoAttack [N]."""
    from autoattack import AutoAttack

    images = torch.tensor(x.transpose(0, 3, 1, 2).copy())
    labels = torch.tensor(y.astype(np.int64))
    attack = AutoAttack(module, norm="Linf", eps=eps, version="standard", device="cpu", seed=0)
    x_adv = attack.run_standard_evaluation(images, labels, bs=len(x))
    return (module(x_adv).argmax(1) == labels).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="a checkout of AutoAttack's own code")
    parser.add_argument("--num_examples", type=int, default=200)
    parser.add_argument("--eps", type=float, default=0.1)
    flags = parser.parse_args()
    sys.path.insert(0, flags.reference)
    module, x, y = trained()
    x, y = x[: flags.num_examples], y[: flags.num_examples]

    start = time.perf_counter()
    theirs = by_the_authors(module, x, y, flags.eps)
    seconds = time.perf_counter() - start
    print("| AutoAttack | of | robust, % | points that differ | largest difference of logits | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| the authors' | the module | {100 * theirs.mean():.1f} | – | – | {seconds:.0f} |")
    own = module(torch.tensor(x.transpose(0, 3, 1, 2).copy())).numpy()
    for bridge in (through_torchax, through_callback, converted):
        try:
            network = bridge(module)
        except ImportError as error:
            print(f"| ours | {bridge.__name__} | – ({error}) | | | |")
            continue
        difference = np.abs(np.asarray(network(jnp.asarray(x))) - own).max()
        start = time.perf_counter()
        result = attacks.autoattack(
            network, x, y, jax.random.key(0), eps=flags.eps, batch_size=len(x), progress=False
        )
        seconds = time.perf_counter() - start
        print(
            f"| ours | {bridge.__name__.replace('_', ' ')} | {100 * result.robust.mean():.1f} | "
            f"{(result.robust != theirs).sum()} | {difference:.1e} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
