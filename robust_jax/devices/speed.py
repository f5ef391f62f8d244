"""Measures of a program's speed: its matrix products, its memory, the chip's peak."""

import contextlib
import ctypes
import math
import re
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import Jaxpr

from robust_jax import _convolution as conv
from robust_jax._network import programs_in

# Peak FLOP/s of dense bfloat16 (V100, T4: float16) products per JAX device, from the data sheets.
PEAKS: Mapping[str, float] = {
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

# malloc.h's parameters: how many allocations may use mmap, and how much may be free at the top of
# the heap.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def peak(device_kind: str) -> float | None:
    """The FLOP/s of a device by its name; None for one that is not in the table."""
    known = [name for name in PEAKS if re.match(rf"{name}\b", device_kind)]
    return PEAKS[max(known, key=len)] if known else None


def memory_high_water() -> int:
    """The most bytes in use so far, by the first device or, on a CPU, by the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if found := re.search(r"VmHWM:\s+(\d+) kB", _read("/proc/self/status")):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_memory_high_water() -> None:
    """Resets the high water of the process, not of a device, and only on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next call, if XLA computes on the CPU.

    By default it goes back to the kernel and every step pays for fresh pages: 6 % of SmallCNN's
    adversarial training step. Does nothing on accelerators or with another C library.
    """
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def flops(fn: Callable, *args: Any) -> float:
    """The floating-point operations of fn(*args)'s matrix products and convolutions.

    A multiply-add counts as two. They are read from the program's jaxpr, so shapes are enough. A
    scan's body counts as often as it runs and a while loop's once. Only the most costly of several
    branches counts, and a program mapped over devices counts once for each of them.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    shapes: list[Any] = [getattr(v.aval, "shape", ()) for v in equation.invars]
    out: Any = getattr(equation.outvars[0].aval, "shape", ()) if equation.outvars else ()
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = params["dimension_numbers"].rhs_spec  # output channels, input channels, window
        return 2.0 * math.prod(out) * math.prod(shapes[1][axis] for axis in kernel[1:])
    if equation.primitive in (conv.conv_p, conv.input_gradient_p, conv.kernel_gradient_p):
        outputs, channels = {
            conv.conv_p: (out, shapes[0][3]),
            conv.input_gradient_p: (shapes[0], out[3]),
            conv.kernel_gradient_p: (shapes[1], shapes[0][3]),
        }[equation.primitive]
        return 2.0 * math.prod(outputs) * math.prod(params["geometry"].kernel) * channels
    inner = [_count(jaxpr) for jaxpr in programs_in(params.values())]
    if not inner:
        return 0.0
    if name == "cond":
        return max(inner)
    return _repeats(name, params) * sum(inner)


def _repeats(name: str, params: Mapping[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape.values())
    return params.get("global_axis_size", 1)  # of a pmap
