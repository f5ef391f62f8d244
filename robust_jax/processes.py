"""Several processes at one run: how they find each other, who writes, and how all agree.

All of them execute the same code on the same numbers; each feeds its own rows to its own devices.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from robust_jax.errors import UserError

_LONGEST_MESSAGE = 4096


def initialize(where: str) -> None:
    """Joins the other processes; to be called before anything asks for a device.

    where: "auto" (as SLURM, Open MPI, Kubernetes or a TPU pod tell), "address:port,count,index", or
    "", which is "auto" under srun and mpirun with several tasks and else a process by itself.
    Raises UserError where they cannot be found.
    """
    if not where and not _several_tasks():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
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


def on_first(fn: Callable[[], object]) -> None:
    """Calls fn in the first process while the others wait; its UserError is raised in all."""
    if jax.process_count() == 1:
        fn()
        return
    message = b""
    if is_first():
        try:
            fn()
        except UserError as error:
            message = str(error).encode()[:_LONGEST_MESSAGE]
    padded = np.frombuffer(message.ljust(_LONGEST_MESSAGE, b"\0"), np.uint8)
    message = bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0")
    if message:
        raise UserError(message.decode(errors="replace"))


def wait() -> None:
    """Returns once every process is here, so that what the first has written can be read."""
    multihost_utils.sync_global_devices("processes.wait")
