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
from torch import nn

from benchmarks.timing import heading
from benchmarks.torch_models import to_torch
from benchmarks.torch_sequential import authors_autoattack, converted, train
from robust_jax import attacks, data

NUM_EPOCHS = 30


def trained() -> tuple[nn.Sequential, np.ndarray, np.ndarray]:
    """A module trained on digits, and the test images [N,8,8,1] with their labels."""
    dataset = data.load("digits", validation_size=197)
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    x, y = np.asarray(data.to_pixels(dataset.train.images)), dataset.train.labels
    train(module, x, y, eps=0.1, num_epochs=NUM_EPOCHS)
    return module, np.asarray(data.to_pixels(dataset.test.images)), dataset.test.labels


def through_torchax(module: nn.Module) -> Callable:
    """The module as JAX operations. Raises ImportError without torchax."""
    try:
        import torchax
    except AttributeError as error:  # where PyTorch is too new for it
        raise ImportError(str(error)) from error
    weights, forward = torchax.extract_jax(module)
    return lambda x: forward(weights, (jnp.transpose(x, (0, 3, 1, 2)),))


def through_callback(module: nn.Module) -> Callable:
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


def plainly(module: nn.Sequential) -> Callable:
    """The weights in a network of plain jax.lax."""
    return converted(module, (8, 8, 1))


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
    theirs = authors_autoattack(module, x, y, eps=flags.eps, norm="linf")
    seconds = time.perf_counter() - start
    columns = "AutoAttack | of | robust, % | points that differ | largest difference of logits | s"
    print(heading(columns))
    print(f"| the authors' | the module | {100 * theirs.mean():.1f} | – | – | {seconds:.0f} |")
    own = module(to_torch(x)).numpy()
    for bridge in (through_torchax, through_callback, plainly):
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
