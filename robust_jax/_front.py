"""The front door: what every public call of the library goes through.

A call from Python is checked, then runs as one program that is compiled once for its shapes and
settings. Networks, radii and everything with one row per example are arguments of the program. A
call with traced values (within the caller's jit, grad, vmap, scan or shard_map) runs the plain
function.
"""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from types import NoneType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax import _checks
from robust_jax._network import MOST_PROGRAMS, Network, comparable, on_the_whole_batch
from robust_jax._precision import wide_dtype
from robust_jax.batches import counted, joined, rows_of_batches, side_by_side
from robust_jax.devices.parallel import (
    Placement,
    has_explicit_axes,
    on_automatic_axes,
    outside_any_mesh,
    placement_of,
)
from robust_jax.keys import example_keys

# The kinds of parameters, by name.
_NETWORKS = ("logits_fn", "fn", "features_fn", "surrogate")
_POINTS = ("x_adv", "x_moved", "direction")
_ROWS = ("x", "y", "targets", "key", *_POINTS)
_LABELS = ("y", "targets")
_LENGTHS = ("eps", "step_size")
_DYNAMIC = {*_NETWORKS, *_ROWS, *_LENGTHS}


def compiled(fn: Callable) -> Callable:
    """The public form of fn(logits_fn, x, …): compiled, or fn itself within a trace."""
    signature = inspect.signature(fn)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    needed = {n for n, p in signature.parameters.items() if NoneType not in get_args(p.annotation)}

    @wraps(fn)
    def call(*args, **keywords):
        given = dict(signature.bind(*args, **keywords).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        # numpy's integers have a dtype, unlike Python's.
        given = {n: int(v) if isinstance(v, np.integer) else v for n, v in given.items()}
        if _checks.is_traced(given):
            return _within_a_trace(fn, given)
        with outside_any_mesh():
            values = _checked(given, defaults, needed)
            within_a_trace = _checks.is_traced([values[n].arrays for n in _NETWORKS if n in values])
            if within_a_trace or _is_set("jax_disable_jit"):
                rows = {name: value for name, value in values.items() if name in _ROWS}
                return _within_a_trace(fn, {**given, **rows})
            return _run(fn, values)

    # Tests look for this attribute.
    call.is_compiled = True  # type: ignore[attr-defined]  # functions have no typed attributes
    return call


def _checked(
    given: Mapping[str, Any], defaults: Mapping[str, Any], needed: Collection[str]
) -> dict[str, Any]:
    """The arguments, with networks traced and everything with one row per example as arrays.

    needed: those that must not be None.
    """
    # Settings are static, so a number in an array has to become a Python number.
    values = {
        n: v.item() if isinstance(v, _checks.ARRAYS) and n not in _DYNAMIC and not v.ndim else v
        for n, v in given.items()
    }
    # A Jacobian may be taken at any point; labels and radii are for images in [0,1].
    name = _examples(values)
    takes_images = "y" in values or "logits_fn" in values
    x = values[name] = _checks.pixels(values[name], name, bounded=takes_images)
    for other in {*_POINTS} & {*values} - {name}:
        values[other] = _checks.points(values[other], x, other)
    for name in ("chunk_size", "eot_samples"):
        if values.get(name) is not None:
            _checks.counts(**{name: values[name]})
    labels = [name for name in _LABELS if values.get(name) is not None or name in needed]
    for name in labels:
        values[name] = _checks.one_row_each(values[name], x, name)
    if "key" in values:
        values["key"] = _checks.key(values["key"], len(x))
    num_classes: dict[str, int] = {}
    for name in _NETWORKS:
        if name in values:
            is_randomised = name == "logits_fn" and values.get("eot_samples")
            key = values["key"] if is_randomised else None
            values[name] = _checks.network(values[name], x, name, key=key)
            if name == "fn":
                _checks.one_row_an_example(values[name], name)
            elif takes_images and name != "features_fn":
                num_classes[name] = _checks.num_classes(values[name], name)
    if len(num_classes) == 2:
        (other, count), (name, own) = num_classes.items()
        _checks.same_classes(name, own, other, count)
    for name in labels:
        # The caller's own loss and criterion may compare outputs with something other than labels.
        is_of_any_kind = name == "y" and values.get("criterion") is not None
        if not is_of_any_kind or _checks.looks_like_labels(values[name]):
            _checks.labels(values[name], next(iter(num_classes.values())), name)
            # 8 bits may not hold every class.
            values[name] = values[name].astype(np.int32, copy=False)
    for name in _LENGTHS:
        if name in values and (values[name] is not None or defaults.get(name) is not None):
            _checks.length(name, values[name], infinite=defaults.get(name) == np.inf)
            # 16 bits may not hold an l0 radius, which is a number of pixels.
            kept = jax.dtypes.canonicalize_dtype(wide_dtype(x.dtype))
            values[name] = jnp.asarray(values[name], kept)
    return values


def _within_a_trace(fn: Callable, given: Mapping[str, Any]) -> Any:
    name, given = _examples(given), dict(given)
    x = given[name]
    # Types and shapes are known even here.
    if hasattr(x, "dtype"):
        _checks.floating(x, name)
        for other in {*_POINTS} & {*given} - {name}:
            given[other] = _checks.points(given[other], x, other)
    if given.get("key") is not None:
        given["key"] = _checks.key(given["key"], len(x))
    for name in _LABELS:
        if given.get(name) is not None:
            given[name] = y = _checks.one_row_each(given[name], x, name)
            if given.keys().isdisjoint(("loss", "criterion")):  # whose y need not be labels
                _checks.type_of_labels(y, name)
            if _checks.looks_like_labels(y):
                given[name] = y.astype(np.int32)
    for name in _LENGTHS:
        _checks.one_number(name, given.get(name))
    if not has_explicit_axes(x):
        with _told() as is_outermost:
            return _on_whole_batches(fn, given) if is_outermost else fn(**given)
    # vmap needs all arrays sharded alike, which keys and labels may not be.
    leaves, structure = jax.tree.flatten(dict(given), is_leaf=lambda leaf: leaf is None)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def run(arrays):
        values = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        given = jax.tree.unflatten(structure, values)
        return _on_whole_batches(fn, given) if is_outermost else fn(**given)

    with _told() as is_outermost:
        return on_automatic_axes(run, x)(arrays)


def _on_whole_batches(fn: Callable, given: Mapping[str, Any]) -> Any:
    """fn(**given), with networks called on whole batches if vmap has no rule for one of them."""
    try:
        return fn(**given)
    except (NotImplementedError, ValueError) as error:  # what vmap raises if it has no rule
        has_no_rule = _NO_RULE in str(error) or "vmap_method" in str(error)
        if not has_no_rule or given.get("eot_samples"):  # a network that takes a key as well
            raise
    lifted = {name: on_the_whole_batch(given[name]) for name in _NETWORKS if name in given}
    return fn(**{**given, **lifted})


_within_a_call: ContextVar[bool] = ContextVar("within_a_call", default=False)


@contextmanager
def _told() -> Iterator[bool]:
    """Replaces JAX's errors during tracing with an explanation of their cause.

    Yields whether this is the caller's own call, rather than one function of this package calling
    another.
    """
    is_outermost = not _within_a_call.get()
    token = _within_a_call.set(True)
    try:
        yield is_outermost
    except (TypeError, ValueError, NotImplementedError) as error:  # the types of those in _MEANT
        for said, meant in _MEANT.items() if is_outermost else ():
            if said in str(error):
                raise ValueError(meant) from error
        raise
    finally:
        _within_a_call.reset(token)


_ON_A_MESH = (
    "the network closes over weights that lie on a mesh; make them part of the network: pass "
    "jax.tree_util.Partial(apply, weights), which is called as apply(weights, x)"
)
_NO_RULE = "Batching rule for"
_MEANT = {
    _NO_RULE: "jax.vmap has no rule for an operation of the network, and attacks are written for "
    "one example and lifted by jax.vmap; add a rule with jax.custom_batching.custom_vmap",
    "Mesh for all inputs should be equal": _ON_A_MESH,
    "should match the aval mesh": _ON_A_MESH,
    "Closing over inputs to shard_map": _ON_A_MESH,
    "(jvp) to a custom_vjp function": "the network has no forward-mode derivative (because of "
    "jax.custom_vjp, an exported function or a callback), which power iteration and projections "
    "need; jacobian.singular_values and frobenius_norm do not",
    "manual axis types do not match": "attacks within your own jax.shard_map need "
    "check_vma=False there: their loops begin with values that are the same on every device",
}


def on_the_host(fn: Callable) -> Callable:
    """The public form of a loop on the host: it refuses traces, and chooses its devices itself."""

    @wraps(fn)
    def call(*args, **keywords):
        _checks.refuse_traces()
        with outside_any_mesh():
            return fn(*args, **keywords)

    return call


def _examples(values: Mapping[str, Any]) -> str:
    """The name of the argument that holds a call's examples."""
    return "x" if "x" in values else "x_adv"


def _run(fn: Callable, values: dict[str, Any]) -> Any:
    x = values[_examples(values)]
    count = len(x)
    placement = placement_of(x, count)
    rows, rest, static = {}, {}, {}
    for name, value in values.items():
        if name in _ROWS and value is not None:
            rows[name] = value
        elif name in _NETWORKS or isinstance(value, jax.Array | np.ndarray):
            rest[name] = value
        else:
            static[name] = tuple(value) if isinstance(value, list) else value
    if placement.mesh is not None:
        if "key" in rows:
            rows["key"] = _keys(rows["key"], count)
        if missing := -count % placement.count:
            where = np.minimum(np.arange(count + missing), count - 1)
            rows = {name: value[where] for name, value in rows.items()}
        rows, rest = placement.shared(rows), placement.replicated(rest)
    programs = tuple(value.program for value in rest.values() if isinstance(value, Network))
    with _told():
        out = _program(fn, _Setting(static), programs, placement)(rows, rest)
    if count % placement.count:
        out = jax.tree.map(lambda a: a[:count], out)
    return placement.brought_back(out, like=x)


@partial(jax.jit, static_argnums=1)
def _keys(key, count):
    return example_keys(key, count)


class _Setting:
    """Static values as a key of the program cache; see `comparable`."""

    def __init__(self, value: Any):
        self.value = value
        self._comparable = comparable(value)
        self._hash = hash(self._comparable)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Setting) and self._comparable == other._comparable

    def __hash__(self) -> int:
        return self._hash


