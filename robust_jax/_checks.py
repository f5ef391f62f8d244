"""Checks a call's arguments and explains mistakes in one line.

Only the types and shapes of traced values are checked.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax._network import Network, as_network
from robust_jax.keys import drawn_one_by_one

ARRAYS = (jax.Array, np.ndarray, np.generic)


def is_traced(*trees: Any) -> bool:
    """Whether this runs within a trace, or any of the values is a tracer."""
    leaves = (jnp.zeros(()), *jax.tree.leaves(trees))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def refuse_traces(*values: Any) -> None:
    """Raises ValueError within a trace."""
    if is_traced(values):
        raise ValueError(
            "autoattack, audit and evaluate are loops on the host: call them outside jit, vmap, "
            "grad and scan"
        )


def pixels(x: Any, name: str = "x", *, bounded: bool = True) -> jax.Array | np.ndarray:
    """x [B,...] as an array in JAX's precision.

    Raises ValueError unless it is floating, in [0,1] and not empty.

    bounded: whether it has to be in [0,1].
    """
    refuse_traces(x)
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        x = x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))  # as in some files
    floating(x, name)
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"{name} has the shape {list(x.shape)}; give a batch, [B,...], of one example at least"
        )
    low, high = _ends(x)
    if math.isnan(low) or math.isnan(high):
        raise ValueError(f"{name} holds NaN")
    if bounded and not (low >= 0 and high <= 1):
        is_rounding = low > -1e-3 and high < 1 + 1e-3
        advice = "rescale them, and let logits_fn undo it"
        ends = ", ".join(str(end).removesuffix(".0") for end in (low, high))
        raise ValueError(
            f"{name} ranges over [{ends}]; pixels must be in [0, 1]: "
            + (f"jnp.clip({name}, 0, 1)" if is_rounding else advice)
        )
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def floating(x: Any, name: str) -> None:
    """Raises ValueError unless x is floating."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        hint = "; divide by 255" if jnp.issubdtype(x.dtype, jnp.integer) else ""
        raise ValueError(f"{name} is {x.dtype}; pixels are floats in [0, 1]{hint}")


def points(values: Any, x: Any, name: str) -> jax.Array | np.ndarray:
    """The values as an array in JAX's precision, one point for each example of x.

    Raises ValueError unless they are floating and have the shape of x.
    """
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    floating(values, name)
    if values.shape != x.shape:
        raise ValueError(
            f"x has the shape {list(x.shape)} and {name} {list(values.shape)}; give as many points "
            "as examples, of the same shape"
        )
    return values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)


def same_classes(name: str, count: int, other: str, num_classes: int) -> None:
    """Raises ValueError unless a surrogate has as many classes as the network."""
    if count != num_classes:
        raise ValueError(
            f"{name} has {count} classes and {other} {num_classes}; its labels must mean the same"
        )


def one_number_each(values: Any) -> jax.Array:
    """The values of a loss. Raises ValueError unless there is one per example, [B]."""
    if jnp.ndim(values) != 1:
        raise ValueError(
            f"loss returns the shape {list(jnp.shape(values))}; it must return one number an "
            "example, [B]: leave out .mean() and .sum()"
        )
    return jnp.asarray(values)


def one_row_each(y: Any, x: Any, name: str = "y") -> jax.Array | np.ndarray:
    """y [B,...] as an array. Raises ValueError unless it has a row for each example of x."""
    if y is None:
        raise ValueError(f"{name} is None; give a label for each of the {len(x)} examples of x")
    y = y if isinstance(y, jax.Array) else np.asarray(y)
    if y.ndim == 0 or len(y) != len(x):
        batch = "; is the batch axis of x missing (x[None])?" if y.size == 1 else ""
        raise ValueError(
            f"{name} has the shape {list(y.shape)}; one label for each of the {len(x)} examples of "
            f"x is needed, [{len(x)}]{batch}"
        )
    return y


def looks_like_labels(y: Any) -> bool:
    """Whether y holds one integer per example."""
    return bool(y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer))


