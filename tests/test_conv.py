"""The convolution against `lax.conv_general_dilated`, under every transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

from robust_jax import _convolution
from robust_jax._convolution import conv2d, max_pool2d
from robust_jax.models.layers import Conv

# (image, kernel, strides, padding): odd and even sizes, every kernel, stride and kind of padding;
# a stride above the kernel leaves pixels that no output reads.
GEOMETRIES = [
    ((7, 6), (3, 3), (1, 1), "SAME"),
    ((7, 6), (3, 3), (2, 2), "SAME"),
    ((8, 5), (5, 5), (1, 1), "VALID"),
    ((7, 8), (5, 5), (2, 1), "SAME"),
    ((6, 5), (1, 1), (1, 1), "VALID"),
    ((6, 5), (1, 1), (2, 2), "VALID"),
    ((5, 6), (1, 3), (1, 2), ((0, 0), (1, 2))),
]
geometries = pytest.mark.parametrize("image, window, strides, padding", GEOMETRIES)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def operands(image, window, *, batch=2, inputs=3, outputs=4, lead_x=(), lead_k=()):
    # NumPy's generator, since jax.random would compile for every shape.
    normal = np.random.default_rng(0).standard_normal
    x, k = normal((*lead_x, batch, *image, inputs)), normal((*lead_k, *window, inputs, outputs))
    return jnp.asarray(x), jnp.asarray(k)


def both(strides, padding):
    """The convolution under test, and lax's."""

    def reference(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=numbers)

    return partial(conv2d, strides=strides, padding=padding), reference


def assert_same(transform, convs, *args):
    """Checks that transform(conv), a function of args, is the same for both convolutions."""
    # Compilation takes most of the time here, and no result depends on its optimisations.
    jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    actual, expected = jit(lambda *args: [transform(conv)(*args) for conv in convs])(*args)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), actual, expected)


def energy(conv):
    return lambda x, k: jnp.sum(jnp.sin(conv(x, k)))


def gradient_energy(conv):
    """The squares of both gradients, so that its own gradient differentiates through them."""

    def squares(x, k):
        gradients = jax.grad(energy(conv), argnums=(0, 1))(x, k)
        return sum(jnp.sum(g**2) for g in gradients)

    return squares


# They cover the CPU's formulas: banded matrices, convolutions, one product for all taps.
few_and_many = pytest.mark.parametrize("inputs, outputs", [(1, 4), (42, 6), (3, 16), (8, 5)])


@geometries
@few_and_many
def test_derivatives(image, window, strides, padding, inputs, outputs):
    """Forward mode over the value and both gradients, which it also returns, and reverse mode."""
    args = operands(image, window, inputs=inputs, outputs=outputs)
    tangents = tuple(map(np.cos, args))
    gradients = partial(jax.grad, argnums=(0, 1))

    def everything(conv):
        gradient = gradients(energy(conv))

        def of(*args):
            forwards = [jax.jvp(fn, args, tangents) for fn in (conv, gradient)]
            return forwards, gradients(gradient_energy(conv))(*args)

        return of

    assert_same(everything, both(strides, padding), *args)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev, jax.hessian])
def test_jacobians(jacobian, strides):
    args = operands((4, 3), (3, 3), batch=1, inputs=1, outputs=2)
    scalar = energy if jacobian is jax.hessian else lambda conv: conv
    assert_same(lambda conv: jacobian(scalar(conv), argnums=(0, 1)), both(strides, "SAME"), *args)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (2, None), (None, 4), (1, 3)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_vmap(in_axes, strides):
    x, k = operands((5, 6), (3, 3), lead_x=(3,), lead_k=(3,))
    x = x[0] if in_axes[0] is None else jnp.moveaxis(x, 0, in_axes[0])
    k = k[0] if in_axes[1] is None else jnp.moveaxis(k, 0, in_axes[1])

    def mapped(conv):
        # One gradient at a time, since each batches the other two maps' operands differently.
        gradients = [jax.grad(energy(conv), argnums=argnum) for argnum in (0, 1)]
        functions = [conv, *gradients, jax.grad(gradient_energy(conv))]
        return lambda x, k: [jax.vmap(f, in_axes)(x, k) for f in functions]

    assert_same(mapped, both(strides, "SAME"), x, k)


def test_vmap_of_vmap_over_one_operand_each():
    x, k = operands((5, 6), (3, 3), lead_x=(3,), lead_k=(2,))

    def nested(conv):
        value_and_gradients = jax.value_and_grad(energy(conv), argnums=(0, 1))
        return jax.vmap(jax.vmap(value_and_gradients, (0, None)), (None, 0))

    assert_same(nested, both((2, 1), "SAME"), x, k)


