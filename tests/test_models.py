"""The models: sizes against the published ones, precision, normalisation and batch statistics."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax._convolution import conv2d
from robust_jax.models import MODELS, num_parameters
from robust_jax.models.layers import ACTIVATIONS

MNIST, CIFAR = (28, 28, 1), (32, 32, 3)
SMALL = {  # fields that make the deep models small enough to run
    "preact_resnet": {"width": 0.125},
    "resnet50": {"width": 0.0625},
    "wide_resnet": {"depth": 10, "width": 1},
}
DEEP = ("preact_resnet", "resnet50")
# Compilation takes most of the time, and nothing here depends on its optimisations.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_model = pytest.mark.parametrize("name", MODELS)
# PreActResNet and WideResNet are one class with different numbers of layers, so the shallow one
# covers both.
shallow_models = pytest.mark.parametrize("name", [n for n in MODELS if n != "preact_resnet"])


def build(name, **fields):
    return MODELS[name](**{"num_classes": 10, **SMALL.get(name, {}), **fields})


def images(shape, batch=4):
    # NumPy's generator: jax.random would compile for every shape.
    return np.random.default_rng(0).random((batch, *shape), np.float32)


def init(model, shape):
    return jit(model.init)(jax.random.key(0), images(shape, batch=1))


def drawn_quickly(model, shape):
    """Variables like init's, from NumPy: compiling the draws of fifty layers takes seconds."""
    rng = np.random.default_rng(0)

    def filled(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            fan = leaf.size / leaf.shape[-2] if leaf.ndim == 4 else 2 * leaf.shape[0]
            return rng.normal(0, (2 / fan) ** 0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, kind in ("scale", "var"), np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), images(shape, batch=1))
    return jax.tree_util.tree_map_with_path(filled, shapes)


SHAPE = (20, 16, 2)  # neither square nor of one or three channels


@cache
def variables_of(name):
    """Variables of a model with seven classes for images of SHAPE, whatever its dtype."""
    draw = drawn_quickly if name in DEEP else init
    return draw(build(name, num_classes=7), SHAPE)


@cache
def outputs_of(name, **fields):
    """outputs(x) -> (logits, features) of the model of `variables_of` with further fields."""
    model = build(name, num_classes=7, **fields)

    @jit
    def outputs(variables, x):
        logits, state = model.apply(variables, x, mutable=["intermediates"])
        return logits, *state["intermediates"]["features"]

    return partial(outputs, variables_of(name))


# Flax's BatchNorm promotes types on its own.
@pytest.mark.parametrize("name", [name for name in MODELS if "res" not in name])
def test_computes_in_bfloat16_where_jax_promotes_no_types(name):
    model = build(name, dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images(SHAPE))
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(model.apply, variables, images(SHAPE)).dtype == jnp.float32


@pytest.mark.parametrize(
    "name, fields, shape, count",
    [
        ("linear", {}, MNIST, 7_850),
        ("mlp", {}, MNIST, 269_322),
        ("lenet5", {}, MNIST, 61_706),
        ("madry_cnn", {}, MNIST, 3_274_634),
        ("small_cnn", {}, MNIST, 312_202),
        ("small_cnn", {"widths": (64, 64, 128, 128), "hidden": (256, 256)}, CIFAR, 1_147_978),
        ("preact_resnet", {"depth": 18, "width": 1}, CIFAR, 11_172_170),
        ("preact_resnet", {"depth": 34, "width": 1}, CIFAR, 21_280_330),
        ("wide_resnet", {"depth": 28, "width": 10}, CIFAR, 36_479_194),
        ("wide_resnet", {"depth": 34, "width": 10}, CIFAR, 46_160_474),
    ],
)
def test_number_of_parameters(name, fields, shape, count):
    model = build(name, **fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), images(shape, batch=1))
    assert num_parameters(variables["params"]) == count


@every_model
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_finite_float32(name, dtype):
    model, x = build(name, num_classes=7, dtype=dtype), images(SHAPE)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits, _ = outputs_of(name, **({} if dtype == jnp.float32 else {"dtype": dtype}))(x)
    assert logits.shape == (4, 7)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.std(logits) > 1e-3  # the signal survives the depth


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_the_signal_survives_the_depth_from_its_own_initialization(name):
    model = build(name, num_classes=7)
    variables = init(model, SHAPE)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, variables_of(name))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    logits = jit(model.apply)(variables, images(SHAPE))
    assert np.isfinite(logits).all() and np.std(logits) > 1e-3


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("lenet5", "small_cnn")])
def test_digits_of_eight_pixels(name):
    model = build(name)
    assert jax.eval_shape(
        lambda x: model.apply(model.init(jax.random.key(0), x), x), images((8, 8, 1))
    ).shape == (4, 10)


