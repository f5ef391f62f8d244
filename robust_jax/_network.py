"""A function of examples as a pytree: the arrays it closes over are leaves, the rest is static.

jax.jit compiles such a network once, however often the function is defined again and whatever its
weights are. The function is traced at every call, which costs milliseconds. Two traces that do the
same, by their description (`_described`), share one program.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from robust_jax._convolution import replacement
from robust_jax.devices.parallel import off_any_mesh

# How many programs are kept for reuse; an older one is compiled again when it comes back.
MOST_PROGRAMS = 256
_LIBRARY = os.path.dirname(jax.__file__) + os.sep
# The file of JAX with the functions that it wraps around a caller's derivative.
_WRAPPERS = os.path.join(_LIBRARY, "_src", "custom_derivatives.py")
_OURS = core.DebugInfo("robust_jax", "robust_jax", None, None)
_JITS = ("jit", "pjit")
_REMATS = ("checkpoint", "remat2")
_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
_PLACED = ("fwd_jaxpr_thunk", "call_jaxpr")  # parameters of such a call that know their source


class Program:
    """What a network computes for a batch, usually of one, without the arrays it closes over."""

    def __init__(self, closed: core.ClosedJaxpr, outputs: Any, fn: Callable, is_plain: bool):
        self.jaxpr, self._dtype = closed.jaxpr, closed.in_avals[0].dtype
        self._batch_size = closed.in_avals[0].shape[0]
        self.outputs = outputs
        self._is_plain = is_plain
        self._description: tuple = (is_plain, jax.tree.structure(outputs), _described(closed.jaxpr))
        # A function that vmap cannot lift is called as it is, with its arrays as constants.
        self._fn = None if _can_be_lifted(closed) else fn
        if self._fn is not None:
            self._description += tuple(map(_Itself, closed.consts))
        self._hash = hash(self._description)

    @property
    def outside(self) -> str | None:
        """A primitive in it that leaves JAX, such as pure_callback."""
        return _outside(self.jaxpr)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Program)
            and self._hash == other._hash
            and self._description == other._description
        )

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, arrays: Sequence[jax.Array], x: jax.Array, *key: jax.Array) -> Any:
        if self._fn is not None:
            return on_the_whole_batch(self._fn)(x)
        is_fast = jax.default_backend() == "cpu" and not self._is_plain

        def evaluate(*args):
            return interpret(self.jaxpr, arrays, args, _fast_on_a_cpu if is_fast else _as_written)

        x = x.astype(self._dtype)
        if len(x) == self._batch_size:
            results = evaluate(x, *key)
        else:
            results = jax.vmap(lambda x: [result[0] for result in evaluate(x[None])])(x)
        return jax.tree.unflatten(jax.tree.structure(self.outputs), results)


@jax.tree_util.register_pytree_node_class
class Network:
    """network(x), or network(x, key), [B,...] -> arrays [B,...]: a program and its arrays."""

    def __init__(self, arrays: Sequence[jax.Array], program: Program):
        self.arrays, self.program = arrays, program

    def tree_flatten(self):
        return self.arrays, self.program

    @classmethod
    def tree_unflatten(cls, program, arrays):
        return cls(arrays, program)

    def __call__(self, x: jax.Array, *key: jax.Array) -> Any:
        return self.program(self.arrays, x, *key)


def as_network(
    fn: Callable,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    batch_size: int = 1,
    key: jax.Array | None = None,
) -> Network:
    """fn, [B,...] -> arrays [B,...], traced for a batch of examples of a shape and dtype.

    key: A key like the one that fn takes, if it takes one. Raises whatever fn raises.
    """
    if isinstance(fn, Network):
        return fn
    fn = off_any_mesh(fn)  # its program would keep the mesh that its weights are on
    inputs = [jax.ShapeDtypeStruct((batch_size, *shape), dtype)]
    if key is not None:
        inputs.append(jax.ShapeDtypeStruct((), key.dtype))

    def traced():
        # JAX would cache the trace of fn itself, though what fn refers to may have changed.
        return jax.make_jaxpr(lambda *args: fn(*args), return_shape=True)(*inputs)

    closed, outputs = traced()
    if any(map(_keeps_arrays, closed.jaxpr.eqns)):
        # A jitted function hides the arrays it closes over.
        closed = jax.make_jaxpr(partial(_inlined, closed.jaxpr, closed.consts))(*inputs)
    program = Program(closed, outputs, fn, isinstance(fn, _Plain))
    known = _known(program)
    if known is program and _tracers(traced()[0]) - _tracers(closed):
        _known.cache_clear()
        raise jax.errors.UnexpectedTracerError("the second call uses a value of the first")
    return Network(tuple(closed.consts), known)


def _tracers(closed: core.ClosedJaxpr) -> set[int]:
    return {id(const) for const in closed.consts if isinstance(const, jax.core.Tracer)}


def has_forward_mode(fn: Callable, x: Any) -> bool:
    """Whether fn has a forward-mode derivative, which a function with jax.custom_vjp lacks."""
    jaxpr = jax.make_jaxpr(partial(jax.jvp, fn))((x,), (x,)).jaxpr
    return all(eqn.primitive.name != "custom_lin" for eqn in _all_equations(jaxpr))


class _Plain:
    def __init__(self, fn: Callable):
        self._fn = fn

    def __call__(self, *args: Any) -> Any:
        return self._fn(*args)


def plain_convolutions(logits_fn: Callable) -> Callable:
    """logits_fn with its convolutions and poolings computed by XLA on a CPU too.

    On a CPU this package otherwise computes them by its own formulas, which are several times
    faster there, above all for gradients, and equal up to rounding. Elsewhere this changes nothing.

    Args:
        logits_fn: The network, [B,...] -> [B,K].

    Returns:
        The same function, to be given to an attack or a Jacobian norm in its place.

    Example:
        >>> import jax, jax.numpy as jnp, robust_jax
        >>> logits_fn = lambda x: x.reshape(len(x), -1) @ jnp.ones((12, 3))
        >>> plain = robust_jax.plain_convolutions(logits_fn)
        >>> bool((plain(jnp.ones((1, 2, 2, 3))) == 12).all())
        True
    """
    return _Plain(logits_fn)


@lru_cache(MOST_PROGRAMS)
def _known(program: Program) -> Program:
    """The first program that is equal to it, as identical objects compare fast afterwards."""
    return program


def _can_be_lifted(closed: core.ClosedJaxpr) -> bool:
    batch = jax.ShapeDtypeStruct((2, *closed.in_avals[0].shape), closed.in_avals[0].dtype)
    if _outside(closed.jaxpr) is None:
        return True
    try:
        jax.eval_shape(jax.vmap(core.jaxpr_as_fun(closed)), batch)
    except (NotImplementedError, ValueError):  # what vmap raises if it has no rule
        return False
    return True


def _outside(jaxpr: core.Jaxpr) -> str | None:
    """The first primitive in the program that leaves JAX."""
    names = (eqn.primitive.name for eqn in _all_equations(jaxpr))
    return next((name for name in names if name in _OUTSIDE), None)


# Primitives that leave JAX: their types are fixed, and they may have no batching rule.
_OUTSIDE = ("call_exported", "pure_callback", "io_callback", "ffi_call", "call_tf")


def on_the_whole_batch(fn: Callable) -> Callable:
    """fn for which vmap has no rule, called with the examples of a vmap as one batch."""

    def merged(fn, *batched):
        """fn on arrays [N,1,...] as one batch, returned as [N,1,...]."""
        out = fn(*(a.reshape(-1, *a.shape[2:]) for a in batched))
        return jax.tree.map(lambda a: a.reshape(*batched[0].shape[:2], *a.shape[1:]), out)

    def lifted(fn):
        call = jax.custom_batching.custom_vmap(fn)

        @call.def_vmap
        def rule(size, is_batched, *args):
            whole = [
                a if b else jnp.broadcast_to(a, (size, *a.shape))
                for a, b in zip(args, is_batched, strict=True)
            ]
            out = merged(call, *whole)  # perhaps within another vmap
            return out, jax.tree.map(lambda _: True, out)

        return call

    @jax.custom_vjp
    def call(x):
        return lifted(fn)(x)

    def gradient(x, cotangent):
        try:
            return jax.vjp(fn, x)[1](cotangent)[0]
        except ValueError as error:
            raise ValueError(
                "the network leaves JAX and has no gradient there: attacks.square needs none, "
                "jax.custom_vjp gives a callback one, vjp_order=1 an exported function"
            ) from error

    def pull(x, cotangent):
        return lifted(gradient)(x, cotangent)

    call.defvjp(lambda x: (call(x), x), lambda x, cotangent: (pull(x, cotangent),))
    return call


# Reading programs.


def _keeps_arrays(eqn: core.JaxprEqn) -> bool:
    """Whether a jitted call in it hides arrays that `_inlined` takes out."""
    name, params = eqn.primitive.name, eqn.params
    if name in _JITS:
        return bool(params["jaxpr"].consts) or any(map(_keeps_arrays, params["jaxpr"].jaxpr.eqns))
    if name == "cond":  # a branch for each platform stays as it is
        bodies = () if params.get("branches_platforms") else params["branches"]
    else:
        bodies = (params["jaxpr"],) if name in ("scan", *_REMATS) else ()
    return any(_keeps_arrays(inner) for body in bodies for inner in body.eqns)


def _all_equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in programs_in(eqn.params.values()):
            yield from _all_equations(inner)


def programs_in(params: Iterable[Any]) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters: bodies, branches and the like."""
    for value in params:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from programs_in(value)