def test_inside_scan_and_remat():
    args = operands((5, 6), (3, 3), inputs=3, outputs=3)

    def ascend(conv):
        gradient = jax.grad(jax.checkpoint(energy(conv)))

        def end(x, k):
            x, _ = lax.scan(lambda x, _: (x + 0.1 * gradient(x, k), None), x, length=3)
            return energy(conv)(x, k)

        return jax.grad(end, argnums=(0, 1))

    assert_same(ascend, both((1, 1), "SAME"), *args)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_finite_differences(strides):
    conv, _ = both(strides, "SAME")
    args = operands((4, 5), (3, 3), batch=1, inputs=2, outputs=2)
    check_grads(lambda x, k: jnp.sin(conv(x, k)), args, order=2, modes=("fwd", "rev"))


# Enough channels and tiles for Winograd's filtering, and sizes that leave partial tiles.
TILED = 13  # images
winograd = pytest.mark.parametrize(
    "image, padding", [((13, 11), "SAME"), ((14, 15), "VALID"), ((9, 16), ((0, 3), (2, 1)))]
)


@winograd
def test_winograds_filtering(image, padding):
    def everything(conv):
        gradients = jax.grad(energy(conv), argnums=(0, 1))

        def of(x, k):
            tangents = jnp.cos(x), jnp.cos(k)
            per_example = jax.vmap(lambda x: jax.grad(energy(conv))(x[None], k))
            return jax.jvp(conv, (x, k), tangents), gradients(x, k), per_example(x)

        return of

    args = operands(image, (3, 3), batch=TILED, inputs=32, outputs=33)
    conv = partial(conv2d, padding=padding)

    def conv_and_input_gradient(x, k):
        y, pull = jax.vjp(lambda x: conv(x, k), x)
        return y, pull(jnp.cos(y))

    assert "convolution" not in jax.jit(conv_and_input_gradient).lower(*args).as_text()
    assert_same(everything, both((1, 1), padding), *args)


@winograd
def test_winograds_filtering_in_float32(image, padding):
    """Against float64, the convolution and ∇x have about three times the plain rounding error."""
    args = operands(image, (3, 3), batch=TILED, inputs=64, outputs=32)
    conv, plain = both((1, 1), padding)

    @partial(jax.jit, static_argnums=0)
    def both_ways(conv, x, k):
        y, pull = jax.vjp(lambda x: conv(x, k), x)
        return y, pull(jnp.cos(jnp.arange(y.size).reshape(y.shape)).astype(y.dtype))[0]

    exact = both_ways(plain, *args)

    def error(conv):
        single = both_ways(conv, *[a.astype(jnp.float32) for a in args])
        pairs = zip(jax.device_get(single), jax.device_get(exact), strict=True)
        return [abs(a - e).max() / abs(e).max() for a, e in pairs]

    ours, theirs = error(conv), error(plain)
    print(f"relative errors: Winograd's {ours}, plain {theirs}")
    assert max(ours) < 5 * max(theirs)


def test_where_winograd_does_not_pay():
    """bfloat16, few tiles, and tiles mostly beyond the image."""
    x, k = operands((12, 12), (3, 3), batch=64, inputs=32, outputs=32)
    for few in (x.astype(jnp.bfloat16), x[:2], jnp.ones((512, 1, 12, 32))):
        text = jax.jit(conv2d).lower(few, k.astype(few.dtype)).as_text()
        assert "convolution" in text
    assert "convolution" not in jax.jit(conv2d).lower(x, k).as_text()


@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(st.data())
def test_any_shape(data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    window = pair(1, 4)
    image = tuple(k + extra for k, extra in zip(window, pair(0, 4), strict=True))
    padding = data.draw(
        st.sampled_from(["SAME", "VALID"])
        | st.tuples(*[st.tuples(st.integers(0, 5), st.integers(-1, 2))] * 2)
    )
    if not isinstance(padding, str):  # at least one output along each axis
        padding = tuple((low, max(high, -low)) for low, high in padding)
    inputs, outputs = data.draw(
        st.tuples(st.sampled_from([1, 2, 3, 8, 9]), st.sampled_from([1, 2, 3, 16]))
    )
    args = operands(
        image, window, batch=data.draw(st.integers(1, 3)), inputs=inputs, outputs=outputs
    )
    gradients = partial(jax.value_and_grad, argnums=(0, 1))
    assert_same(lambda conv: gradients(energy(conv)), both(pair(1, 3), padding), *args)


@pytest.mark.parametrize("inputs", [3, 17])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_bfloat16_gradients_accumulate_in_float32(strides, inputs):
    args = [a.astype(jnp.bfloat16) for a in operands((12, 12), (3, 3), batch=32, inputs=inputs)]
    conv, _ = both(strides, "SAME")
    gradients = jax.jit(jax.grad(lambda *args: jnp.sum(conv(*args)), argnums=(0, 1)))
    actual, exact = gradients(*args), gradients(*[a.astype(jnp.float64) for a in args])
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            a.astype(jnp.float64), e, rtol=0.02, atol=0.02 * jnp.abs(e).max()
        )


