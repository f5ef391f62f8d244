"""Devices: the only file that names pmap, shard_map or a mesh.

Work is written per device and mapped over the axis AXIS. Two mappings do the same: jax.pmap,
and its successor jit(shard_map). With one CPU device both are just that device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "batch"
Method = Literal["pmap", "shard_map"]


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError where the devices cannot share a batch evenly."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        near = max(devices, round(batch_size / devices) * devices)
        raise ValueError(f"{batch_size} examples cannot be shared by {devices} devices; "
                         f"take a multiple of {devices}, such as {near}")  # fmt: skip


def map_step(step: Callable, method: Method) -> Callable:
    """step(state, batch, key) -> (state, sums), per device, as the same on the whole batch.

    The state is unreplicated outside and donated; each process passes its own rows of the batch.
    """
    if _checked(method) == "pmap":
        mapped = jax.pmap(
            step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0
        )
        return lambda state, batch, key: mapped(state, _split_rows(batch), key)
    mesh = _mesh()
    # check_vma=True would make a gradient that is averaged by hand n_devices times too large.
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    compiled = jax.jit(mapped, donate_argnums=0)
    return lambda state, batch, key: compiled(state, _shard_rows(batch, mesh), key)


def map_examples(fn: Callable, method: Method) -> Callable:
    """fn(variables, batch, *scalars) -> per-example outputs [B,…], its batch shared by the devices.

    Scalars are the same for every example and can change without recompiling.
    """
    if _checked(method) == "pmap":

        @partial(jax.pmap, in_axes=(None, 0, None))
        def mapped(variables, batch, scalars):
            return fn(variables, batch, *scalars)

        def call(variables, batch, *scalars):
            return _join_rows(mapped(variables, _split_rows(batch), scalars))

        return call
    mesh = _mesh()
    compiled = jax.jit(
        jax.shard_map(
            lambda variables, batch, scalars: fn(variables, batch, *scalars),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec()),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )
    )
    return lambda variables, batch, *scalars: compiled(variables, _shard_rows(batch, mesh), scalars)


def own_rows(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This process's rows of a global batch."""
    processes, process = jax.process_count(), jax.process_index()
    return {k: np.array_split(v, processes)[process] for k, v in batch.items()}


def is_main_process() -> bool:
    """Whether this process is the one that writes, logs and shows progress."""
    return jax.process_index() == 0


def _checked(method: str) -> str:
    if method not in get_args(Method):
        raise ValueError(f"{method!r} is not one of {', '.join(get_args(Method))}")
    return method


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def _shard_rows(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)


def _split_rows(batch: Any) -> Any:
    n = jax.local_device_count()
    return jax.tree.map(lambda a: a.reshape(n, a.shape[0] // n, *a.shape[1:]), batch)


def _join_rows(batch: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), batch)
