"""Devices: the only file that calls pmap or shard_map and makes a mesh.

Work is written per device and mapped over the axis AXIS. Two mappings do the same: jax.pmap,
and its successor jit(shard_map). With one CPU device both simply run on it.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from robust_jax.batches import Lift, joined, rows_of_batches, side_by_side

AXIS = "batch"
Method = Literal["pmap", "shard_map"]
METHODS: tuple[Method, ...] = get_args(Method)


def check_batch_size(batch_size: int, num_parts: int) -> None:
    """Raises ValueError if the devices cannot share a batch, or its parts, evenly."""
    shares = jax.device_count() * num_parts
    if batch_size < 1 or batch_size % shares:
        near = max(shares, round(batch_size / shares) * shares)
        parts = f" in {num_parts} parts each" if num_parts > 1 else ""
        raise ValueError(
            f"{batch_size} examples cannot be shared by {jax.device_count()} device(s){parts}; "
            f"take a multiple of {shares}, such as {near}"
        )


def map_step(
    step: Callable, method: Method, devices: Sequence[jax.Device] | None = None
) -> Callable:
    """Maps step(state, batch, key) -> (state, sums), written per device, over the rows of all.

    The batch holds this process's rows: see `own_rows`. The state is not replicated outside, and
    it is donated. All three may be tuples, for several runs.
    """
    if method == "pmap":
        mapped = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0, None),
            out_axes=None,
            donate_argnums=0,
            devices=devices,
        )
        split = partial(_split_rows, devices=devices)
        return lambda state, batch, key: mapped(state, split(batch), key)
    mesh = _mesh(devices)
    mapped = jax.jit(_shard_map(step, mesh, out_specs=PartitionSpec()), donate_argnums=0)
    return lambda state, batch, key: mapped(state, _shard_rows(batch, mesh), key)


def lifted(network: Callable, method: Method, *, batch_size: int) -> Lift:
    """The lift for functions of a network(variables, x); see `batches.Lift`.

    Every process runs its own rows of a batch on all its devices and gets the results of all rows.
    Batches come from `rows_of_batches`, in multiples of the number of devices. Scalars are the same
    for every example and can change without recompiling.
    """
    num_devices = jax.device_count()
    in_threads = num_devices == 1 and jax.default_backend() == "cpu"

    @cache
    def lift(fn):
        def per_device(variables, batch, scalars):
            return fn(partial(network, variables), batch, *scalars)

        mapped = _map_examples(per_device, method)
        compiled_sizes: set[int] = set()

        def run(variables, most, count, take, *scalars):
            sizes = list(rows_of_batches(count, batch_size, most=most, multiple_of=num_devices))

            def one(rows):
                return _gathered(mapped(variables, take(rows[own_rows(len(rows))]), scalars))

            rows = [rows for rows, _ in sizes]
            size = len(rows[0])
            # The first batch of a size compiles, and the others wait for it.
            alone = 0 if size in compiled_sizes else 1
            parts = [one(some) for some in rows[:alone]]
            compiled_sizes.add(size)
            parts += side_by_side(one, rows[alone:], batch_size // size if in_threads else 1)
            return joined(parts, [real for _, real in sizes])

        return run

    return lift


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a call's examples lie: on one device (mesh is None), or a share on each of several.

    axes: The mesh axes that the rows are sharded over; None if each device has all rows.
    """

    mesh: Any = None
    axes: Any = None
    _is_ours: bool = False

    @property
    def count(self) -> int:
        """How many shares there are."""
        if self.mesh is None or self.axes is None:
            return 1
        names = self.axes if isinstance(self.axes, tuple) else (self.axes,)
        return math.prod(self.mesh.shape[name] for name in names)

    def replicated(self, tree: Any) -> Any:
        """The arrays with a whole copy on every device."""
        return self._put(tree, PartitionSpec())

    def shared(self, tree: Any) -> Any:
        """The arrays [B,...] with a share of their rows on each device."""
        return self._put(tree, PartitionSpec(self.axes))

    def brought_back(self, tree: Any, like: Any) -> Any:
        """Results on one device, if the examples were not committed to any.

        For examples on a mesh, results of their shape are sharded like the examples (like).
        """
        if self._is_ours:
            return jax.tree.map(jnp.asarray, jax.device_get(tree))
        if self.mesh is None:
            return tree

        def put(leaf):
            return jax.device_put(leaf, like.sharding) if leaf.shape == like.shape else leaf

        return jax.tree.map(put, tree)

    def compiled(self, run: Callable, rows_at: int) -> jax.stages.Wrapped:
        """run as a program, with each device on its share of argument number rows_at."""
        if self.mesh is None:
            return jax.jit(run)
        shares = PartitionSpec(self.axes)
        in_specs = [PartitionSpec()] * len(inspect.signature(run).parameters)
        in_specs[rows_at] = shares
        # Nothing is summed over devices, so there is nothing to check.
        return jax.jit(
            jax.shard_map(
                run, mesh=self.mesh, in_specs=tuple(in_specs), out_specs=shares, check_vma=False
            )
        )

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, spec))