def type_of_labels(y: Any, name: str = "y", num_classes: int | None = None) -> None:
    """Raises ValueError unless y is [B] and holds integers."""
    if y.ndim > 1:
        is_column = y.shape[1:] == (1,)  # as Keras loads CIFAR-10
        advice = f"not a column: {name}[:, 0]" if is_column else f"not one-hot: {name}.argmax(-1)"
        raise ValueError(f"{name} has the shape {list(y.shape)}; labels are integers [B], {advice}")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        end = " on" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"{name} is {y.dtype}; labels are integers from 0{end}")


def labels(y: Any, num_classes: int, name: str = "y") -> None:
    """Raises ValueError unless y is [B] and holds labels."""
    type_of_labels(y, name, num_classes)
    low, high = (int(end) for end in _ends(y))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name} has the label {low if low < 0 else high}; the network has {num_classes} "
            f"classes, so labels run from 0 to {num_classes - 1}"
        )


def key(key: Any, count: int) -> jax.Array:
    """A threefry key [] or keys [B]. Raises ValueError for anything that is not a key."""
    if isinstance(key, jax.Array | np.ndarray):
        is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        words = jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
        if not is_typed and key.dtype == np.uint32 and key.shape in (words, (count, *words)):
            key, is_typed = jax.random.wrap_key_data(jnp.asarray(key)), True
        if is_typed and key.shape in ((), (count,)):
            return drawn_one_by_one(key)
        if is_typed:
            raise ValueError(
                f"key has the shape {list(key.shape)}; give one key, or {count}, one for each "
                "example"
            )
    raise ValueError(f"key is {_short(key)}; give a key such as jax.random.key(0)")


def length(name: str, value: Any, *, infinite: bool = False) -> None:
    """Raises ValueError for a radius or a step that is negative, infinite or not a number."""
    refuse_traces(value)
    one_number(name, value)
    if value is None:
        raise ValueError(f"{name} is None; give a number in pixel units")
    value = float(value) if isinstance(value, ARRAYS) else value
    known_lengths(**{name: value}, infinite=infinite)


def one_number(name: str, value: Any) -> None:
    """Raises ValueError for an array with axes, which may be traced."""
    if isinstance(value, ARRAYS) and np.ndim(value):
        raise ValueError(
            f"{name} is {_short(value)}; give a number in pixel units (under vmap, one for each "
            "example)"
        )


def known_lengths(*, infinite: bool = False, **values: Any) -> None:
    """Like `length` for several values; skips None and arrays, which may be traced."""
    for name, value in values.items():
        if value is None or isinstance(value, ARRAYS):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = f", {value} without quotes" if isinstance(value, str) else ""
            raise ValueError(f"{name} is {_short(value)}; give a number in pixel units{hint}")
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, not {value!r} (pixels are in [0,1])")
        if value == math.inf and not infinite:
            raise ValueError(f"{name} must be finite, not inf (pixels are in [0,1])")


def counts(**values: Any) -> None:
    """Raises ValueError for the first count that is not a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def shares(**values: Any) -> None:
    """Raises ValueError for the first value outside (0, 1]."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {value!r}")


def network(
    fn: Callable, x: Any, name: str = "logits_fn", *, key: jax.Array | None = None
) -> Network:
    """fn as a network of examples like x; explains the usual reasons why tracing fails."""
    if not callable(fn):
        raise ValueError(f"{name} is {_short(fn)}; give a function from x [B,...] to logits [B,K]")
    if any(base.__module__.startswith("torch.") for base in type(fn).__mro__):
        raise ValueError(
            f"{name} is a PyTorch module; docs/attack_your_model.md has the few lines "
            "that make it a function of JAX"
        )
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    try:
        return as_network(fn, x.shape[1:], dtype, key=key)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"{name} hands its input to numpy, which has no gradient: use jax.numpy, or "
            "jax.pure_callback and attacks.square, which needs none"
        ) from error
    except jax.errors.TracerBoolConversionError as error:
        raise ValueError(
            f"{name} branches on the values of its input: use jnp.where or jax.lax.cond for if"
        ) from error
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            f"{name} stores values in one call and uses them in the next, as Keras does with "
            "training=True: build the model again, and call it so that it stores nothing"
        ) from error
    except Exception as error:
        if type(error).__name__ in _IN_TRAINING:
            raise ValueError(
                f"{name} is in training mode, or calls nnx.jit: call its eval() first and the "
                "model itself (NNX), or pass train=False or the equivalent, so that dropout is off "
                "and BatchNorm uses its running statistics"
            ) from error
        if _takes(fn, x.shape, dtype):
            raise ValueError(
                f"{name} takes an example of the shape {list(x.shape)}, and none of the shape "
                f"{list(x.shape[1:])}: is the batch axis of x missing (x[None])?"
            ) from error
        if _takes_one(fn, x.shape[1:], dtype):
            raise ValueError(
                f"{name} takes one example of the shape {list(x.shape[1:])} and no batch of them: "
                f"give jax.vmap({name})"
            ) from error
        error.add_note(f"{name} was called with one example, {dtype} {[1, *x.shape[1:]]}")
        raise


