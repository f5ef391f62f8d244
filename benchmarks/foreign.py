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

from benchmarks.autoattack import NETS
from benchmarks.speed import heading, versions
from benchmarks.timing import EPS, STEP_SIZE, Sides, images, turns
from benchmarks.torch_sequential import channels_first, converted
from robust_jax import attacks, jacobian

NUM_STEPS, BATCH_SIZE, NUM_JACOBIANS, CHUNK = 10, 128, 64, 16


def _network(name: str):
    """The module, the same in JAX, and the shape of an image."""
    torch.manual_seed(0)
    module = NETS[name].make().eval().requires_grad_(False)
    shape = (32, 32, 3) if "cifar" in NETS[name].dataset else (28, 28, 1)
    network = converted(module, shape)
    x, _ = images(shape, 4)
    np.testing.assert_allclose(network(x), module(channels_first(x)).numpy(), atol=1e-4)
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

    def theirs(layout):
        start = channels_first(x).contiguous(memory_format=layout)
        low, high = (start - EPS).clamp(min=0), (start + EPS).clamp(max=1)

        def run():
            x_adv = start + torch.empty_like(start).uniform_(-EPS, EPS)
            x_adv = torch.minimum(torch.maximum(x_adv, low), high)
            for _ in range(NUM_STEPS):
                x_adv.requires_grad_()
                loss = F.cross_entropy(module(x_adv), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, x_adv)
                x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
                x_adv = torch.minimum(torch.maximum(x_adv, low), high)
            return x_adv

        return run

    return {
        "ours": ours,
        "contiguous": theirs(torch.contiguous_format),
        "channels last": theirs(torch.channels_last),
    }


def jacobians(name: str) -> Sides:
    """Exact Frobenius norms of the logits' Jacobians."""
    module, network, shape = _network(name)
    x, _ = images(shape, NUM_JACOBIANS)
    pixels = channels_first(x)

    def ours():
        return jax.block_until_ready(jacobian.frobenius_norm(network, x, chunk_size=CHUNK))

    def theirs():
        one = torch.func.jacrev(lambda image: module(image[None])[0])
        parts = [torch.func.vmap(one)(part) for part in pixels.split(CHUNK)]
        return torch.cat([part.flatten(1).norm(dim=1) for part in parts])

    np.testing.assert_allclose(ours(), theirs().numpy(), rtol=1e-3)
    return {"ours": ours, "torch.func": theirs}


WORK = {"PGD-10": pgd, "Jacobian norms": jacobians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--repeats", type=int, default=11)
    flags = parser.parse_args()
    torch.set_num_threads(threads := len(os.sched_getaffinity(0)))
    print(f"{versions()}, {threads} threads, {flags.repeats} turns\n")
    print(*heading("work | network | ours, ms | PyTorch, ms | ours / theirs | range"), sep="\n")
    for work, sides_of in WORK.items():
        for name in flags.nets.split(","):
            sides = sides_of(name)
            seconds = turns(sides, flags.repeats)
            ours, *others = np.median(seconds, axis=0)
            ratios = seconds[:, 0] / seconds[:, 1 + np.argmin(others)]
            theirs = ", ".join(
                f"{side} {1e3 * s:.1f}" for side, s in zip(list(sides)[1:], others, strict=True)
            )
            spread = f"{np.median(ratios):.2f} | {ratios.min():.2f} to {ratios.max():.2f}"
            print(f"| {work} | {name} | {1e3 * ours:.1f} | {theirs} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
