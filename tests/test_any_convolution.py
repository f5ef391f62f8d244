"""Other people's convolutions and poolings run faster on a CPU and give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import robust_jax
from robust_jax import attacks, jacobian
from robust_jax._network import as_network

KEY = jax.random.key(0)
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def convolution(image, kernel, layout=NHWC, *, strides=(1, 1), padding="SAME", **keywords):
    """A function with one convolution for images [B,*image]."""
    weights = np.random.default_rng(0).normal(size=kernel).astype(np.float32) / 3

    def fn(x):
        y = lax.conv_general_dilated(
            x, weights, strides, padding, dimension_numbers=layout, **keywords
        )
        return jnp.tanh(y).reshape(len(x), -1)[:, :7]

    return fn, image


CONVOLUTIONS = {
    "3x3": convolution((8, 7, 3), (3, 3, 3, 5)),
    "strides": convolution((9, 8, 3), (3, 3, 3, 5), strides=(2, 3)),
    "valid": convolution((8, 8, 1), (5, 5, 1, 6), padding="VALID"),
    "uneven padding": convolution((6, 7, 2), (3, 2, 2, 4), padding=((2, 0), (1, 3))),
    "channels first": convolution((3, 8, 7), (5, 3, 3, 3), NCHW),
    "channels first, strided": convolution((2, 9, 8), (4, 2, 3, 3), NCHW, strides=(2, 2)),
    "wide": convolution((12, 12, 32), (3, 3, 32, 32)),
    "another order": convolution(
        (6, 5, 2), (2, 4, 3, 3), ("NHWC", "IOHW", "NWCH"), padding="VALID"
    ),
    # These stay as they are.
    "dilated": convolution((9, 9, 2), (3, 3, 2, 4), rhs_dilation=(2, 1)),
    "transposed": convolution(
        (5, 5, 2), (3, 3, 2, 4), lhs_dilation=(2, 2), padding=((1, 1), (1, 1))
    ),
    "grouped": convolution((7, 7, 4), (3, 3, 2, 6), feature_group_count=2),
    "cut": convolution((8, 8, 2), (3, 3, 2, 4), padding=((-1, 0), (0, -1))),
    "one axis": convolution((9, 3), (3, 3, 5), ("NWC", "WIO", "NWC"), strides=(1,)),
}


def pooling(window, strides, padding="VALID", image=(8, 9, 3)):
    def fn(x):
        x = jnp.round(x * 4) / 4 + 0.01 * x  # values that nearly tie
        x = nn.max_pool(x, window, strides, padding)
        return x.reshape(len(x), -1) * jnp.arange(1.0, 1 + x[0].size)

    return fn, image


POOLINGS = {
    "2x2": pooling((2, 2), (2, 2)),
    "rest": pooling((3, 4), (3, 4)),
    "one axis": pooling((2, 1), (2, 1)),
    "overlapping": pooling((3, 3), (2, 2)),
    "padded": pooling((2, 2), (2, 2), "SAME", (7, 7, 2)),
    "large": pooling((8, 9), (8, 9)),
}


def both(fn, image):
    """The network with the fast forms and as it is written, and some images."""
    fast, plain = (
        as_network(f, image, jnp.float32) for f in (fn, robust_jax.plain_convolutions(fn))
    )
    return fast, plain, np.random.default_rng(0).random((4, *image), np.float32)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *(f"pool {name}" for name in POOLINGS)])
def test_values_and_derivatives_are_those_of_the_network_as_written(name):
    table = POOLINGS if name.startswith("pool ") else CONVOLUTIONS
    fn, image = table[name.removeprefix("pool ")]
    fast, plain, x = both(fn, image)

    @jax.jit
    def values_and_gradients(x):
        gradients = [
            jax.vmap(jax.grad(lambda x, f=f: (f(x[None]) ** 2).sum()))(x) for f in (fast, plain)
        ]
        return [f(x) for f in (fast, plain, fn)], gradients

    (by_fast, by_plain, as_written), (gradient, expected) = values_and_gradients(x)
    np.testing.assert_allclose(by_plain, as_written, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_fast, as_written, rtol=1e-4, atol=1e-5)
    gradient, scale = np.asarray(gradient), np.abs(expected).max()
    np.testing.assert_allclose(gradient / scale, expected / scale, atol=1e-5)
    # A NaN survives wherever it is in a window.
    for i, one in enumerate(x):
        one[i // 2, i % 2] = np.nan
    by_fast, _, as_written = values_and_gradients(x)[0]
    assert np.isnan(as_written).any()
    assert (np.isnan(by_fast) | ~np.isnan(as_written)).all()


def test_of_equal_maxima_the_first_has_the_gradient():
    fn, image = pooling((2, 2), (2, 2), image=(4, 4, 1))
    fast, plain, _ = both(lambda x: nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1), image)
    gradients = jax.jit(lambda x: [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (fast, plain)])
    for tied in ([[0, 1], [1, 0]], [[1, 0], [0, 1]], [[0, 0], [1, 1]], [[1, 1], [1, 1]]):
        x = np.tile(np.float32(tied)[None, :, :, None], (1, 2, 2, 1))
        np.testing.assert_array_equal(*gradients(x))


def names(fn, image):
    """The primitives of the gradient of a network."""
    network = as_network(fn, image, jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda x: network(x).sum()))(jnp.ones((1, *image))))
    return {name for name in ("conv2d", "conv_general_dilated", "select_and") if name in text}


def test_what_is_replaced():
    for name, (fn, image) in CONVOLUTIONS.items():
        as_it_is = name in ("dilated", "transposed", "grouped", "cut", "one axis")
        expected = {"conv_general_dilated"} if as_it_is else {"conv2d"}
        assert names(fn, image) == expected, name
        assert names(robust_jax.plain_convolutions(fn), image) == {"conv_general_dilated"}
    for name, (fn, image) in POOLINGS.items():
        as_it_is = name in ("overlapping", "padded", "large")
        assert names(fn, image) == ({"select_and"} if as_it_is else set()), name


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(6, (5, 5))(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3), padding="VALID")(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_an_attack_and_a_norm_are_those_of_the_network_as_written():
    model = LeNet()
    x = jax.random.uniform(KEY, (8, 12, 12, 1))
    variables = jax.jit(model.init)(KEY, x)

    def logits_fn(x):
        return model.apply(variables, x)

    y = np.arange(8)
    fast, plain = (
        attacks.pgd(f, x, y, KEY, eps=0.1, norm="l2", num_steps=3)
        for f in (logits_fn, robust_jax.plain_convolutions(logits_fn))
    )
    np.testing.assert_allclose(fast, plain, atol=1e-4)
    fast, plain = (
        jacobian.frobenius_norm(f, x) for f in (logits_fn, robust_jax.plain_convolutions(logits_fn))
    )
    np.testing.assert_allclose(fast, plain, rtol=1e-4)
