"""How long AutoAttack takes on networks that are not ours, beside the authors' code.

    python -m benchmarks.autoattack --reference=../auto-attack [--nets=lenet,strided] [--norm=linf]
        [--num_examples=200] [--repeats=1]

Four PyTorch networks, adversarially trained for a minute on real data from TFDS, and the same
weights in plain jax.lax. The standard AutoAttacks of both sides take turns; ours starts with
nothing compiled (first) and runs again with other keys (second). --reference is a checkout of
github.com/fra31/auto-attack. Prints a markdown table of medians; seconds are wall-clock time and,
in brackets, CPU time of all cores.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from torch import nn

from benchmarks.timing import heading
from benchmarks.torch_sequential import authors_autoattack, converted, train
from robust_jax import attacks, data


class Net(NamedTuple):
    """A network, the data set that it is for and the radius by norm."""

    make: Callable[[], nn.Sequential]
    dataset: str
    eps: dict[str, float]


def _lenet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def _strided() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


def _cifar() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


_MNIST = {"linf": 0.1, "l2": 1.0, "l1": 5.0}
NETS = {
    "lenet": Net(_lenet, "tfds:mnist", _MNIST),
    "strided": Net(_strided, "tfds:mnist", _MNIST),
    "cifar": Net(_cifar, "tfds:cifar10", {"linf": 4 / 255, "l2": 0.25, "l1": 4.0}),
    "mlp": Net(_mlp, "tfds:mnist", _MNIST),
}


def clocked(fn: Callable) -> tuple[np.ndarray, np.ndarray]:
    """What fn returns, and its seconds of wall-clock and CPU time."""
    start, used = time.perf_counter(), sum(os.times()[:2])
    found = fn()
    return found, np.array([time.perf_counter() - start, sum(os.times()[:2]) - used])


def measure(name: str, norm: str, count: int, repeats: int) -> str:
    """A row of the table."""
    net = NETS[name]
    dataset = data.load(net.dataset, validation_size=1000)
    x, y = dataset.train.take(np.arange(10_000))
    eps = net.eps[norm]
    module = train(net.make(), np.asarray(data.to_pixels(x)), y, eps=net.eps["linf"], num_epochs=3)
    x, y = dataset.test.take(np.arange(count))
    x = np.asarray(data.to_pixels(x))

    def ours(seed):
        network = converted(module, x.shape[1:])
        return attacks.autoattack(
            network, x, y, jax.random.key(seed), eps=eps, norm=norm, batch_size=500, progress=False
        ).robust

    ours_seconds = {"first": [], "second": []}
    theirs_seconds, robust = [], {}
    for repeat in range(repeats):
        robust["theirs"], seconds = clocked(
            lambda: authors_autoattack(module, x, y, eps=eps, norm=norm)
        )
        theirs_seconds.append(seconds)
        jax.clear_caches()
        for when in ours_seconds:
            robust["ours"], seconds = clocked(partial(ours, repeat))
            ours_seconds[when].append(seconds)
    theirs = np.median(theirs_seconds, 0)
    cells = [f"{theirs[0]:.0f} ({theirs[1]:.0f})"]
    for seconds in ours_seconds.values():
        wall, used = np.median(seconds, 0)
        ratio = np.median(np.array(seconds)[:, 0] / np.array(theirs_seconds)[:, 0])
        cells += [f"{wall:.0f} ({used:.0f})", f"{ratio:.2f}"]
    accuracies = [f"{100 * robust[side].mean():.1f}" for side in ("theirs", "ours")]
    differ = f"{(robust['theirs'] != robust['ours']).sum()}"
    return "| " + " | ".join([name, norm, str(count), *cells, *accuracies, differ]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="a checkout of AutoAttack's own code")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--norm", default="linf", choices=("linf", "l2", "l1"))
    parser.add_argument("--num_examples", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=1)
    flags = parser.parse_args()
    sys.path.insert(0, flags.reference)
    print(f"{os.cpu_count()} cores, JAX {jax.__version__}\n")
    columns = (
        "network | norm | points | theirs, s | ours, first, s | ratio | ours, second, s | ratio "
        "| theirs, robust % | ours, robust % | points that differ"
    )
    print(heading(columns), flush=True)
    for name in flags.nets.split(","):
        print(measure(name, flags.norm, flags.num_examples, flags.repeats), flush=True)


if __name__ == "__main__":
    main()