def interpret(
    jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any], rule: Callable
) -> list[Any]:
    """The program's results, evaluated equation by equation, with jitted calls inlined.

    rule(eqn, inputs) gives an equation's results, or None to evaluate the equation as it is.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if eqn.primitive.name in _JITS:
            inner = eqn.params["jaxpr"]
            outputs = interpret(inner.jaxpr, inner.consts, inputs, rule)
            values.update(zip(eqn.outvars, outputs, strict=True))
        elif (outputs := rule(eqn, inputs)) is not None:
            values.update(zip(eqn.outvars, outputs, strict=True))
        else:
            variables, fn = variables_and_function(jaxpr, eqn)
            outputs = fn(*(values[var] for var in variables))
            values.update(zip(_kept(eqn), outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _inlined(jaxpr: core.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    """The program's results with every jitted call inlined, also in loops and branches."""
    return interpret(jaxpr, consts, args, _written_again)


def _written_again(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any] | None:
    """A loop, a branch or a remat with its body inlined, so that JAX takes out what it closes over.

    Functions with custom derivatives stay as they are, and so do while loops, which have no
    reverse-mode derivative.
    """
    params = eqn.params
    if not _keeps_arrays(eqn):
        return None

    def inlined(body, *leading):
        closed = body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, [])
        return lambda *args: _inlined(closed.jaxpr, closed.consts, *leading, *args)

    match eqn.primitive.name:
        case "scan":
            num_consts, num_carry = params["num_consts"], params["num_carry"]
            body = inlined(params["jaxpr"], *inputs[:num_consts])

            def step(carry, x):
                results = body(*carry, *x)
                return results[:num_carry], results[num_carry:]

            carry, rows = inputs[num_consts:][:num_carry], inputs[num_consts:][num_carry:]
            settings = {name: params[name] for name in ("length", "reverse", "unroll")}
            return sum(map(list, jax.lax.scan(step, carry, rows, **settings)), [])
        case "cond":
            return jax.lax.switch(inputs[0], [inlined(b) for b in params["branches"]], *inputs[1:])
        case name if name in _REMATS:
            settings = {name: params[name] for name in ("prevent_cse", "policy")}
            return jax.checkpoint(inlined(params["jaxpr"]), **settings)(*inputs)
    return None


