"""Many examples through a compiled function: even batches, results in their order."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

# Arrays with one row per example.
Rows = Mapping[str, np.ndarray]
# map_examples(fn) -> run(rows, *scalars) -> what fn(logits_fn, rows, *scalars) returns of each
# batch (arrays [B,…]), for all the rows. Scalars may change without another compilation.
MapExamples = Callable[[Callable], Callable]
# lift(fn, num_sizes) -> run(variables, count, take, *scalars): the same for any variables of a
# network and any source of rows, take(i) giving those numbered i. Equal functions are one program.
Lift = Callable[..., Callable]

# Programs that run for long, as AutoAttack's do, are worth one for an even batch.
NUM_SIZES = 16


def batches(
    count: int, batch_size: int, *, multiple_of: int = 1, num_sizes: int = NUM_SIZES
) -> Iterator[tuple[Int[np.ndarray, " b"], int]]:
    """The rows 0 … count-1 in the fewest batches of batch_size; each with its real rows.

    The batches are of one size and as even as they can be in num_sizes steps up to batch_size; the
    last is filled up with copies. So few rows cost little, and at most num_sizes programs are
    compiled: two on an accelerator, where compiling takes longer than the rows that it saves.
    Sizes are rounded up to a multiple_of the devices.
    """
    if jax.default_backend() != "cpu":
        num_sizes = min(num_sizes, 2)

    def rounded(size, step):
        return -(-size // step) * step

    batch_size = rounded(batch_size, multiple_of)
    step = rounded(-(-batch_size // num_sizes), multiple_of)
    even = -(-count // -(-count // batch_size))
    size = min(rounded(even, step), batch_size)
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)


def in_chunks(fn_one: Callable, args: Any, chunk_size: int | None):
    """fn_one lifted over the examples of args (an array, or several of one length).

    chunk_size bounds how many are in memory at a time: the rest waits, in the same program.
    """
    num_examples = jax.tree.leaves(args)[0].shape[0]
    if chunk_size is None or chunk_size >= num_examples:
        return jax.vmap(fn_one)(args)
    return jax.lax.map(fn_one, args, batch_size=chunk_size)


def counted(rows: Rows) -> tuple[int, Callable]:
    """The number of rows, and take(i), which gives those numbered i."""
    count = len(next(iter(rows.values())))
    return count, lambda i: {name: array[i] for name, array in rows.items()}


def over(lift: Lift, variables: Any) -> MapExamples:
    """The mapping of a network with its variables."""

    def map_examples(fn):
        run = lift(fn)
        return lambda rows, *scalars: run(variables, *counted(rows), *scalars)

    return map_examples


def joined(parts: list[Any], counts: list[int]) -> Any:
    """The first count rows of each part, end to end, as numpy arrays."""
    parts = [
        jax.tree.map(lambda a, n=n: np.asarray(a)[:n], part)
        for part, n in zip(parts, counts, strict=True)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def on_one_device(logits_fn: Callable, batch_size: int) -> MapExamples:
    """The mapping of any logits_fn: jax.jit on the default device, batch by batch."""

    def map_examples(fn):
        compiled = jax.jit(partial(fn, logits_fn))

        def run(rows, *scalars):
            count, take = counted(rows)
            sizes = list(batches(count, batch_size))
            parts = [compiled(take(i), *scalars) for i, _ in sizes]
            return joined(parts, [real for _, real in sizes])

        return run

    return map_examples