def test_plain_has_no_primitive_of_ours():
    x, k = operands((5, 5), (3, 3))
    jaxprs = {
        implementation: str(jax.make_jaxpr(partial(conv2d, implementation=implementation))(x, k))
        for implementation in ("auto", "plain")
    }
    assert "conv_general_dilated" in jaxprs["plain"]
    assert "conv_general_dilated" not in jaxprs["auto"]


def test_other_platforms_keep_the_ordinary_convolution():
    x, k = operands((5, 5), (3, 3), inputs=40)
    gradient = jax.grad(energy(conv2d), argnums=(0, 1))
    code = {
        platform: jax.jit(gradient).trace(x, k).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert "optimization_barrier" in code["cpu"]
    assert "optimization_barrier" not in code["cuda"]
    assert "dot_general" not in code["cuda"]


@few_and_many
def test_no_images(inputs, outputs):
    _, k = operands((6, 6), (3, 3), inputs=inputs, outputs=outputs)
    value, gradient = jax.value_and_grad(energy(conv2d))(jnp.zeros((0, 6, 6, inputs)), k)
    assert (value, gradient.shape) == (0, (0, 6, 6, inputs))


def test_wrong_arguments():
    x, k = operands((2, 2), (3, 3))
    with pytest.raises(ValueError, match=r"kernel \(3, 3\).* does not fit the image \(2, 2\)"):
        conv2d(x, k, padding="VALID")
    with pytest.raises(ValueError, match="implementation='fast' is not one of"):
        conv2d(x, k, implementation="fast")
    with pytest.raises(TypeError, match="float64 and float32"):
        conv2d(x, k.astype(jnp.float32))
    with pytest.raises(ValueError, match="window 3x3 does not fit the image 2x2"):
        max_pool2d(x, 3)


@pytest.mark.parametrize("use_bias", [True, False])
def test_module_is_interchangeable_with_linens(use_bias):
    x, _ = operands((7, 6), (3, 3))
    arguments = {"features": 4, "kernel_size": (3, 3), "strides": (2, 2), "use_bias": use_bias}
    ours, theirs = Conv(**arguments), nn.Conv(**arguments)
    variables = theirs.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(
        jnp.shape, variables
    )
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-10)


@pytest.mark.parametrize("image", [(4, 6), (5, 7)])
def test_pools(image):
    x, _ = operands(image, (1, 1))
    np.testing.assert_array_equal(max_pool2d(x, 2), nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_array_equal(max_pool2d(x, 3), nn.max_pool(x, (3, 3), (3, 3)))


def test_equal_maxima_share_the_gradient():
    gradient = jax.grad(lambda x: max_pool2d(x, 2).sum())
    np.testing.assert_array_equal(gradient(jnp.ones((1, 2, 2, 1))).ravel(), [0.25] * 4)
    x = jnp.array([1.0, 0.0, 1.0, -1.0]).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(gradient(x).ravel(), [0.5, 0, 0.5, 0])


def compiled_on_the_cpu(fn, *operands):
    return jax.jit(fn).lower(*operands).compile().as_text()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA's CPU backend chooses")
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("channels", [32, 128])
def test_xla_takes_its_fast_convolutions(channels, padding):
    """No YNNPACK where it is slow, and no reversed kernel, for which XLA has plain loops."""
    x, k = jnp.ones((4, 12, 12, channels)), jnp.ones((3, 3, channels, 32))
    conv = partial(conv2d, padding=padding)

    def gradients(x, k, g):
        return jax.vjp(conv, x, k)[1](g)

    forward = compiled_on_the_cpu(conv, x, k)
    backward = compiled_on_the_cpu(gradients, x, k, conv(x, k))
    for text in (forward, backward):
        assert " convolution(" in text
        assert "rhs_reversal" not in text
    is_old = jax.__version_info__ < (0, 11)
    if is_old or channels == 128:
        assert "ynn_fusion" not in forward
    if is_old:
        assert "ynn_fusion" not in backward


@pytest.mark.parametrize(
    ("image", "window", "strides", "padding"),
    [
        ((9, 8), (4, 4), (2, 2), ((1, 1), (1, 1))),
        ((10, 11), (3, 3), (2, 2), ((1, 0), (0, 2))),
        ((11, 7), (5, 4), (3, 2), ((0, 0), (2, 3))),
        ((8, 9), (3, 5), (2, 1), ((1, 1), (4, 4))),
    ],
)
def test_the_gradient_of_a_strided_convolution_is_put_together_from_its_phases(
    image, window, strides, padding
):
    geometry = _convolution.Geometry(strides, padding, image, window)
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.standard_normal((2, *geometry.output, 10)))
    k = jnp.asarray(rng.standard_normal((*window, 12, 10)))
    found = _convolution._gradient_by_phases(g, k, geometry=geometry)
    expected = _convolution._plain_input_gradient(g, k, geometry=geometry)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    text = jax.jit(partial(_convolution._cpu_input_gradient, geometry=geometry)).lower(g, k)
    assert text.as_text().count("stablehlo.convolution") == 1  # the CPU takes this form here