@lru_cache(MOST_PROGRAMS)
def _program(fn: Callable, static: _Setting, programs: tuple, placement: Placement) -> Callable:
    """fn as a program of (rows, rest), one for each structure of its networks.

    Each has its own jax.jit, so that JAX also drops what is dropped from this cache.
    """

    def run(rows, rest):
        return fn(**rows, **rest, **static.value)

    return placement.compiled(run, rows_at=0)


class Mapper:
    """Maps fn(logits_fn, rows, *scalars) over rows, batch by batch, to numpy arrays.

    fn is compared by value, so equal functions share one program. A batch that does not fit into
    memory is halved, with a warning.
    """

    def __init__(self, network: Network, batch_size: int, most: int):
        _checks.refuse_traces(network.arrays)
        self._network = network
        self._placement = placement_of(None, batch_size)
        self._placed = self._placement.replicated(self._network)
        self._batch_size, self._most = batch_size, most

    def __call__(self, fn: Callable) -> Callable:
        return lambda rows, *scalars: self.on_rows(fn, self._most, *counted(rows), *scalars)

    def on_rows(self, fn: Callable, most: int, count: int, take: Callable, *scalars: Any) -> Any:
        """The same for the rows that take(i) gives, i among 0 … count-1, at most `most` of them."""
        while True:
            try:
                return self._mapped(fn, most, count, take, scalars)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self._batch_size == 1:
                    raise
                self._batch_size //= 2
                warnings.warn(
                    f"batches of {2 * self._batch_size} examples do not fit into the device's "
                    f"memory; continuing with {self._batch_size}",
                    stacklevel=2,
                )

    def _mapped(self, fn: Callable, most: int, count: int, take: Callable, scalars: tuple) -> Any:
        where = self._placement
        program = _rows_program(_Setting(fn), self._network.program, where)
        sizes = list(rows_of_batches(count, self._batch_size, most=most, multiple_of=where.count))
        scalars = where.replicated(scalars)  # another network may be among them
        with _told():
            if where.mesh is None and _may_run_in_threads(self._network):
                # JAX arrays, compiled here, since the caller's modes do not hold in other threads.
                rows = [jax.tree.map(jnp.asarray, take(i)) for i, _ in sizes]
                placed, scalars = jax.tree.map(jnp.asarray, (self._placed, scalars))
                compiled = program.lower(placed, rows[0], scalars).compile()
                parts = side_by_side(
                    lambda some: jax.device_get(compiled(placed, some, scalars)),
                    rows,
                    self._batch_size // len(sizes[0][0]),
                )
            else:
                parts = [program(self._placed, where.shared(take(i)), scalars) for i, _ in sizes]
        return joined(jax.device_get(parts), [real for _, real in sizes])


def _may_run_in_threads(network: Network) -> bool:
    """Whether the program is for a CPU and neither it nor any JAX debug mode needs Python."""
    modes = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs")
    needs_python = network.program.outside or any(map(_is_set, modes))
    return jax.default_backend() == "cpu" and not needs_python


def _is_set(mode: str) -> bool:
    """Whether the caller has set a JAX mode, even for this thread alone."""
    return getattr(jax.config, mode)  # JAX declares them at run time, where mypy does not see them


@lru_cache(MOST_PROGRAMS)
def _rows_program(fn: _Setting, program: Any, placement: Placement) -> jax.stages.Wrapped:
    def run(network, rows, scalars):
        return fn.value(network, rows, *scalars)

    return placement.compiled(run, rows_at=1)
