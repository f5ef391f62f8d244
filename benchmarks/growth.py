"""How the cost of our training step and Jacobians grows, as a markdown table.

    python -m benchmarks.growth [--repeats=5] [--only=steps,batch]

One thing grows at a time: steps of PGD, batch, width of the network, classes (for exact Jacobians
and for the estimate by random projections), seeds trained in one program (which pays if n of them
cost less than n times the first). Sizes take turns in one process; a row shows each size's median
time and its median ratio to the first size in the same turn. For growth with devices see
benchmarks.scaling and docs/scaling.md.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np

from benchmarks.timing import Sides, TrainingStep, heading, images, turns
from robust_jax import jacobian, models
from robust_jax.app.config import choose

SHAPE = (28, 28, 1)


def cnn(width: int = 16, num_classes: int = 10, **keywords):
    return models.CNN(num_classes=num_classes, widths=(width, width), hidden=64, **keywords)


def steps() -> Sides:
    """Steps of PGD, batch 128."""
    return {
        f"{n}": TrainingStep(cnn, SHAPE, batch_size=128, num_steps=n) for n in (1, 2, 5, 10, 20)
    }


def batch() -> Sides:
    """Images in a batch, PGD-10."""
    sizes = (32, 64, 128, 256, 512)
    return {f"{n}": TrainingStep(cnn, SHAPE, batch_size=n, num_steps=10) for n in sizes}


def width() -> Sides:
    """Channels of both convolutions, PGD-10, batch 128."""
    return {
        f"{n}": TrainingStep(partial(cnn, width=n), SHAPE, batch_size=128, num_steps=10)
        for n in (8, 16, 32, 64)
    }


def seeds() -> Sides:
    """Seeds in one program by vmap, PGD-10, batch 128."""
    return {
        f"{n}": TrainingStep(cnn, SHAPE, batch_size=128, num_steps=10, num_seeds=n)
        for n in (1, 2, 4)
    }


def classes(measure: Callable) -> Sides:
    x, _ = images(SHAPE, 64)
    found = {}
    for count in (10, 20, 50, 100):
        model = cnn(num_classes=count)
        logits_fn = partial(model.apply, jax.jit(model.init)(jax.random.key(0), x[:1]))
        norms = jax.jit(partial(measure, logits_fn))
        found[f"{count}"] = lambda norms=norms: jax.block_until_ready(norms(x))
    return found


GROWING: Mapping[str, tuple[str, Callable[[], Sides]]] = {
    "steps": ("steps of PGD, batch 128", steps),
    "batch": ("images in a batch, PGD-10", batch),
    "width": ("channels of both convolutions, PGD-10, batch 128", width),
    "seeds": ("seeds in one program, PGD-10, batch 128", seeds),
    "classes": (
        "classes, exact Jacobian norms of 64 images",
        partial(classes, partial(jacobian.frobenius_norm, chunk_size=16)),
    ),
    "classes_estimated": (
        "classes, estimated Jacobian norms of 64 images, 8 projections",
        partial(
            classes,
            lambda fn, x: jacobian.frobenius_norm_estimate(
                fn, x, jax.random.key(0), num_projections=8, chunk_size=16
            ),
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(GROWING), help=", ".join(GROWING))
    flags = parser.parse_args()
    print(heading("what grows | size: milliseconds (times the first)"))
    for name in flags.only.split(","):
        title, make = GROWING[choose(GROWING, name, "--only")]
        sides = make()
        seconds = turns(sides, flags.repeats)
        ratios = np.median(seconds / seconds[:, :1], axis=0)
        cells = [
            f"{size}: {1e3 * s:.3g} ({r:.2g}×)"
            for size, s, r in zip(sides, np.median(seconds, axis=0), ratios, strict=True)
        ]
        print(f"| {title} | {', '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
