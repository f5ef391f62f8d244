"""Two-dimensional convolution and pooling, NHWC images and HWIO kernels.

XLA's CPU backend computes the two gradients of a convolution many times slower than the convolution
itself, above all inside `lax.scan`, where every attack runs. The convolution itself is slow with
few channels, and a 3×3 one with many takes three times the multiplications it needs. On the CPU
this module computes all three by its own formulas; other platforms lower to
`lax.conv_general_dilated` and its derivatives.

The convolution and its two gradients are three views of one trilinear form, so each is bilinear
and each transposes into the other two. As primitives, unlike a custom_vjp, they support every
transformation to any order: jvp, vjp, vmap, jacfwd, jacrev, scan, remat.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from robust_jax import types
from robust_jax._winograd import winograd_conv

Padding = Literal["SAME", "VALID"] | Sequence[types.Pair]
IMPLEMENTATIONS = ("auto", "plain")
# YNNPACK is slower than Eigen with this many input channels or more (docs/performance.md).
_YNNPACK_IS_SLOW_FROM = 128 if jax.__version_info__ >= (0, 11) else 16


class Geometry(NamedTuple):
    """The static half of a convolution, common to it and its two gradients."""

    strides: tuple[int, ...]
    padding: tuple[types.Pair, ...]
    image: tuple[int, ...]  # height and width of x
    kernel: tuple[int, ...]  # height and width of k

    @property
    def output(self) -> tuple[int, ...]:
        """Height and width of the result."""
        axes = zip(self.strides, self.padding, self.image, self.kernel, strict=True)
        return tuple((size + sum(pad) - k) // stride + 1 for stride, pad, size, k in axes)


def conv2d(
    x: Float[types.Array, "b h w i"],
    kernel: Float[types.Array, "p q i o"],
    *,
    strides: types.Pair = (1, 1),
    padding: Padding = "SAME",
    implementation: str = "auto",
) -> Float[Array, "b v u o"]:
    """Convolution; implementation="plain" is `lax.conv_general_dilated` on every platform."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}")
    image, window = x.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image, window, strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    geometry = Geometry(tuple(strides), padding, image, window)
    if min(geometry.output) < 1:
        raise ValueError(f"kernel {window} with padding {padding} does not fit the image {image}")
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if implementation == "plain":
        return _plain_conv(x, kernel, geometry=geometry)
    return conv_p.bind(x, kernel, geometry=geometry)


# The ordinary path: lax's convolution and what lax derives from it.


def _plain_conv(x: Array, k: Array, *, geometry: Geometry) -> Array:
    return lax.conv_general_dilated(
        x, k, geometry.strides, geometry.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _plain_input_gradient(g: Array, k: Array, *, geometry: Geometry) -> Array:
    x = jax.ShapeDtypeStruct((g.shape[0], *geometry.image, k.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: _plain_conv(x, k, geometry=geometry), x)(g)[0]


def _plain_kernel_gradient(x: Array, g: Array, *, geometry: Geometry) -> Array:
    k = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[3], g.shape[3]), g.dtype)
    return jax.linear_transpose(lambda k: _plain_conv(x, k, geometry=geometry), k)(g)[0]


# The formulas for the CPU.


def _widen(*arrays: Array) -> list[Array]:
    """The arrays in at least float32, as some bfloat16 products summed in float32 fail on CPUs."""
    # numpy's promotion, since JAX may be configured to allow none.
    return [array.astype(np.promote_types(array.dtype, np.float32)) for array in arrays]


def _cpu_conv(x: Array, k: Array, *, geometry: Geometry) -> Array:
    channels, outputs = k.shape[2:]
    # With few channels and few outputs a convolution does not fill the vector units.
    if outputs < 32 and channels <= 8:
        return _banded_conv(x, k, geometry=geometry)
    return _wide_conv(x, k, geometry=geometry)


