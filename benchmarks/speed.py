"""Our adversarial training step and exact Jacobians beside PyTorch's, as a markdown table.

    python -m benchmarks.speed --work=step,jacobian --nets=small_cnn,preact_resnet18 --repeats=11

    python -m benchmarks.speed --work=step --nets=preact_resnet18,wide_resnet28 --dtype=bfloat16

Needs the extras train and bench. Both sides have the same weights and images; they take turns in
one process. A row shows the median time of each, the median and range over turns of the ratio to
PyTorch's fastest, and the rate of our products as a share of that of a large matrix product.

A step: PGD (linf) on 128 images, the gradient at the adversarials, SGD with momentum. PyTorch runs
eagerly in both memory layouts, with autocast in bfloat16, and on a GPU with torch.compile as
well, with and without CUDA graphs. A Jacobian: exact Frobenius norms with respect to the image, in
float32, PyTorch's by torch.func vmap(jacrev). AutoAttack's time is a column of
benchmarks.compare_attacks. docs/performance.md has our tables.
"""

import argparse
import os
from collections.abc import Iterator
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
    compared,
    heading,
    images,
    matrix_rate,
    turns,
)
from robust_jax import jacobian, models

NETS = {
    "lenet5": (models.LeNet5, torch_models.LeNet5, (28, 28, 1)),
    "small_cnn": (models.SmallCNN, torch_models.SmallCNN, (28, 28, 1)),
    "preact_resnet18": (models.PreActResNet, torch_models.PreActResNet, (32, 32, 3)),
    "wide_resnet28": (models.WideResNet, torch_models.PreActResNet, (32, 32, 3)),
}


def steps(net: str, flags) -> Sides:
    """A training step of each side; each call makes one and waits for it."""
    make, make_torch, shape = NETS[net]
    ours = TrainingStep(
        partial(make, dtype=flags.dtype),
        shape,
        batch_size=flags.batch_size,
        num_steps=flags.num_steps,
    )
    pixels, (_, y) = ours.pixels, images(shape, flags.batch_size)
    is_gpu = jax.default_backend() == "gpu"
    device = "cuda" if is_gpu else "cpu"

    model = make(num_classes=10)
    network = torch_models.from_flax(make_torch(model), ours.weights)
    x = pixels[:8].astype(np.float32) / 255
    logits = np.asarray(jax.jit(model.apply)(ours.weights, x))
    difference = np.abs(network(torch_models.to_torch(x)).numpy() - logits).max()
    if difference > 0.01 * np.abs(logits).max():  # a GPU multiplies in TF32
        raise AssertionError(f"{net}: the two networks' logits differ by {difference:.2g}")

    def theirs(layout=torch.channels_last, compiled=None):
        network = torch_models.from_flax(make_torch(model), ours.weights)
        network = network.to(device, memory_format=layout)
        optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM)
        images = torch_models.to_torch(pixels.astype(np.float32) / 255)
        images = images.to(device).contiguous(memory_format=layout)
        labels = torch.tensor(y, dtype=torch.long, device=device)
        logits_of = torch.compile(network, mode=compiled) if compiled else network

        def loss(x, reduction):
            with torch.autocast(device, torch.bfloat16, enabled=flags.dtype == "bfloat16"):
                return F.cross_entropy(logits_of(x), labels, reduction=reduction)

        def run():
            network.eval().requires_grad_(False)  # compiled code would compute their gradients too
            x_adv = torch_models.pgd(
                partial(loss, reduction="sum"),
                images,
                eps=EPS,
                step_size=STEP_SIZE,
                num_steps=flags.num_steps,
            )
            network.train().requires_grad_(True)
            optimizer.zero_grad()
            loss(x_adv, "mean").backward()
            optimizer.step()
            if is_gpu:
                torch.cuda.synchronize()

        return run

    sides = {"ours": ours, "contiguous": theirs(torch.contiguous_format), "channels_last": theirs()}
    if is_gpu:
        sides["compiled"] = theirs(compiled="default")
        sides["compiled, CUDA graphs"] = theirs(compiled="reduce-overhead")
    return sides


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
        return torch_models.jacobian_norms(network, pixels, flags.chunk)

    def ours():
        return jax.block_until_ready(norms(variables, x))

    np.testing.assert_allclose(ours(), theirs().numpy(), rtol=1e-3)
    return {"ours": ours, "torch.func": theirs}


WORK = {"step": steps, "jacobian": jacobians}


def table(flags) -> Iterator[str]:
    """The table's lines, each as soon as it is measured."""
    rate = matrix_rate(flags.dtype)
    yield f"A large matrix product in {flags.dtype}: {rate / 1e12:.3g} TFLOP/s.\n"
    yield heading("work | network | ours, ms | PyTorch, ms | ours / theirs | range | of that rate")
    for work in flags.work:
        for net in flags.nets:
            sides = WORK[work](net, flags)
            seconds = turns(sides, flags.repeats)
            step = sides["ours"]
            share = (
                f"{100 * step.flops() / np.median(seconds[:, 0]) / rate:.0f} %"
                if isinstance(step, TrainingStep)
                else ""
            )
            yield f"| {work} | {net} | {compared(sides, seconds, 0)} | {share} |"
            if jax.default_backend() == "gpu":  # the next network needs the memory
                del sides, step
                torch.compiler.reset()
                torch.cuda.empty_cache()


def main() -> None:
    flags = _parse()
    torch.set_num_threads(flags.threads)
    print(f"{torch_models.versions()}, {flags.threads} threads, {flags.repeats} turns\n")
    for line in table(flags):
        print(line, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = partial(str.split, sep=",")
    parser.add_argument("--work", type=names, default="step,jacobian", help=", ".join(WORK))
    parser.add_argument(
        "--nets", type=names, default="lenet5,small_cnn,preact_resnet18", help=", ".join(NETS)
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the steps"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_steps", type=int, default=10, help="of PGD")
    parser.add_argument("--num_jacobians", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=16, help="Jacobians in memory at a time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