def _as_written(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> None:
    """Leaves every equation as it is."""


def _fast_on_a_cpu(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    fast = replacement(eqn)
    return None if fast is None else [fast(*inputs)]


def variables_and_function(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn
) -> tuple[list[core.Var], Callable]:
    """The variables that an equation reads, and a function that maps them to its results."""
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
    alone = jaxpr.replace(
        constvars=[], invars=variables, outvars=_kept(eqn), eqns=[eqn], debug_info=_OURS
    )
    return variables, core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))


def _kept(eqn: core.JaxprEqn) -> list[core.Var]:
    return [var for var in eqn.outvars if not isinstance(var, core.DropVar)]


def _described(jaxpr: core.Jaxpr, rules: bool = True) -> tuple:
    """The program as nested tuples that are equal for programs that do the same.

    rules: whether to include the custom derivatives of functions in it. The derivatives' own ones
    are left out, as nothing behind the front door is differentiated twice.
    """
    numbers: dict[Any, int] = {}

    def number(var):
        return numbers.setdefault(var, len(numbers)), var.aval

    def operand(var):
        if isinstance(var, core.Literal):
            return "literal", comparable(var.val, rules), var.aval
        return numbers[var]

    inputs = tuple(number(var) for var in (*jaxpr.constvars, *jaxpr.invars))
    equations = []
    for eqn in jaxpr.eqns:
        params = dict(eqn.params)
        if eqn.primitive.name in _CUSTOM_RULES:
            rule = _rule(jaxpr, eqn) if rules else None
            params = {"call_jaxpr": params["call_jaxpr"], "rule": rule}
        operands = tuple(operand(var) for var in eqn.invars)
        outputs = tuple(number(var) for var in eqn.outvars)
        equations.append((eqn.primitive.name, operands, comparable(params, rules), outputs))
    return inputs, tuple(equations), tuple(operand(var) for var in jaxpr.outvars)