def placement_of(x: Any, num_rows: int) -> Placement:
    """Where x lies; what is committed to no device is shared by all local ones that get a row.

    It is not shared if the caller has chosen a device with jax.default_device.
    """
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
        if isinstance(x.sharding, NamedSharding):
            spec = x.sharding.spec
            return Placement(x.sharding.mesh, spec[0] if len(spec) else None)
        return Placement(_mesh(list(x.sharding.device_set)), AXIS)
    devices = jax.local_devices()[:num_rows]
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # declared at run time
    if len(devices) == 1 or chosen is not None or (isinstance(x, jax.Array) and x.committed):
        return Placement()
    return Placement(_mesh(devices), AXIS, True)


def outside_any_mesh() -> AbstractContextManager:
    """A context whose work chooses its own devices, whatever mesh the caller has set."""
    try:
        return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))
    except ValueError:  # within a trace, where nothing is placed
        return nullcontext()


def has_explicit_axes(array: Any) -> bool:
    """Whether it lies on a mesh with explicit axes, which jax.make_mesh gives by default."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def on_automatic_axes(fn: Callable, x: Any) -> Callable:
    """fn on arrays with explicit axes, in a trace; XLA chooses the sharding of what is in between.

    x: one of the arrays; the results are sharded like its first axis.
    """
    sharding = jax.typeof(x).sharding
    automatic = jax.sharding.auto_axes(fn, out_sharding=PartitionSpec(*sharding.spec[:1]))

    def call(*args):
        with jax.sharding.use_abstract_mesh(sharding.mesh):
            return automatic(*args)

    return call


def off_any_mesh(tree: Any) -> Any:
    """The tree with the arrays that several devices share moved to one device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def put(leaf):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        return jax.device_put(leaf, here) if len(leaf.sharding.device_set) > 1 else leaf

    return jax.tree.map(put, tree)


def replicated() -> NamedSharding:
    """The sharding that puts a whole copy on every device of every process."""
    return NamedSharding(_mesh(None), PartitionSpec())


def own_rows(batch_size: int) -> slice:
    """The rows of a batch that this process feeds to its devices."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def on_this_device(tree: Any) -> Any:
    """Arrays that every device has a whole copy of, as arrays of this process alone."""
    return jax.tree.map(
        lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree
    )


def on_every_device(tree: Any) -> Any:
    """Copies of arrays that all processes hold alike, whole on every device of every process.

    What pmap returns belongs to one process, but a checkpoint is written by all.
    """

    def copied(leaf):
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            return jax.make_array_from_process_local_data(replicated(), np.asarray(leaf))
        return jnp.copy(leaf)

    return jax.tree.map(copied, tree)


def _gathered(outputs: Any) -> Any:
    """The rows that all processes computed, in their order, as numpy arrays."""
    if jax.process_count() == 1:
        return jax.device_get(outputs)
    return multihost_utils.process_allgather(outputs, tiled=True)


def _map_examples(per_device: Callable, method: Method) -> Callable:
    """per_device(variables, batch, scalars) -> outputs, on the rows of all devices."""
    if method == "pmap":
        mapped = jax.pmap(per_device, in_axes=(None, 0, None))
        return lambda variables, batch, scalars: _join_rows(
            mapped(variables, _split_rows(batch, None), scalars)
        )
    mesh = _mesh(None)
    sharded = jax.jit(_shard_map(per_device, mesh, out_specs=PartitionSpec(AXIS)))
    return lambda variables, batch, scalars: sharded(variables, _shard_rows(batch, mesh), scalars)


def _shard_map(fn: Callable, mesh: Mesh, out_specs: PartitionSpec) -> Callable:
    # check_vma=True would make a gradient that is averaged by hand n_devices times too large.
    in_specs = (PartitionSpec(), PartitionSpec(AXIS), PartitionSpec())
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _mesh(devices: Sequence[jax.Device] | None) -> Mesh:
    # Sorted by process, so that the rows of each are adjacent; jax.make_mesh may mix them.
    chosen = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))


def _shard_rows(batch: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def sharded(array):
        if isinstance(array, jax.core.Tracer):  # counting operations, for which shapes are enough
            return array
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(sharded, batch)


def _split_rows(batch: Any, devices: Sequence[jax.Device] | None) -> Any:
    n = len(devices or jax.local_devices())
    return jax.tree.map(lambda a: a.reshape(n, a.shape[0] // n, *a.shape[1:]), batch)


def _join_rows(batch: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), batch)
