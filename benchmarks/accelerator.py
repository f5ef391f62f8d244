"""What one accelerator does: training steps beside PyTorch's, and the minutes to a robust network.

    python -m benchmarks.accelerator --workdir=runs/accelerator

    python -m benchmarks.accelerator --workdir=runs/tiny --nets=lenet5 --batch_size=8 \\
        --num_steps=1 --repeats=1 --config=configs/digits_cnn_fast_at.py --num_examples=20 \\
        --num_queries=20

Needs the bench extra, and CIFAR-10 prepared. In one call: `benchmarks.speed`'s rows in bfloat16 for
PreActResNet-18 and WideResNet-28-10, each after a check that both sides are the same network; then
the config is trained from random weights and its best checkpoint attacked by AutoAttack on the
test set (the second command: all of it within a minute on a CPU). The tables are printed last, the
time it all took below them. Training's minutes are those of `launch.py` up to the last checkpoint,
with compilation and validation; AutoAttack's are told apart.
"""

import argparse
import os
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

# By default JAX takes three quarters of a GPU's memory at once, and PyTorch needs some of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import torch

from benchmarks import speed
from robust_jax import attacks, data
from robust_jax.app.experiment import build
from robust_jax.train.loop import train


def robust_network(flags) -> list[str]:
    """Trains the config and attacks what came of it: the lines of a table."""
    config = import_module(flags.config.removesuffix(".py").replace("/", ".")).get_config()
    started = time.perf_counter()
    experiment = build(config)
    best = train(experiment.plan, Path(flags.workdir)).best
    trained = time.perf_counter()
    test = experiment.dataset.test
    images, labels = test.take(np.arange(len(test.labels))[: flags.num_examples or None])
    eps, norm = config.adversary.eps, config.adversary.norm
    result = attacks.autoattack(
        experiment.evaluator.logits_fn(best.variables),
        np.asarray(data.to_pixels(images)),
        labels,
        jax.random.key(0),
        eps=eps,
        norm=norm,
        batch_size=flags.attack_batch_size,
        overrides={"square": {"num_queries": flags.num_queries}},
    )
    attacked = time.perf_counter()
    clean, *_, robust = (100 * share for share in result.robust_accuracy.values())
    columns = "config | training, min | clean, % | AutoAttack, % | examples | AutoAttack, min"
    return [
        f"{norm} {eps:.4g}; the aim for PreActResNet-18 on CIFAR-10: 82 % and 50 % in 10 minutes, "
        "then 5. Fast-AT reaches 43.2 % under AutoAttack.\n",
        *speed.heading(columns),
        f"| {Path(flags.config).stem} | {(trained - started) / 60:.2f} | {clean:.2f} | "
        f"{robust:.2f} | {len(labels)} | {(attacked - trained) / 60:.2f} |",
        *(f"\n{warning}" for warning in result.warnings),
    ]


def main() -> None:
    started = time.perf_counter()
    flags = _parse()
    if Path(flags.workdir).exists():  # whose training would go on, and take less than it takes
        sys.exit(f"error: {flags.workdir} exists; training is timed from its start: take another")
    torch.set_num_threads(flags.threads)
    steps = []
    for line in speed.table(flags):
        print(line, flush=True)  # kept where the rest is cut off
        steps.append(line)
    lines = [f"{speed.versions()}, {flags.repeats} turns", "", *steps, "", *robust_network(flags)]
    lines.append(f"\nAll of it: {(time.perf_counter() - started) / 60:.1f} minutes.")
    print("\n".join(["", *lines]))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    speed.add_flags(
        parser, work="step", nets="preact_resnet18,wide_resnet28", dtype="bfloat16", repeats=20
    )
    parser.add_argument("--workdir", required=True, help="of the training run")
    parser.add_argument(
        "--config", default="configs/cifar10_preact_resnet18_one_cycle.py", help="what is trained"
    )
    number = partial(parser.add_argument, type=int)
    number("--num_examples", default=0, help="under AutoAttack; 0: the whole test set")
    number("--num_queries", default=5000, help="of Square")
    number("--attack_batch_size", default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
