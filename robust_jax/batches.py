"""Runs many examples through a compiled function in even batches, with results in order."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

# Arrays with one row per example.
Rows = Mapping[str, np.ndarray]
# map_examples(fn) -> run(rows, *scalars) -> what fn(logits_fn, rows, *scalars) returns for each
# batch (arrays [B,…]), joined over all rows. Scalars may change without recompiling.
MapExamples = Callable[[Callable], Callable]
# lift(fn) -> run(variables, most, count, take, *scalars): the same for any variables of a network
# and any source of rows. take(i) gives rows i of count, which is at most `most`. Equal functions
# share one program.
Lift = Callable[..., Callable]

# On a CPU a row costs about the same in batches of _SMALLEST or more, and no less above _LARGEST.
_SMALLEST, _LARGEST = 16, 64


def rows_of_batches(
    count: int, batch_size: int, *, most: int | None = None, multiple_of: int = 1
) -> Iterator[tuple[Int[np.ndarray, " b"], int]]:
    """The rows 0 … count-1 in batches of one size, each with its number of real rows.

    The last batch is padded with copies. The size is set by the largest number of rows that can
    occur, `most` (by default count), so that passes over the examples that survive an attack share
    one program. On a CPU it is a twelfth of `most`, within bounds, so that there is little padding
    and all cores have work. On an accelerator few batches matter more, so the size is as large as
    allowed, or half of that if half suffices. It is at most batch_size, but rounded up to a
    multiple of multiple_of, the number of devices.
    """
    most = count if most is None else most
    on_cpu = jax.default_backend() == "cpu"
    size = min(batch_size, max(_SMALLEST, min(most // 12, _LARGEST))) if on_cpu else batch_size
    size = -(-most // -(-most // size))
    if not on_cpu and count <= -(-size // 2):
        size = -(-size // 2)
    size = -(-size // multiple_of) * multiple_of
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)


def side_by_side(run: Callable, parts: Sequence, max_workers: int) -> list:
    """What run returns for each part, on one thread per core, at most max_workers.

    For a CPU, where XLA makes poor use of several cores for an operation on few examples.
    """
    workers = min(max_workers, len(parts), os.cpu_count() or 1)
    if workers < 2:
        return [run(part) for part in parts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, parts))


def in_chunks(fn_one: Callable, args: Any, chunk_size: int | None):
    """fn_one mapped over the examples of args (an array, or several of one length).

    chunk_size bounds how many are in memory at a time; one program runs the chunks in turn.
    """
    num_examples = jax.tree.leaves(args)[0].shape[0]
    if chunk_size is None or chunk_size >= num_examples:
        return jax.vmap(fn_one)(args)
    return jax.lax.map(fn_one, args, batch_size=chunk_size)


def counted(rows: Rows) -> tuple[int, Callable]:
    """The number of rows, and take(i), which gives rows i."""
    count = len(next(iter(rows.values())))
    return count, lambda i: {name: array[i] for name, array in rows.items()}


def bound(lift: Lift, variables: Any, most: int) -> MapExamples:
    """The mapping for a network with its variables, for evaluations of at most `most` rows."""

    def map_examples(fn):
        run = lift(fn)
        return lambda rows, *scalars: run(variables, most, *counted(rows), *scalars)

    return map_examples


def joined(parts: list[Any], counts: list[int]) -> Any:
    """The first count rows of each part, end to end, as numpy arrays."""
    parts = [
        jax.tree.map(lambda a, n=n: np.asarray(a)[:n], part)
        for part, n in zip(parts, counts, strict=True)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def on_one_device(logits_fn: Callable, batch_size: int) -> MapExamples:
    """The mapping for any logits_fn: jax.jit on the default device, batch by batch."""

    def map_examples(fn):
        compiled = jax.jit(partial(fn, logits_fn))

        def run(rows, *scalars):
            count, take = counted(rows)
            sizes = list(rows_of_batches(count, batch_size))
            parts = [compiled(take(i), *scalars) for i, _ in sizes]
            return joined(parts, [real for _, real in sizes])

        return run

    return map_examples
