"""What a call of each public function costs, as a markdown table.

    python -m benchmarks.front_door [--repeats=20] [--only=pgd,autoattack] [--nets=mlp,cnn]

Few steps on small networks, so that the cost of the call itself shows. Each call has another batch,
another key and a new function for the network, as in a user's loop: the first call compiles, the
second should not. It is compared with jax.jit of the same call with the weights as arguments; the
two take turns. AutoAttack and the audit are loops on the host, which cannot be jitted.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.timing import heading, turns
from robust_jax.app.config import choose
from tests.calls import ALL, FUNCTIONS, lowerings

SHAPE, BATCH_SIZE = (14, 14, 1), 16


class CNN(nn.Module):
    """A small network shaped like LeNet."""

    @nn.compact
    def __call__(self, x):
        for width in (4, 8):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def mlp() -> tuple[Callable, list[jax.Array]]:
    """A plain function of (weights, x), and its weights."""
    sizes = (int(np.prod(SHAPE)), 32, 10)
    keys = jax.random.split(jax.random.key(0), 2)
    weights = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, zip(sizes, sizes[1:], strict=False), strict=True)
    ]

    def apply(weights, x):
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ weights[0]) @ weights[1]

    return apply, weights


def cnn() -> tuple[Callable, dict]:
    """The same for a Flax network, which Python traces at every call."""
    model = CNN()
    return model.apply, model.init(jax.random.key(0), jnp.ones((1, *SHAPE)))


def jitted_cnn() -> tuple[Callable, dict]:
    """The Flax network with jax.jit around its apply, whose trace JAX caches."""
    apply, variables = cnn()
    return jax.jit(apply), variables


NETS = {"mlp": mlp, "cnn": cnn, "jitted_cnn": jitted_cnn}


def measure(name: str, net: str, repeats: int) -> str:
    """A row of the table."""
    apply, weights = NETS[net]()
    call = ALL[name]
    predict = jax.jit(lambda x: apply(weights, x).argmax(-1))
    is_jitted = name in FUNCTIONS
    batches = [
        jax.random.uniform(jax.random.key(i), (BATCH_SIZE, *SHAPE))
        for i in range(4 if is_jitted else 1)
    ]
    inputs = [(x, predict(x), jax.random.key(i)) for i, x in enumerate(batches)]
    count = iter(range(10**9))

    def plain():
        # A new function at each call, like a lambda in a loop.
        arguments = inputs[next(count) % len(inputs)]
        return jax.block_until_ready(call(lambda x: apply(weights, x), *arguments))

    jitted = jax.jit(lambda weights, *arguments: call(partial(apply, weights), *arguments))

    def under_jit():
        return jax.block_until_ready(jitted(weights, *inputs[next(count) % len(inputs)]))

    start = time.perf_counter()
    plain()
    first = time.perf_counter() - start
    with lowerings() as seen:
        plain()
    sides = {"plain": plain} | ({"jitted": under_jit} if is_jitted else {})
    milliseconds = 1e3 * turns(sides, repeats)
    second, *rest = np.median(milliseconds, axis=0)
    cells = [name, net, f"{first:.2f}", f"{second:.2f}"]
    if rest:
        more = milliseconds[:, 0] - milliseconds[:, 1]
        low, high = np.percentile(more, (10, 90))
        cells += [f"{rest[0]:.2f}", f"{np.median(more):.2f} | {low:.2f} to {high:.2f}"]
    else:
        cells += ["–", "– | –"]
    return f"| {' | '.join([*cells, str(len(seen))])} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = partial(str.split, sep=",")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", type=names, default=list(ALL), help=", ".join(ALL))
    parser.add_argument("--nets", type=names, default=list(NETS), help=", ".join(NETS))
    flags = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    cores = len(os.sched_getaffinity(0))
    print(f"{jax.devices()[0].device_kind}, {cores} cores, JAX {jax.__version__}\n")
    columns = (
        "function | network | first call, s | second, ms | jitted, ms | difference, ms | "
        "of 80 % of turns | programs compiled at the second"
    )
    print(heading(columns))
    for name in flags.only:
        for net in flags.nets:
            choose(ALL, name, "--only"), choose(NETS, net, "--nets")
            print(measure(name, net, flags.repeats), flush=True)


if __name__ == "__main__":
    main()
