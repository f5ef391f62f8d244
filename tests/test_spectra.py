"""Singular values of convolutions against explicit matrices, and a model's layers by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from robust_jax._convolution import conv2d
from robust_jax.analysis import spectra
from robust_jax.analysis.features import captured
from robust_jax.analysis.spectra import Layer
from robust_jax.models import CNN, PreActResNet

KEY = jax.random.key(0)


def circular_matrix(kernel, image, strides):
    """The convolution with circular padding as a matrix, one input pixel at a time."""
    window, inputs = kernel.shape[:2], kernel.shape[2]
    columns = []
    for h, w, i in np.ndindex(*image, inputs):
        out = np.zeros((*image, kernel.shape[3]))
        for p, q in np.ndindex(*window):
            out[(h - p) % image[0], (w - q) % image[1]] += kernel[p, q, i]
        columns.append(out[:: strides[0], :: strides[1]].ravel())
    return np.stack(columns, 1)


@pytest.mark.parametrize(
    ("image", "shape", "strides"),
    [
        ((5, 6), (3, 3, 2, 4), (1, 1)),
        ((6, 5), (3, 2, 4, 2), (1, 1)),
        ((2, 1), (3, 3, 2, 3), (1, 1)),  # the kernel is larger than the image
        ((6, 8), (3, 3, 2, 3), (2, 2)),
        ((6, 4), (3, 3, 2, 9), (3, 1)),
        ((4, 4), (1, 1, 3, 2), (2, 2)),
    ],
)
def test_circular_is_the_spectrum_of_the_circular_matrix(image, shape, strides, rng):
    kernel = rng.normal(size=shape)
    explicit = np.linalg.svd(circular_matrix(kernel, image, strides), compute_uv=False)
    values = spectra.circular(Layer(kernel, image, strides))
    np.testing.assert_allclose(values, explicit, atol=1e-12)


def test_strides_that_do_not_divide_the_image_take_the_next_that_they_do(rng):
    kernel = rng.normal(size=(3, 3, 2, 2))
    odd, even = (spectra.circular(Layer(kernel, image, (2, 2))) for image in ((7, 7), (8, 8)))
    np.testing.assert_array_equal(odd, even)


def test_a_dense_layer_has_one_spectrum(rng):
    layer = Layer(rng.normal(size=(7, 4)))
    expected = np.linalg.svd(layer.kernel, compute_uv=False)
    for spectrum in (spectra.circular, spectra.exact):
        np.testing.assert_allclose(spectrum(layer), expected, rtol=1e-12)
    np.testing.assert_allclose(spectra.operator_norm(layer, "l2"), expected[0], rtol=1e-12)


PADDED = [
    ((5, 6), (1, 1), ((1, 1), (1, 1))),
    ((5, 6), (1, 1), ((0, 0), (0, 0))),
    ((7, 5), (2, 2), ((1, 1), (1, 1))),
    ((6, 6), (2, 3), ((0, 1), (2, 0))),
    ((1, 1), (1, 1), ((1, 1), (1, 1))),
]


@pytest.mark.parametrize(("image", "strides", "padding"), PADDED)
def test_matrix_does_what_the_convolution_does(image, strides, padding, rng):
    kernel, x = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(2, *image, 2))
    expected = conv2d(jnp.float32(x), jnp.float32(kernel), strides=strides, padding=padding)
    full = spectra.matrix(Layer(kernel, image, strides, padding))
    np.testing.assert_allclose(
        x.reshape(2, -1) @ full.T, expected.reshape(2, -1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("image", "strides", "padding"), PADDED)
@pytest.mark.parametrize(("norm", "order"), [("linf", np.inf), ("l2", 2), ("l1", 1)])
def test_operator_norm_bounds_the_layer_as_it_stands(norm, order, image, strides, padding, rng):
    layer = Layer(rng.normal(size=(3, 3, 2, 4)), image, strides, padding)
    bound, gain = spectra.operator_norm(layer, norm), np.linalg.norm(spectra.matrix(layer), order)
    assert gain <= bound * (1 + 1e-12)
    if image == (5, 6):  # and closely, where borders and strides matter little
        assert bound < 1.3 * gain
    dense = Layer(spectra.matrix(layer).T)
    np.testing.assert_allclose(spectra.operator_norm(dense, norm), gain, rtol=1e-12)


def test_layers_of_a_network_are_the_maps_it_applies():
    model = CNN(num_classes=3, widths=(2, 3), hidden=5, mean=(0.5,), std=(0.25,))
    x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    variables = jax.jit(model.init)(KEY, x)
    layers = spectra.layers(model, variables, x.shape[1:])
    assert list(layers) == ["Conv_0", "Conv_1", "Dense_0", "head"]
    assert [layer.image for layer in layers.values()] == [(8, 8), (4, 4), (1, 1), (1, 1)]
    hidden = jax.jit(captured(model, variables))(x)
    inputs = {"Conv_0": (x - 0.5) / 0.25, "Dense_0": hidden["conv2"], "head": hidden["dense1"]}
    outputs = {"Conv_0": "conv1", "Dense_0": "dense1", "head": "logits"}
    for name, before in inputs.items():
        after = np.asarray(before).reshape(2, -1) @ spectra.matrix(layers[name]).T
        after += np.tile(
            variables["params"][name]["bias"],
            after.shape[1] // len(variables["params"][name]["bias"]),
        )
        after = after if name == "head" else np.maximum(after, 0)
        np.testing.assert_allclose(
            after, np.asarray(hidden[outputs[name]]).reshape(2, -1), rtol=1e-4, atol=1e-5
        )


def residual_network(values_of):
    """A network and its variables, each values_of(shape)."""
    model = PreActResNet(num_classes=3, width=1 / 32)
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 8, 8, 3)))
    return model, jax.tree.map(lambda a: np.asarray(values_of(a.shape), a.dtype), shapes)


def test_layers_of_a_residual_network_have_their_strides_and_pads():
    model, variables = residual_network(np.ones)
    layers = spectra.layers(model, variables, (8, 8, 3))
    assert len(layers) == 1 + 8 * 2 + 3 + 1
    strided = [layer for layer in layers.values() if layer.strides == (2, 2)]
    assert [layer.image for layer in strided] == [(8, 8)] * 2 + [(4, 4)] * 2 + [(2, 2)] * 2
    assert [layer.padding[0] for layer in strided] == [(0, 0), (1, 1)] * 3


def test_a_batch_norm_right_behind_a_layer_is_folded_into_it(rng):
    """The stem and each block's first convolution have one; layers that end in a sum do not."""
    model, variables = residual_network(lambda shape: rng.uniform(0.5, 2, shape))
    plain, folded = (
        spectra.layers(model, variables, (8, 8, 3), fold_norms=fold) for fold in (False, True)
    )
    changed = [
        name for name in plain if not np.array_equal(plain[name].kernel, folded[name].kernel)
    ]
    assert len(changed) == 1 + 8  # the stem's output feeds the first block's norm, and its sum
    params, statistics = variables["params"], variables["batch_stats"]
    of_norm = params["BatchNorm_1"]["scale"] / np.sqrt(statistics["BatchNorm_1"]["var"] + 1e-5)
    inner = changed[1]
    np.testing.assert_allclose(folded[inner].kernel, plain[inner].kernel * of_norm, rtol=1e-5)


def test_a_layer_of_another_kind_is_refused():
    model = nn.Sequential([nn.Conv(2, (3, 3)), lambda x: x.reshape(len(x), -1), nn.Dense(2)])
    variables = jax.jit(model.init)(KEY, np.zeros((1, 4, 4, 1)))
    with pytest.raises(ValueError, match="no nn.Dense or Conv, or never called: layers_0"):
        spectra.layers(model, variables, (4, 4, 1))


def test_an_unknown_norm_is_told():
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, not 'l7'"):
        spectra.operator_norm(Layer(np.eye(2)), "l7")