def _wide_conv(x: Array, k: Array, *, geometry: Geometry) -> Array:
    """The convolution by Winograd's filtering where that pays, and by XLA elsewhere."""
    is_3x3 = geometry.kernel == (3, 3) and geometry.strides == (1, 1)
    rows, columns = geometry.output
    tiles = len(x) * -(-rows // 4) * -(-columns // 2)
    # Few tiles, or tiles mostly outside the image, would not pay for the kernel's transform, and
    # bfloat16 has no precision to spare.
    full = 2 * len(x) * rows * columns >= 8 * tiles
    if is_3x3 and min(k.shape[2:]) >= 32 and tiles >= 256 and full and x.dtype.itemsize >= 4:
        return winograd_conv(x, k, geometry.padding)
    return _tall_conv(x, k, geometry=geometry)


def _tall_conv(x: Array, k: Array, *, geometry: Geometry) -> Array:
    """The convolution with zeros added below the image until the result is taller than it.

    XLA leaves such a convolution to Eigen. Any other with 16 or more channels goes to YNNPACK,
    which takes up to six times as long in JAX 0.10, and up to 2.5 times in 0.11 with many channels.
    """
    if k.shape[2] > 4 and (missing := -k.shape[2] % 8):  # Eigen reads eight channels at a time
        zero = jnp.zeros((), x.dtype)
        x = lax.pad(x, zero, [(0, 0, 0)] * 3 + [(0, missing, 0)])
        k = lax.pad(k, zero, [(0, 0, 0)] * 2 + [(0, missing, 0), (0, 0, 0)])
    (above, below), columns = geometry.padding
    height = geometry.output[0]
    more = max(0, geometry.image[0] + 1 - height)
    channels, outputs = k.shape[2:]
    fast_anyway = channels < _YNNPACK_IS_SLOW_FROM or max(channels, outputs) <= 16
    if fast_anyway or geometry.strides != (1, 1) or more > height / 2:
        return _plain_conv(x, k, geometry=geometry)
    taller = geometry._replace(padding=((above, below + more), columns))
    return _plain_conv(x, k, geometry=taller)[:, :height]


def _cpu_input_gradient(g: Array, k: Array, *, geometry: Geometry) -> Array:
    strides, padding, image, window = geometry
    channels, outputs = k.shape[2:]
    if channels <= 4 and outputs >= 16:
        return _gradient_of_few(g, k, geometry=geometry)
    if channels <= 8:
        return _banded_input_gradient(g, k, geometry=geometry)
    if strides == (1, 1) and window != (1, 1):
        # A convolution of g with the flipped kernel.
        kernel = jnp.flip(k, (0, 1)).swapaxes(2, 3)
        around = tuple(
            (size - 1 - low, pixels - g_pixels + low)
            for size, (low, _), pixels, g_pixels in zip(
                window, padding, image, g.shape[1:3], strict=True
            )
        )
        return _wide_conv(g, kernel, geometry=Geometry(strides, around, g.shape[1:3], window))
    if channels < 64 and min(window) > max(strides):
        return _gradient_by_phases(g, k, geometry=geometry)
    # A convolution over the dilated g would mostly multiply zeros, so there is one product per tap,
    # which is added to the pixels that the tap reads.
    wide_g, wide_k = _widen(g, k)
    zero = jnp.zeros((), wide_g.dtype)
    x = zero
    for tap in np.ndindex(window):
        margins = [(0, 0, 0), *_pixels_read_by(tap, geometry), (0, 0, 0)]
        x += lax.pad(wide_g @ wide_k[tap].T, zero, margins)
    return x.astype(g.dtype)


def _gradient_of_few(g: Array, k: Array, *, geometry: Geometry) -> Array:
    """The image's gradient by one product for all taps, each added to the pixels that it reads.

    Pixels go last, since the image's few channels do not fill the vector units.
    """
    wide_g, wide_k = (array.reshape(-1, k.shape[3]) for array in _widen(g, k))
    # For k @ g.T, XLA would transpose g, the larger of the two.
    parts = (wide_g @ wide_k.T).T.reshape(*k.shape[:3], *g.shape[:3])
    zero = jnp.zeros((), parts.dtype)
    x = zero
    for tap in np.ndindex(geometry.kernel):
        margins = [(0, 0, 0), (0, 0, 0), *_pixels_read_by(tap, geometry)]
        x += lax.pad(parts[tap], zero, margins)
    return jnp.moveaxis(x, 0, -1).astype(g.dtype)


def _gradient_by_phases(g: Array, k: Array, *, geometry: Geometry) -> Array:
    """The image's gradient of a strided convolution, by a convolution of g at stride 1.

    The pixels of one phase, every stride-th from some start, are read by every stride-th tap. All
    phases are computed at once, as channels, and then interleaved.
    """
    (down, right), ((top, _), (left, _)), (image, width), window = geometry
    batch, height, out_width, outputs = g.shape
    channels = k.shape[2]
    zero = jnp.zeros((), g.dtype)
    rows, columns = -(-window[0] // down), -(-window[1] // right)
    beyond = [(0, rows * down - window[0], 0), (0, columns * right - window[1], 0)]
    k = lax.pad(k, zero, [*beyond, (0, 0, 0), (0, 0, 0)])
    k = k.reshape(rows, down, columns, right, channels, outputs)
    k = jnp.flip(k, (0, 2)).transpose(0, 2, 5, 1, 3, 4).reshape(rows, columns, outputs, -1)
    full = ((rows - 1, rows - 1), (columns - 1, columns - 1))
    by_phase = Geometry((1, 1), full, (height, out_width), (rows, columns))
    x = _wide_conv(g, k, geometry=by_phase)
    tall, wide = by_phase.output
    x = x.reshape(batch, tall, wide, down, right, channels).swapaxes(2, 3)
    x = x.reshape(batch, tall * down, wide * right, channels)
    ends = [(-top, image + top - tall * down, 0), (-left, width + left - wide * right, 0)]
    return lax.pad(x, zero, [(0, 0, 0), *ends, (0, 0, 0)])


def _pixels_read_by(tap: tuple[int, ...], geometry: Geometry) -> list[tuple[int, int, int]]:
    """How to pad an output's rows and columns so that each lies where the tap reads the image."""
    axes = zip(
        tap, geometry.padding, geometry.strides, geometry.output, geometry.image, strict=True
    )
    return [_margin(at - low, stride, count, size) for at, (low, _), stride, count, size in axes]


def _margin(start: int, stride: int, count: int, size: int) -> tuple[int, int, int]:
    """How to pad `count` entries so that they are every stride-th of `size`, from `start` on."""
    return start, size - start - (count - 1) * stride - 1, stride - 1


def _cpu_kernel_gradient(x: Array, g: Array, *, geometry: Geometry) -> Array:
    strides, padding, _, window = geometry
    (down, right), (rows, columns) = strides, window
    batch, height, width, outputs = g.shape
    channels = x.shape[3]
    if strides == (1, 1) and window != (1, 1):
        return _conv_over_examples(x, g, geometry=geometry)
    # One matrix product per tap: the pixels that the tap reads, against the outputs they reach.
    wide_x, wide_g = _widen(x, g)
    margins = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    padded = lax.pad(wide_x, jnp.zeros((), wide_x.dtype), margins)
    products = []
    for i, j in np.ndindex(rows, columns):
        tap = lax.slice(
            padded,
            (0, i, j, 0),
            (batch, i + (height - 1) * down + 1, j + (width - 1) * right + 1, channels),
            (1, down, right, 1),
        )
        products.append(jnp.tensordot(tap, wide_g, axes=((0, 1, 2), (0, 1, 2))))
    return jnp.stack(products).reshape(rows, columns, channels, outputs).astype(g.dtype)


def _conv_over_examples(x: Array, g: Array, *, geometry: Geometry) -> Array:
    """The kernel's gradient as a convolution of x with g, with examples as channels.

    Zeros below g make it taller than x, as in `_tall_conv`. x gets its columns of zeros first, or
    XLA would find g the larger of the two, take it for the image, and use its slow path.
    """
    _, ((above, _), columns), (image, _), (rows, _) = geometry
    wide_x, wide_g = _widen(x, g)
    zero = jnp.zeros((), wide_x.dtype)
    wide_x = lax.pad(wide_x, zero, [(0, 0, 0), (0, 0, 0), (*columns, 0), (0, 0, 0)])
    more = max(0, image + 1 - g.shape[1])
    wide_g = lax.pad(wide_g, zero, [(0, 0, 0), (0, more, 0), (0, 0, 0), (0, 0, 0)])
    over = lax.optimization_barrier((wide_x.transpose(3, 1, 2, 0), wide_g.transpose(1, 2, 0, 3)))
    padding = ((above, rows - 1 + g.shape[1] + more - image - above), (0, 0))
    by_rows = Geometry((1, 1), padding, over[0].shape[1:3], over[1].shape[:2])
    return _plain_conv(*over, geometry=by_rows).transpose(1, 2, 0, 3).astype(g.dtype)


def _banded_conv(x: Array, k: Array, *, geometry: Geometry) -> Array:
    """The convolution as products of a band matrix with what a few pixels of an output line read.

    The band matrix maps what they read to the pixels; for four of them and a 3×3 kernel, half of it
    is zeros. With few channels this is still several times faster than a convolution, which then
    leaves the vector units of a CPU mostly idle.
    """
    (down, right), (padding, (left, _)), (_, width), (rows, columns) = geometry
    height, out_width = geometry.output
    wide_x, wide_k = _widen(x, k)
    # With more pixels the product has fewer, longer rows with more zeros.
    pixels = 4 if rows * (columns + 3 * right) * k.shape[2] < 200 else 2
    band = _band(wide_k, right, pixels)
    reach, step = band.shape[1], pixels * right
    tiles = -(-out_width // pixels)
    margins = [(0, 0, 0), (*padding, 0), (left, (tiles - 1) * step + reach - width - left, 0)]
    wide_x = lax.pad(wide_x, jnp.zeros((), wide_x.dtype), [*margins, (0, 0, 0)])

    def read(start):
        # Stacked, since for one long line XLA's loop would divide to find each number.
        tile = lax.slice_in_dim(wide_x, start, start + reach, axis=2)
        last = (height - 1) * down + 1
        lines = [lax.slice_in_dim(tile, i, i + last, down, axis=1) for i in range(rows)]
        return jnp.stack(lines, axis=2)

    parts = jnp.stack([read(start) for start in range(0, tiles * step, step)], axis=2)
    parts = parts.reshape(len(x), height, tiles, rows * reach * k.shape[2])
    y = parts @ band.reshape(-1, pixels * k.shape[3])
    y = y.reshape(len(x), height, tiles * pixels, k.shape[3])
    return y[:, :, :out_width].astype(x.dtype)


def _banded_input_gradient(g: Array, k: Array, *, geometry: Geometry) -> Array:
    """The image's gradient by the band of four pixels; each tile's product goes where it reads."""
    (down, right), ((top, _), (left, _)), (image, width), (rows, _) = geometry
    batch, height, out_width, outputs = g.shape
    channels = k.shape[2]
    wide_g, wide_k = _widen(g, k)
    zero = jnp.zeros((), wide_g.dtype)
    pixels = 4
    band = _band(wide_k, right, pixels)
    reach, step = band.shape[1], pixels * right
    tiles = -(-out_width // pixels)
    beyond = (0, tiles * pixels - out_width, 0)
    wide_g = lax.pad(wide_g, zero, [(0, 0, 0), (0, 0, 0), beyond, (0, 0, 0)])
    wide_g = wide_g.reshape(batch, height, tiles, pixels * outputs)
    parts = wide_g @ band.reshape(-1, pixels * outputs).T
    parts = parts.reshape(batch, height, tiles, rows, reach * channels)

    def read_by(tile):
        below = [[(0, 0, 0), _margin(i - top, down, height, image), (0, 0, 0)] for i in range(rows)]
        lines = [lax.pad(parts[:, :, tile, i], zero, below[i]) for i in range(rows)]
        along = _margin((tile * step - left) * channels, 1, reach * channels, width * channels)
        return lax.pad(reduce(jnp.add, lines), zero, [(0, 0, 0), (0, 0, 0), along])

    x = reduce(jnp.add, map(read_by, range(tiles)))
    return x.reshape(batch, image, width, channels).astype(g.dtype)


def _band(k: Array, stride: int, pixels: int) -> Array:
    """The kernel [P,Q,I,O] for a few pixels of a line, [P,W,I,U,O]: pixel U reads the columns W."""
    columns = k.shape[1]
    at = np.arange(columns)[:, None] + stride * np.arange(pixels)  # the column read
    taps = at[:, None, :] == np.arange(at.max() + 1)[None, :, None]
    return jnp.einsum("pqio,qwu->pwiuo", k, taps.astype(k.dtype), precision="highest")


# The primitives.

conv_p = Primitive("conv2d")
input_gradient_p = Primitive("conv2d_input_gradient")
kernel_gradient_p = Primitive("conv2d_kernel_gradient")


def _define(
    primitive: Primitive,
    shape: Callable[[tuple[int, ...], tuple[int, ...], Geometry], tuple[int, ...]],
    transposes: tuple[Callable[..., Array], Callable[..., Array]],
    plain: Callable[..., Array],
    cpu: Callable[..., Array],
    batch_axes: tuple[types.Pair, types.Pair],
) -> None:
    """Registers all of a primitive's rules; batch_axes is explained in `_batch`."""

    def abstract(a, b, *, geometry):
        if a.dtype != b.dtype:
            raise TypeError(f"{primitive.name} of {a.dtype} and {b.dtype}: they must be the same")
        return jax.core.ShapedArray(shape(a.shape, b.shape, geometry), a.dtype)

    primitive.def_impl(jax.jit(primitive.bind, static_argnames="geometry"))
    primitive.def_abstract_eval(abstract)
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = partial(_batch, primitive, plain, batch_axes)
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), "cpu")


def _batch(primitive, plain, batch_axes, operands, dims, *, geometry):
    """The rule for vmap, which merges a batch of one operand into an axis that the result keeps.

    For each operand, batch_axes has that axis and its place in the result. In the convolution, the
    examples of x stay examples, and the output channels of the kernel stay output channels.
    """
    if None not in dims:
        # No axis is left to merge into: this is a grouped convolution, for which lax has a rule.
        return jax.vmap(partial(plain, geometry=geometry), dims)(*operands), 0
    side = dims.index(None) ^ 1
    axis, out_axis = batch_axes[side]
    operand = jnp.moveaxis(operands[side], dims[side], axis)
    count, size = operand.shape[axis : axis + 2]
    operand = operand.reshape(*operand.shape[:axis], count * size, *operand.shape[axis + 2 :])
    pair = (operand, operands[1]) if side == 0 else (operands[0], operand)
    out = primitive.bind(*pair, geometry=geometry)
    split = (*out.shape[:out_axis], count, size, *out.shape[out_axis + 1 :])
    return out.reshape(split), out_axis


_define(
    conv_p,
    shape=lambda x, k, geometry: (x[0], *geometry.output, k[3]),
    transposes=(
        lambda ct, x, k, geometry: input_gradient_p.bind(ct, k, geometry=geometry),
        lambda ct, x, k, geometry: kernel_gradient_p.bind(x, ct, geometry=geometry),
    ),
    plain=_plain_conv,
    cpu=_cpu_conv,
    batch_axes=((0, 0), (3, 3)),
)
_define(
    input_gradient_p,
    shape=lambda g, k, geometry: (g[0], *geometry.image, k[2]),
    transposes=(
        lambda ct, g, k, geometry: conv_p.bind(ct, k, geometry=geometry),
        lambda ct, g, k, geometry: kernel_gradient_p.bind(ct, g, geometry=geometry),
    ),
    plain=_plain_input_gradient,
    cpu=_cpu_input_gradient,
    batch_axes=((0, 0), (2, 3)),
)
_define(
    kernel_gradient_p,
    shape=lambda x, g, geometry: (*geometry.kernel, x[3], g[3]),
    transposes=(
        lambda ct, x, g, geometry: input_gradient_p.bind(g, ct, geometry=geometry),
        lambda ct, x, g, geometry: conv_p.bind(x, ct, geometry=geometry),
    ),
    plain=_plain_kernel_gradient,
    cpu=_cpu_kernel_gradient,
    batch_axes=((3, 2), (3, 3)),
)


def max_pool2d(x: Float[Array, "b h w c"], window: int) -> Float[Array, "b v u c"]:
    """Maximum of each window x window tile; rows and columns that fill no tile are dropped.

    Two equal maxima each get half of the gradient.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    if rows == 0 or columns == 0:
        raise ValueError(f"pool window {window}x{window} does not fit the image {height}x{width}")
    # Maxima of pairs, because their gradient takes a third of the time of a maximum's over an axis.
    # Whole lines come first, because they fill the vector units.
    lines = x[:, : rows * window, : columns * window].reshape(batch, rows, window, -1)
    line = reduce(jnp.maximum, (lines[:, :, i] for i in range(window)))
    line = line.reshape(batch, rows, columns, window, channels)
    return reduce(jnp.maximum, (line[:, :, :, i] for i in range(window)))


def global_avg_pool2d(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Mean over the image."""
    if x.dtype == jnp.bfloat16:
        # JAX 0.11's CPU backend fuses batch normalisation and this mean into NaN.
        x = lax.optimization_barrier(x)
    return x.mean(axis=(1, 2))


# The same operations in the caller's own networks.


def replacement(eqn: JaxprEqn) -> Callable[..., Array] | None:
    """A function that computes an equation's convolution or pooling fast on a CPU, or None.

    Its results are equal up to rounding, with the same derivatives. Dilated, grouped and
    one-dimensional convolutions and overlapping or padded pooling stay as they are.
    """
    if eqn.primitive is lax.conv_general_dilated_p:
        return _replaced_convolution(eqn)
    if eqn.primitive is lax.reduce_window_max_p:
        return _replaced_pooling(eqn)
    return None


def _replaced_convolution(eqn: JaxprEqn) -> Callable[..., Array] | None:
    params = eqn.params
    lhs, rhs, out = params["dimension_numbers"]
    x: Any = eqn.invars[0].aval
    ones = (
        *params["lhs_dilation"],
        *params["rhs_dilation"],
        params["feature_group_count"],
        params["batch_group_count"],
    )
    is_wide = params["preferred_element_type"] in (None, x.dtype) and x.dtype.itemsize >= 4
    padding = tuple(params["padding"])
    if len(lhs) != 4 or set(ones) != {1} or not is_wide or min(min(pad) for pad in padding) < 0:
        return None

    def convolve(x, k):
        # A specification lists the axes of examples, channels and space, in this order.
        x = x.transpose(lhs[0], *lhs[2:], lhs[1])
        k = k.transpose(*rhs[2:], rhs[1], rhs[0])
        y = conv2d(x, k, strides=params["window_strides"], padding=padding)
        return y.transpose(np.argsort((out[0], *out[2:], out[1])))

    return convolve


def _replaced_pooling(eqn: JaxprEqn) -> Callable[..., Array] | None:
    params = eqn.params
    window = params["window_dimensions"]
    axes = [axis for axis, size in enumerate(window) if size > 1]
    plain = {*params["base_dilation"], *params["window_dilation"]} == {1}
    tiles = tuple(window) == tuple(params["window_strides"]) and not np.any(params["padding"])
    if not plain or not tiles or not 1 <= len(axes) <= 2 or max(window) > 4:
        return None

    def pool(x):
        for axis in reversed(axes):  # so that the first of equal maxima in the window is taken
            x = _largest_of_tiles(x, axis, window[axis])
        return x

    return pool


def _largest_of_tiles(x: Array, axis: int, size: int) -> Array:
    count = x.shape[axis] // size
    x = lax.slice_in_dim(x, 0, count * size, axis=axis)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    parts = (lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(size))
    # NaN compares greater than nothing, so it is kept explicitly.
    return reduce(lambda one, other: jnp.where((other > one) | jnp.isnan(other), other, one), parts)