@pytest.mark.parametrize("name", ["cnn", "wide_resnet"])
def test_bfloat16_gradients_point_where_float32s_do(name):
    x = images((8, 8, 1))
    variables = init(build(name), (8, 8, 1))

    def gradient(dtype):
        model = build(name, dtype=dtype)

        def scalar(variables, x):
            return jnp.sum(jnp.sin(model.apply(variables, x)))

        params, pixels = jit(jax.grad(scalar, argnums=(0, 1)))(variables, x)
        leaves = map(np.asarray, jax.tree.leaves((params["params"], pixels)))
        return np.concatenate([leaf.ravel() / np.linalg.norm(leaf) for leaf in leaves])

    wide, narrow = gradient(jnp.float32), gradient(jnp.bfloat16)
    assert wide @ narrow > 0.95 * (wide @ wide)
    assert not np.array_equal(narrow, wide)


@shallow_models
def test_normalization_is_the_first_layer(name):
    mean, std = (0.4, 0.5), (0.2, 0.25)
    x = images(SHAPE)
    found, _ = outputs_of(name, mean=mean, std=std)(x)
    expected, _ = outputs_of(name)((x - np.float32(mean)) / np.float32(std))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@shallow_models
def test_features_are_the_last_layers_input(name):
    logits, features = map(np.asarray, outputs_of(name)(images(SHAPE)))
    head = jax.tree.map(np.asarray, variables_of(name)["params"]["head"])
    # A logit near 0 is a sum of larger products that cancel.
    expected = features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, layers",
    [
        ("linear", []),
        ("mlp", ["dense1", "dense2"]),
        ("lenet5", ["conv1", "conv2", "dense1", "dense2"]),
        ("cnn", ["conv1", "conv2", "dense1"]),
        ("madry_cnn", ["conv1", "conv2", "dense1"]),
        ("small_cnn", ["conv1", "conv2", "conv3", "conv4", "dense1", "dense2"]),
        ("preact_resnet", ["stem", "stage1", "stage2", "stage3", "stage4"]),
        ("wide_resnet", ["stem", "stage1", "stage2", "stage3"]),
    ],
)
def test_names_of_the_layers(name, layers):
    model, x = build(name), images((16, 16, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    apply = partial(model.apply, mutable=["intermediates"])
    _, state = jax.eval_shape(apply, variables, x)
    assert set(state["intermediates"]) == {*layers, "features"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_maxima_are_those_of_the_activated_layer(activation):
    model, x = build("cnn", activation=activation), images((12, 12, 1))
    variables = init(model, (12, 12, 1))
    variables["params"]["Conv_0"]["bias"] -= 1.5  # where SiLU falls and rises

    def layer(name, linear, x):
        weights = variables["params"][name]
        return ACTIVATIONS[activation](linear(x, weights["kernel"]) + weights["bias"])

    def pooled(x):
        return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).max((2, 4))

    def logits(x):
        x = pooled(layer("Conv_0", conv2d, x))
        x = layer("Conv_1", conv2d, x)  # 6x6: too small to be pooled
        x = layer("Dense_0", jnp.dot, x.reshape(len(x), -1))
        head = variables["params"]["head"]
        return x @ head["kernel"] + head["bias"]

    @jit
    def both(x):
        """The outputs of the two networks, and their gradients."""
        networks = (partial(model.apply, variables), logits)
        gradients = [jax.grad(lambda x, f=f: (f(x) ** 2).sum())(x) for f in networks]
        return [f(x) for f in networks], gradients

    values, gradients = both(x)
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


def test_batch_statistics_change_in_training_only():
    model, x = build("wide_resnet"), images((8, 8, 1))
    variables = init(model, (8, 8, 1))
    apply = jit(partial(model.apply, mutable=["batch_stats"]), static_argnames="train")
    logits, state = apply(variables, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    trained_logits, state = apply(variables, x, train=True)
    for before, after in zip(
        *map(jax.tree.leaves, (variables["batch_stats"], state["batch_stats"])), strict=True
    ):
        assert not np.array_equal(before, after)
    assert not np.allclose(logits, trained_logits)


def test_synchronized_batch_norm_equals_one_big_batch():
    x = images((8, 8, 1), batch=6)
    variables = init(build("wide_resnet"), (8, 8, 1))
    single, split = (
        partial(build("wide_resnet", axis_name=axis).apply, train=True, mutable=["batch_stats"])
        for axis in (None, "batch")
    )
    logits, state = jit(single)(variables, x)
    mapped = jit(jax.vmap(split, in_axes=(None, 0), axis_name="batch"))
    split_logits, split_state = jax.device_get(mapped(variables, x.reshape(3, 2, 8, 8, 1)))
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    close(split_logits.reshape(logits.shape), logits)
    for device in range(3):
        jax.tree.map(close, jax.tree.map(lambda a, d=device: a[d], split_state), state)


def test_group_norm_has_no_state_and_keeps_examples_apart():
    model, x = build("wide_resnet", norm="group"), images((8, 8, 1))
    variables = init(model, (8, 8, 1))
    assert set(variables) == {"params"}
    apply = jit(partial(model.apply, train=True))
    alone = np.concatenate([apply(variables, one[None]) for one in x])
    np.testing.assert_allclose(apply(variables, x), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "linear"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_used(name, activation):
    model, x = build(name, activation=activation), images((16, 16, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    smooth = "logistic" in str(jax.make_jaxpr(model.apply)(variables, x))
    assert smooth == (activation == "silu")


@pytest.mark.parametrize("name", ["lenet5", "wide_resnet"])
def test_plain_convolutions_give_the_same_gradients(name):
    x = images((16, 16, 1), batch=2)
    variables = init(build(name), (16, 16, 1))

    def gradients(implementation):
        model = build(name, conv_implementation=implementation)

        def scalar(params, x):
            return jnp.sum(jnp.sin(model.apply({**variables, "params": params}, x)))

        return jit(jax.grad(scalar, argnums=(0, 1)))(variables["params"], x)

    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, gradients("auto"), gradients("plain"))


def test_dropout_follows_the_example_and_keeps_the_mean():
    model = build("small_cnn", widths=(4, 4), hidden=(64, 8), dropout_rate=0.5)
    shape = (12, 12, 1)
    variables = init(model, shape)
    x, keys = images(shape, batch=6), jax.random.split(jax.random.key(1), 6)

    @jit
    def trained(x, keys):
        network = model.clone(dropout_keys=keys)
        logits, state = network.apply(variables, x, train=True, mutable=["intermediates"])
        return logits, state["intermediates"]

    logits, sown = trained(x, keys)
    # Masks follow the example's key in any batch, change with the key, and vanish in evaluation.
    np.testing.assert_allclose(trained(x[2:3], keys[2:3])[0], logits[2:3], rtol=1e-5, atol=1e-6)
    assert np.abs(trained(x, keys[::-1])[0] - logits).max() > 1e-3
    plain = jit(model.apply)(variables, x)
    assert np.abs(plain - logits).max() > 1e-3
    # Of the last hidden layer's units that are not 0 anyway, half are dropped.
    (before,), (after,) = sown["dense2"], sown["features"]
    active = np.asarray(before) > 0
    ratio = np.asarray(after)[active] / np.asarray(before)[active]
    assert set(np.unique(ratio.round(3))) == {0.0, 2.0}
    # With one hidden layer, the mean of many draws is the network without dropout.
    one = build("small_cnn", widths=(4, 4), hidden=(64,), dropout_rate=0.5)
    variables = init(one, shape)

    @jit
    def mean_and_plain(x, key):
        drawing = one.clone(dropout_keys=jax.random.split(key, 4000))
        tiled = jnp.broadcast_to(x, (4000, *shape))
        return drawing.apply(variables, tiled, train=True).mean(0), one.apply(variables, x)[0]

    np.testing.assert_allclose(*mean_and_plain(x[:1], jax.random.key(2)), atol=0.05)


def test_training_with_dropout_needs_keys():
    model = build("small_cnn", dropout_rate=0.5)
    with pytest.raises(ValueError, match="dropout needs dropout_keys"):
        jax.eval_shape(lambda k: model.init(k, images(MNIST, 1), train=True), jax.random.key(0))


def test_initialization_is_he_normal():
    params = init(build("small_cnn"), (28, 28, 1))["params"]
    for layer, fan in (("Conv_3", 9 * 64), ("Dense_0", 1024)):
        np.testing.assert_allclose(jnp.std(params[layer]["kernel"]), (2 / fan) ** 0.5, rtol=0.03)
        assert not params[layer]["bias"].any()


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("wide_resnet", {"depth": 30}, r"depth=30 is not 6n \+ 4: one of 10, 16, 22, 28, 34"),
        ("wide_resnet", {"depth": 4}, r"depth=4 is not 6n \+ 4"),
        ("preact_resnet", {"depth": 20}, "depth=20 is not one of 18, 34"),
        ("preact_resnet", {"norm": "layer"}, "norm='layer' is not one of 'batch', 'group'"),
        ("wide_resnet", {"activation": "tanh"}, "activation='tanh' is not one of 'relu', 'silu'"),
        ("mlp", {"activation": "tanh"}, "activation='tanh' is not one of 'relu', 'silu'"),
        ("cnn", {"conv_implementation": "fast"}, "conv_implementation='fast' is not one of"),
        ("small_cnn", {"dropout_rate": 1.0}, r"dropout_rate=1.0 must be in \[0, 1\)"),
    ],
)
def test_wrong_fields(name, fields, message):
    with pytest.raises(ValueError, match=message):
        build(name, **fields)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"len\(mean\)=3 is not one of 1"):
        init(build("linear", mean=(0.1, 0.2, 0.3)), (8, 8, 1))
    with pytest.raises(ValueError, match="does not fit the image"):
        init(build("small_cnn"), (8, 8, 1))


def test_every_model_is_a_linen_module():
    assert all(issubclass(model, nn.Module) for model in MODELS.values())
