"""Singular values of a network's linear maps: dense layers, and convolutions as operators.

Everything is float64 on the host. The spectrum of a convolution with zero padding has no closed
form, so there are two functions: `circular` is exact for circular padding, for images of any size;
`exact` takes the layer as it stands, for small images. For a dense layer both are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from robust_jax.attacks.norms import L1, L2, LINF, Norm, ThreatModel, threat_model
from robust_jax.types import Pair

__all__ = [
    "GAINS",
    "Layer",
    "circular",
    "exact",
    "layers",
    "matrix",
    "operator_norm",
]


def __dir__() -> list[str]:
    return __all__


_Values = Float[np.ndarray, " n"]


class Layer(NamedTuple):
    """A dense layer, by its kernel [I,O] alone, or a convolution, by its kernel [P,Q,I,O].

    image: height and width of the convolution's input. padding: zeros before and after each axis.
    """

    kernel: np.ndarray
    image: Pair = (1, 1)
    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))


def layers(
    model: Any, variables: Any, image_shape: tuple[int, ...], *, fold_norms: bool = False
) -> dict[str, Layer]:
    """The dense layers and convolutions of a network, by name, in the order they are called.

    With fold_norms, a BatchNorm that reads nothing but a layer's output is part of the layer: its
    scale over the running deviation multiplies the kernel's outputs. Traces
    model.apply(variables, x) once, which costs nothing on any device.

    Args:
        model: A linen network of nn.Dense and `models.layers.Conv`.
        variables: Its variables.
        image_shape: [H,W,C] of one example.
        fold_norms: Whether a BatchNorm right after a layer is folded into it.

    Returns:
        A `Layer` for each.

    Raises:
        ValueError: Another module has a kernel.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import models
        >>> from robust_jax.analysis import spectra
        >>> model = models.MLP(num_classes=3, hidden=(4,))
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
        >>> [layer.kernel.shape for layer in spectra.layers(model, variables, (2, 2, 1)).values()]
        [(4, 4), (4, 3)]
    """
    from flax import linen as nn
    from flax.traverse_util import flatten_dict

    from robust_jax.models.layers import Conv

    params = flatten_dict(variables["params"], sep="/")
    statistics = flatten_dict(variables.get("batch_stats", {}), sep="/")
    found: dict[str, Layer] = {}
    made: list[tuple[Any, str]] = []  # outputs, and the layers they come from

    def record(call, args, keywords, context):
        module, name = context.module, "/".join(context.module.path)
        if context.method_name == "__call__" and isinstance(module, nn.Dense | Conv):
            kernel = np.asarray(params[f"{name}/kernel"], np.float64)
            found[name] = Layer(kernel)
            if isinstance(module, Conv):
                image = args[0].shape[1:3]
                found[name] = Layer(kernel, image, module.strides, _pads(module, image))
            made.append((call(*args, **keywords), name))
            return made[-1][0]
        if fold_norms and context.method_name == "__call__" and isinstance(module, nn.BatchNorm):
            for layer in (layer for output, layer in made if output is args[0]):
                scale = np.asarray(params.get(f"{name}/scale", 1.0), np.float64)
                variance = np.asarray(statistics[f"{name}/var"], np.float64)
                gain = scale / np.sqrt(variance + module.epsilon)
                found[layer] = found[layer]._replace(kernel=found[layer].kernel * gain)
        return call(*args, **keywords)

    with nn.intercept_methods(record):
        x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        jax.eval_shape(lambda variables, x: model.apply(variables, x), variables, x)
    kernels = {name.removesuffix("/kernel") for name in params if name.endswith("/kernel")}
    if missing := sorted(kernels - set(found)):
        raise ValueError(f"no nn.Dense or Conv, or never called: {', '.join(missing)}")
    return found


def circular(layer: Layer) -> _Values:
    """Singular values of the convolution with circular padding.

    Each frequency maps to itself, by the kernel's Fourier transform there, [I,O]; with strides
    (s,t), the s·t frequencies that alias to one map to it together, by a block [s·t·I,O]. An image
    whose sides the strides do not divide is treated as the next larger one that they do. Costs
    H·W/(2·s·t) SVDs of such blocks, all in memory at once: a few times 16·H·W·I·O bytes.

    Args:
        layer: A convolution, or a dense layer.

    Returns:
        [n], largest first.

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import spectra
        >>> mean_of_two = np.full((1, 2, 1, 1), 0.5)  # [P,Q,I,O]
        >>> spectra.circular(spectra.Layer(mean_of_two, image=(1, 4)))
        array([1.000, 0.707, 0.707, 0.000])

    Reference:
        Sedghi, Gupta & Long 2019, arXiv 1805.10408. Our choice for the singular values of layers
        that arXiv 2011.07478 looks at.
    """
    if layer.kernel.ndim == 2:
        return _svd(layer.kernel)
    (s, t), (height, width, inputs, outputs) = layer.strides, layer.kernel.shape
    rows, columns = -(-layer.image[0] // s), -(-layer.image[1] // t)
    transfer = np.einsum(
        "ap,bq,pqio->abio",
        _waves(s * rows, height),
        _waves(t * columns, width),
        layer.kernel,
        optimize=True,
    )
    blocks = transfer.reshape(s, rows, t, columns, inputs, outputs).transpose(1, 3, 0, 2, 4, 5)
    blocks = blocks.reshape(rows, columns, s * t * inputs, outputs) / np.sqrt(s * t)
    # A real kernel has the same singular values at opposite frequencies, so half of them will do.
    half = np.linalg.svd(blocks[:, : columns // 2 + 1], compute_uv=False)
    both = np.concatenate([half, half[:, 1 : (columns + 1) // 2]], axis=1)
    return np.sort(both, axis=None)[::-1]


def exact(layer: Layer) -> _Values:
    """Singular values of the layer as it stands, by its explicit `matrix`.

    Costs an SVD of [outputs, inputs]: seconds at 1,000 of each, minutes and gigabytes at 10,000.

    Args:
        layer: A convolution, or a dense layer.

    Returns:
        [n], largest first.

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import spectra
        >>> spectra.exact(spectra.Layer(np.diag([3.0, 4.0])))
        array([4.0, 3.0])
    """
    return _svd(matrix(layer))


def matrix(layer: Layer) -> Float[np.ndarray, "m n"]:
    """The layer as a matrix, images flattened in order of height, width, channel.

    Strides and zero padding are the layer's own. Costs 8·outputs·inputs bytes, zeros included.

    Args:
        layer: A convolution, or a dense layer.

    Returns:
        [outputs, inputs].

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import spectra
        >>> spectra.matrix(spectra.Layer(np.full((1, 2, 1, 1), 0.5), image=(1, 3)))
        array([[0.5, 0.5, 0.0],
               [0.0, 0.5, 0.5]])
    """
    if layer.kernel.ndim == 2:
        return layer.kernel.T
    *window, inputs, outputs = layer.kernel.shape
    axes = list(zip(layer.image, layer.strides, layer.padding, window, strict=True))
    height, width = ((size + sum(pad) - taps) // stride + 1 for size, stride, pad, taps in axes)
    full = np.zeros((height, width, outputs, *layer.image, inputs))
    for tap in np.ndindex(*window):
        at = []  # by axis: the outputs that the tap serves, and the inputs they read through it
        for i, (size, stride, (before, _), _), count in zip(
            tap, axes, (height, width), strict=True
        ):
            source = np.arange(count) * stride + i - before
            served = (source >= 0) & (source < size)
            at.append((np.flatnonzero(served), source[served]))
        (v, h), (u, w) = at
        full[v[:, None], u, :, h[:, None], w] = layer.kernel[tap].T
    return full.reshape(height * width * outputs, -1)


def operator_norm(layer: Layer, norm: Norm) -> float:
    """An upper bound of the layer's largest gain, ‖Wx‖ / ‖x‖, both measured in the norm.

    Exact for a dense layer. For a convolution in l2, it is the norm with circular padding on an
    image so large that nothing wraps around, of which the layer is a part; in linf and l1, it is
    the norm on an image without borders or strides. Costs a `circular` of that image in l2, else
    one sum over the kernel.

    Args:
        layer: A convolution, or a dense layer.
        norm: A name or a record of `GAINS`.

    Returns:
        At least 0.

    Raises:
        ValueError: The norm is not in `GAINS`.

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import spectra
        >>> spectra.operator_norm(spectra.Layer(np.array([[3.0], [4.0]])), "linf")
        7.0
    """
    threat = threat_model(norm)
    if threat not in GAINS:
        known = ", ".join(norm.name for norm in GAINS)
        raise ValueError(f"norm must be one of {known}, not {threat.name!r}")
    return float(GAINS[threat](layer))


def _l2_gain(layer: Layer) -> float:
    height, width = layer.image
    return circular(
        layer._replace(
            image=(height + layer.kernel.shape[0] - 1, width + layer.kernel.shape[1] - 1)
        )
    ).max()


def _linf_gain(layer: Layer) -> float:
    """The largest sum of absolute weights into an output channel."""
    *taps, _, _ = range(layer.kernel.ndim)
    return np.abs(layer.kernel).sum((*taps, -2)).max()


def _l1_gain(layer: Layer) -> float:
    """The largest sum of absolute weights out of an input channel."""
    *taps, _, _ = range(layer.kernel.ndim)
    return np.abs(layer.kernel).sum((*taps, -1)).max()


# The norms in which a layer's gain is known.
GAINS: Mapping[ThreatModel, Callable[[Layer], float]] = {
    LINF: _linf_gain,
    L2: _l2_gain,
    L1: _l1_gain,
}


def _svd(values: np.ndarray) -> _Values:
    return np.linalg.svd(values, compute_uv=False)


def _waves(size: int, taps: int) -> np.ndarray:
    """exp(-2πi·frequency·tap/size) [size, taps]: a Fourier transform, also where taps > size."""
    return np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(taps)) / size)


def _pads(module: Any, image: Pair) -> tuple[Pair, Pair]:
    padding = module.padding
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(image, module.kernel_size, module.strides, padding)
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))
