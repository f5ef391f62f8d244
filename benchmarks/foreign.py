"""PGD and exact Jacobians of networks that are not ours, beside PyTorch's, as a markdown table.

    python -m benchmarks.foreign [--nets=lenet,strided,cifar,mlp] [--repeats=11]

The networks of benchmarks.autoattack, written in PyTorch, with the same weights in plain jax.lax.
PGD: 10 steps in linf on 128 images by the plain call of `attacks.pgd`, PyTorch's in both memory
layouts. A Jacobian: exact Frobenius norms of 64 images, 16 at a time, PyTorch's by torch.func
vmap(jacrev). Both sides take turns; nothing compiles meanwhile.
"""

import argparse
import os
from functools import partial

import jax
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import torch_models
from benchmarks.autoattack import NETS
from benchmarks.timing import EPS, STEP_SIZE, Sides, compared, heading, images, turns
from benchmarks.torch_sequential import converted
from robust_jax import attacks, jacobian

NUM_STEPS, BATCH_SIZE, NUM_JACOBIANS, CHUNK = 10, 128, 64, 16


def _network(name: str):
    """The module, the same in JAX, and the shape of an image."""
    torch.manual_seed(0)
    module = NETS[name].make().eval().requires_grad_(False)
    shape = (32, 32, 3) if "cifar" in NETS[name].dataset else (28, 28, 1)
    network = converted(module, shape)
    x, _ = images(shape, 4)
    np.testing.assert_allclose(network(x), module(torch_models.to_torch(x)).numpy(), atol=1e-4)
    return module, network, shape


def pgd(name: str) -> Sides:
    """Projected gradient descent on a batch."""
    module, network, shape = _network(name)
    x, y = images(shape, BATCH_SIZE)
    labels, key = torch.tensor(y.astype(np.int64)), jax.random.key(0)
    attack = partial(
        attacks.pgd, eps=EPS, step_size=STEP_SIZE, num_steps=NUM_STEPS, keep_best=False
    )

    def ours():
        return jax.block_until_ready(attack(network, x, y, key))

    def loss(x):
        return F.cross_entropy(module(x), labels, reduction="sum")

    def theirs(layout):
        start = torch_models.to_torch(x).contiguous(memory_format=layout)
        steps = {"eps": EPS, "step_size": STEP_SIZE, "num_steps": NUM_STEPS}
        return partial(torch_models.pgd, loss, start, **steps)

    return {
        "ours": ours,
        "contiguous": theirs(torch.contiguous_format),
        "channels last": theirs(torch.channels_last),
    }


def jacobians(name: str) -> Sides:
    """Exact Frobenius norms of the logits' Jacobians."""
    module, network, shape = _network(name)
    x, _ = images(shape, NUM_JACOBIANS)
    pixels = torch_models.to_torch(x)

    def ours():
        return jax.block_until_ready(jacobian.frobenius_norm(network, x, chunk_size=CHUNK))

    theirs = partial(torch_models.jacobian_norms, module, pixels, CHUNK)
    np.testing.assert_allclose(ours(), theirs().numpy(), rtol=1e-3)
    return {"ours": ours, "torch.func": theirs}


WORK = {"PGD-10": pgd, "Jacobian norms": jacobians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--repeats", type=int, default=11)
    flags = parser.parse_args()
    torch.set_num_threads(threads := len(os.sched_getaffinity(0)))
    print(f"{torch_models.versions()}, {threads} threads, {flags.repeats} turns\n")
    print(heading("work | network | ours, ms | PyTorch, ms | ours / theirs | range"))
    for work, sides_of in WORK.items():
        for name in flags.nets.split(","):
            sides = sides_of(name)
            seconds = turns(sides, flags.repeats)
            print(f"| {work} | {name} | {compared(sides, seconds, 1)} |", flush=True)


if __name__ == "__main__":
    main()
