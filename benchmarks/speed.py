"""Our adversarial training step and exact Jacobians beside PyTorch's, as a markdown table.

    python -m benchmarks.speed --work=step,jacobian --nets=small_cnn,preact_resnet18 --repeats=7

Needs the bench extra. Both sides have the same weights, images and float32; they take turns in one
process, and a row shows the median time of each and the median and range of the ratios of turns. A
step: PGD (linf) on 128 images, the gradient at the adversarials, SGD with momentum; PyTorch runs
eagerly in both memory layouts, and the faster one counts. A Jacobian: exact Frobenius norms with
respect to the image, PyTorch's by torch.func vmap(jacrev). AutoAttack's time is a column of
benchmarks.compare_attacks. docs/performance.md has our tables.
"""

import argparse
import os
from functools import partial

import jax
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import torch_models
from benchmarks.timing import (
    EPS,
    LEARNING_RATE,
    MOMENTUM,
    STEP_SIZE,
    Sides,
    TrainingStep,
    images,
    turns,
)
from robust_jax import jacobian, models

NETS = {
    "lenet5": (models.LeNet5, torch_models.LeNet5, (28, 28, 1)),
    "small_cnn": (models.SmallCNN, torch_models.SmallCNN, (28, 28, 1)),
    "preact_resnet18": (models.PreActResNet, torch_models.PreActResNet, (32, 32, 3)),
}


def steps(net: str, flags) -> Sides:
    """A training step of each side; each call makes one and waits for it."""
    make, make_torch, shape = NETS[net]
    ours = TrainingStep(make, shape, batch_size=flags.batch_size, num_steps=flags.num_steps)
    pixels, (_, y) = ours.pixels, images(shape, flags.batch_size)

    def theirs(layout):
        network = torch_models.from_flax(make_torch(make(num_classes=10)), ours.weights)
        network = network.to(memory_format=layout)
        network.requires_grad_(True)
        optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM)
        images = torch_models.to_torch(pixels.astype(np.float32) / 255)
        images = images.contiguous(memory_format=layout)
        labels = torch.tensor(y, dtype=torch.long)

        def run():
            network.eval()
            low, high = (images - EPS).clamp(min=0), (images + EPS).clamp(max=1)
            x_adv = images + torch.empty_like(images).uniform_(-EPS, EPS)
            x_adv = torch.minimum(torch.maximum(x_adv, low), high)
            for _ in range(flags.num_steps):
                x_adv.requires_grad_()
                value = F.cross_entropy(network(x_adv), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(value, x_adv)
                x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
                x_adv = torch.minimum(torch.maximum(x_adv, low), high)
            network.train()
            optimizer.zero_grad()
            F.cross_entropy(network(x_adv), labels).backward()
            optimizer.step()

        return run

    return {
        "ours": ours,
        "contiguous": theirs(torch.contiguous_format),
        "channels_last": theirs(torch.channels_last),
    }


def jacobians(net: str, flags) -> Sides:
    """Exact Frobenius norms of the logits' Jacobians."""
    make, make_torch, shape = NETS[net]
    model = make(num_classes=10)
    x, _ = images(shape, flags.num_jacobians)
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    network = torch_models.from_flax(make_torch(model), variables)
    pixels = torch_models.to_torch(x)

    @jax.jit
    def norms(variables, x):
        logits_fn = partial(model.apply, variables)
        return jacobian.frobenius_norm(logits_fn, x, chunk_size=flags.chunk)

    def theirs():
        one = torch.func.jacrev(lambda image: network(image[None])[0])
        parts = [torch.func.vmap(one)(part) for part in pixels.split(flags.chunk)]
        return torch.cat([part.flatten(1).norm(dim=1) for part in parts])

    def ours():
        return jax.block_until_ready(norms(variables, x))

    np.testing.assert_allclose(ours(), theirs().numpy(), rtol=1e-3)
    return {"ours": ours, "torch.func": theirs}


WORK = {"step": steps, "jacobian": jacobians}


def main() -> None:
    flags = _parse()
    torch.set_num_threads(flags.threads)
    print(f"{jax.devices()[0].device_kind}, {flags.threads} threads, JAX {jax.__version__}, "
          f"PyTorch {torch.__version__}, {flags.repeats} turns\n")  # fmt: skip
    print("| work | network | ours, ms | PyTorch, ms | ours / theirs | range |")
    print("|" + " --- |" * 6)
    for work in flags.work:
        for net in flags.nets:
            sides = WORK[work](net, flags)
            seconds = turns(sides, flags.repeats)
            ours, *others = np.median(seconds, axis=0)
            ratios = seconds[:, 0] / seconds[:, 1 + np.argmin(others)]
            theirs = ", ".join(
                f"{name} {1e3 * s:.0f}" for name, s in zip(list(sides)[1:], others, strict=True)
            )
            print(f"| {work} | {net} | {1e3 * ours:.0f} | {theirs} | "
                  f"{np.median(ratios):.2f} | {ratios.min():.2f} to {ratios.max():.2f} |",
                  flush=True)  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = partial(str.split, sep=",")
    parser.add_argument("--work", type=names, default="step,jacobian", help=", ".join(WORK))
    parser.add_argument("--nets", type=names, default=",".join(NETS), help=", ".join(NETS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_steps", type=int, default=10, help="of PGD")
    parser.add_argument("--num_jacobians", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=16, help="Jacobians in memory at a time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
