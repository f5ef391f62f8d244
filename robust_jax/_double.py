"""A network in float64, to see what float32 loses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from robust_jax._network import Network, as_network, interpret, jax_function_of


class NotInDouble(Exception):
    """Why a network cannot be computed in float64."""


def in_double(logits_fn: Callable, shape: tuple[int, ...]) -> Network:
    """logits_fn computed in float64, for float64 examples of a shape; call it with x64 enabled.

    A function that follows the type of its input is used as it is. Any other is traced, and the
    weights and types in its program are replaced by wider ones. Raises NotInDouble if neither is
    possible.
    """
    single = as_network(logits_fn, shape, jnp.float32)
    if single.program.outside:
        raise NotInDouble(f"the network contains a {single.program.outside}, whose types are fixed")
    try:
        network = as_network(logits_fn, shape, jnp.float64)
        if network.program.outputs.dtype == jnp.float64:
            return network
    except Exception:  # lax or another framework does not promote its float32 weights
        pass
    jaxpr, arrays = single.program.jaxpr, tuple(map(_wide, single.arrays))
    try:
        return as_network(lambda x: interpret(jaxpr, arrays, [x], _result)[0], shape, jnp.float64)
    except NotInDouble:
        raise
    except Exception as error:  # a primitive whose parameters tie its types together
        first = str(error).partition("\n")[0]
        raise NotInDouble(f"its program does not take other types: {first}") from error


def _wide(value: Any) -> Any:
    is_narrow = jnp.issubdtype(jnp.result_type(value), jnp.floating)
    return jnp.asarray(value, jnp.float64) if is_narrow else value


def _wide_type(param: Any) -> Any:
    is_type = isinstance(param, np.dtype | type) and jnp.issubdtype(param, jnp.floating)
    return jnp.dtype(jnp.float64) if is_type else param


def _result(eqn: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    """An equation's results in float64."""
    name, params = eqn.primitive.name, eqn.params
    inputs = list(map(_wide, inputs))
    own = jax_function_of(eqn) if name == "custom_jvp_call" else ""
    if own and hasattr(jax.nn, own):
        return [getattr(jax.nn, own)(*inputs)]
    if any(isinstance(value, core.Jaxpr | core.ClosedJaxpr) for value in params.values()):
        raise NotInDouble(f"the network contains a {name}, whose types are fixed")
    outputs = eqn.primitive.bind(*inputs, **{k: _wide_type(v) for k, v in params.items()})
    return list(outputs) if eqn.primitive.multiple_results else [outputs]
