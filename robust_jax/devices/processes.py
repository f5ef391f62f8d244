"""Several processes in one run: how they find each other, who writes, and how all agree.

All of them execute the same code on the same numbers; each feeds its own rows to its own devices.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from robust_jax.errors import UserError

Result = TypeVar("Result")

_LONGEST_MESSAGE = 4096


def initialize(where: str) -> None:
    """Joins the other processes; call it before anything asks for a device.

    where: "auto" (from SLURM, Open MPI, Kubernetes or a TPU pod), "address:port,count,index", or
    "", which is "auto" under srun and mpirun with several tasks and otherwise a single process.
    Raises UserError if the processes cannot be joined.
    """
    if not where and not _several_tasks():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its listener cannot be set up again once training has ended: see train/loop.py.
    jax.config.update("jax_enable_preemption_service", False)
    place: tuple[Any, ...] = ()
    if where not in ("", "auto"):
        try:
            address, count, index = where.split(",")
            place = (address, int(count), int(index))
        except ValueError:
            raise UserError(
                f"--distributed is {where!r}; choices: auto, or address:port,number of "
                "processes,number of this one, as in 10.0.0.1:1234,2,0"
            ) from None
    try:
        jax.distributed.initialize(*place)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--distributed: the processes cannot be joined: {reason}") from error


def _several_tasks() -> bool:
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return any(int(os.environ.get(name, 1)) > 1 for name in counts)


def is_first() -> bool:
    """Whether this is the process that writes, logs and shows progress."""
    return jax.process_index() == 0


def on_all(fn: Callable[[], Result]) -> Result:
    """fn() in every process; what a user can fix in one is raised in all, as none works alone.

    Raises UserError, or OSError if it is this process's own.
    """
    if jax.process_count() == 1:
        return fn()
    result, failed = None, None
    try:
        result = fn()
    except (UserError, OSError) as error:
        failed = error
    message = str(failed or "").encode()[:_LONGEST_MESSAGE].ljust(_LONGEST_MESSAGE, b"\0")
    messages = multihost_utils.process_allgather(np.frombuffer(message, np.uint8))
    if failed is not None:
        raise failed
    for other in messages:
        if text := bytes(other).rstrip(b"\0"):
            raise UserError(text.decode(errors="replace"))
    return cast(Result, result)


def on_first(fn: Callable[[], object]) -> None:
    """fn() in the first process while the others wait; see `on_all`."""
    on_all(fn if is_first() else lambda: None)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call this."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def largest(number: int) -> int:
    """The largest of the processes' numbers; all must call this."""
    return int(multihost_utils.process_allgather(np.array(number)).max())