class _Itself:
    """A value that is equal only to the same object."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def comparable(value: Any, rules: bool = True) -> Any:
    """A parameter of a primitive, a constant or a setting, as something to compare.

    Numbers are equal only if their types are, records and partials if their contents are.
    """
    if isinstance(value, core.ClosedJaxpr):
        return _described(value.jaxpr, rules), tuple(comparable(one, rules) for one in value.consts)
    if isinstance(value, core.Jaxpr):
        return _described(value, rules)
    if isinstance(value, dict):
        return tuple((name, comparable(one, rules)) for name, one in sorted(value.items()))
    if type(value) in (tuple, list):
        return tuple(comparable(one, rules) for one in value)
    if isinstance(value, partial):
        return partial, *(comparable(v, rules) for v in (value.func, value.args, value.keywords))
    if _is_record(value):
        return type(value), *(
            comparable(getattr(value, field.name), rules) for field in dataclasses.fields(value)
        )
    if isinstance(value, np.ndarray | np.generic):
        return value.shape, value.dtype, value.tobytes()
    if isinstance(value, jax.Array):  # weights in a loop's body, which stay constants
        return _Itself(value)
    if isinstance(value, bool | int | float | complex):  # 1 == 1.0 == True, and 0.0 == -0.0
        return type(value), repr(value)
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return value


def _is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass that compares its fields."""
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return is_instance and type(value).__eq__ is not object.__eq__


def jax_function_of(eqn: core.JaxprEqn) -> str:
    """The name of a JAX function that has a custom derivative; "" for any other."""
    name, _, place = _place(eqn).partition(" at ")
    rule = _source(eqn.params.get("jvp_jaxpr_fun")).partition(" at ")[2]
    if not place.startswith(_LIBRARY) or place.startswith(_WRAPPERS):
        return ""
    if rule.startswith(_WRAPPERS):  # a rule by defjvps, JAX's own or a caller's
        wraps_another = any(_place(inner) == _place(eqn) for inner in eqn.params["call_jaxpr"].eqns)
        is_of_jax = isinstance(getattr(jax.nn, name, None), jax.custom_jvp) and not wraps_another
    else:
        is_of_jax = not rule or rule.startswith(_LIBRARY)
    return name if is_of_jax else ""


def _place(eqn: core.JaxprEqn) -> str:
    """Name, file and line of the derivative, or of the function, as far as JAX knows them."""
    return _source(next((eqn.params[k] for k in _PLACED if k in eqn.params), None))


def _source(fn: Any) -> str:
    return str(getattr(getattr(fn, "debug_info", None), "func_src_info", ""))


def _rule(jaxpr: core.Jaxpr, eqn: core.JaxprEqn) -> Any:
    """A function's custom derivative, as something to compare.

    It is a new object at every trace. JAX's own derivatives follow from the function's place in
    JAX's source; any other is traced.
    """
    if jax_function_of(eqn):
        return _place(eqn)
    variables, fn = variables_and_function(jaxpr, eqn)
    # What the function closes over comes first, and such a rule gives it no derivative.
    arguments = eqn.invars[eqn.params["num_consts"] :]
    moved = [i for i, var in enumerate(variables) if any(var is one for one in arguments)]

    def derivative(*args):
        def of_arguments(*some):
            whole = dict(enumerate(args)) | dict(zip(moved, some, strict=True))
            return fn(*whole.values())

        outputs, pull = jax.vjp(of_arguments, *(args[i] for i in moved))
        return pull([_cotangent(out) for out in outputs])

    try:
        return comparable(jax.make_jaxpr(derivative)(*(var.aval for var in variables)), False)
    except Exception:  # a derivative that cannot be taken equals no other
        return _Itself(eqn)


def _cotangent(out: jax.Array) -> Any:
    if jnp.issubdtype(out.dtype, jnp.inexact):
        return out
    return np.zeros(out.shape, jax.dtypes.float0)
