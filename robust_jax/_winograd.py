"""Winograd's minimal filtering: 3×3 convolutions as a few matrix products (arXiv 1509.09308)."""

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from robust_jax.types import Pair


def winograd_conv(
    x: Float[Array, "b h w i"], k: Float[Array, "3 3 i o"], padding: tuple[Pair, ...]
) -> Float[Array, "b v u o"]:
    """The 3×3 convolution with a third of the multiplications, in tiles of 4×2 pixels.

    Nests F(4,3) down the image, F(2,3) across it and matrix products over channels (arXiv
    1509.09308). Larger tiles are no faster on a CPU and less exact. padding: above and below, left
    and right.
    """
    rows, columns = padding
    across = partial(
        _filtered, inner=lambda x, k: x @ k[0, 0], filtering=_F_2_3, axis=2, padding=columns
    )
    return _filtered(x, k, inner=across, filtering=_F_4_3, axis=1, padding=rows)


class _Filtering(NamedTuple):
    """F(m,3): a filter of 3 taps over m + 2 pixels gives m results, with one product per pixel.

    They are results @ ((data @ pixels) * (taps @ filter)).
    """

    data: list[list[float]]
    taps: list[list[float]]
    results: list[list[float]]


_F_2_3 = _Filtering(
    data=[[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    taps=[[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    results=[[1, 1, 1, 0], [0, 1, -1, -1]],
)
_F_4_3 = _Filtering(
    data=[
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    taps=[
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    results=[[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
)


def _filtered(
    x: Array,
    k: Array,
    *,
    inner: Callable[[Array, Array], Array],
    filtering: _Filtering,
    axis: int,
    padding: Pair,
) -> Array:
    """The convolution along one axis of x; inner computes the rest of it for each product."""
    m, size = len(filtering.results), x.shape[axis]
    length = size + sum(padding) - 2
    tiles = -(-length // m)
    margins = [(0, 0, 0)] * 4
    margins[axis] = (padding[0], m * tiles + 2 - size - padding[0], 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), margins)
    pixels = [lax.slice_in_dim(x, i, i + m * (tiles - 1) + 1, m, axis) for i in range(m + 2)]
    taps = [lax.index_in_dim(k, i, axis - 1) for i in range(3)]
    products = [
        inner(_combined(of_data, pixels), _combined(of_taps, taps))
        for of_data, of_taps in zip(filtering.data, filtering.taps, strict=True)
    ]
    y = jnp.stack([_combined(row, products) for row in filtering.results], axis + 1)
    y = y.reshape(*y.shape[:axis], m * tiles, *y.shape[axis + 2 :])
    return lax.slice_in_dim(y, 0, length, axis=axis)


def _combined(weights: list[float], terms: list[Array]) -> Array:
    return reduce(jnp.add, [w * term for w, term in zip(weights, terms, strict=True) if w])