# Errors for changed state or a missing key in Flax NNX, linen and Haiku, which may be absent.
_IN_TRAINING = (
    "TraceContextError",
    "ModifyScopeVariableError",
    "InvalidRngError",
    "MissingRNGError",
)


def _takes(fn: Callable, shape: tuple[int, ...], dtype: Any) -> bool:
    try:
        as_network(fn, shape, dtype)
    except Exception:
        return False
    return True


def _takes_one(fn: Callable, shape: tuple[int, ...], dtype: Any) -> bool:
    try:
        out = jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, dtype))
    except Exception:
        return False
    return getattr(out, "ndim", None) == 1


def output(network: Network, name: str = "logits_fn") -> jax.ShapeDtypeStruct:
    """What a network returns for one example. Raises ValueError unless it is one array."""
    out = network.program.outputs
    if isinstance(out, jax.ShapeDtypeStruct):
        return out
    example = ""
    if isinstance(out, tuple | list):
        example = ", as in lambda x: f(x)[0]"
    elif isinstance(out, Mapping) and out:
        which = "logits" if "logits" in out else next(iter(out))
        example = f", as in lambda x: f(x)[{which!r}]"
    raise ValueError(
        f"{name} returns a {type(out).__name__}, not an array; return the logits alone{example}"
    )


def one_row_an_example(network: Network, name: str) -> None:
    """Raises ValueError unless the network returns [B,K]."""
    shape = output(network, name).shape
    if len(shape) != 2:
        raise ValueError(
            f"{name} returns the shape {list(shape)} for a batch of one example; it must be [1,K]: "
            f"give lambda x: {name}(x).reshape(len(x), -1)"
        )


def num_classes(network: Network, name: str = "logits_fn") -> int:
    """K of a network with logits [B,K]. Raises ValueError if it returns anything else."""
    out = output(network, name)
    if len(out.shape) != 2 or out.shape[0] != 1:
        is_of_one = len(out.shape) == 1 and out.shape[0] > 1
        hint = f"; if it takes one at a time, give jax.vmap({name})" if is_of_one else ""
        raise ValueError(
            f"{name} returns the shape {list(out.shape)} for a batch of one example; logits are "
            f"[1,K] then{hint}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{name} returns {out.dtype}; logits are floats")
    if out.shape[1] == 1:
        raise ValueError(
            f"{name} returns one number an example; for two classes return two logits: "
            "jnp.concatenate([jnp.zeros_like(z), z], -1), z being the input of the sigmoid"
        )
    return out.shape[1]


def _short(value: Any) -> str:
    text = (
        f"an array of {value.dtype} {list(value.shape)}" if hasattr(value, "dtype") else repr(value)
    )
    return text if len(text) < 60 else text[:57] + "…"


def _ends(values: jax.Array | np.ndarray) -> tuple[Any, Any]:
    """Minimum and maximum, both NaN if any value is."""
    if isinstance(values, np.ndarray):
        return values.min(), values.max()
    low, high, has_nan = jax.device_get(_ends_on_device(values))
    return (math.nan, math.nan) if has_nan else (low, high)


@jax.jit
def _ends_on_device(values):
    """Minimum, maximum and whether there is a NaN, which XLA's minimum may ignore."""
    return values.min(), values.max(), jnp.isnan(values).any()
