"""The front door: each public function is compiled once, takes any input, and tells mistakes."""

import functools
import gc
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import robust_jax
from robust_jax import attacks, energy, jacobian, losses, margins
from robust_jax._network import as_network
from robust_jax.keys import example_keys
from tests.calls import (
    ALL,
    ATTACKS,
    EPS,
    FUNCTIONS,
    WITH_EPS,
    WITH_LABELS,
    WITHOUT_KEY,
    autoattack,
    lowerings,
)

KEY = jax.random.key(0)
SHAPE = (3, 4, 1)


def weights_of(seed, num_classes=4):
    one, two = jax.random.split(jax.random.key(seed))
    return jax.random.normal(one, (12, 8)), jax.random.normal(two, (8, num_classes))


def network(weights):
    """A function made anew at each call, as a user's lambda is."""
    return lambda x: jax.nn.relu(x.reshape(x.shape[0], -1) @ weights[0]) @ weights[1]


def examples(seed=0, count=8):  # one for each device
    x = jax.random.uniform(jax.random.key(seed), (count, *SHAPE), minval=0.2, maxval=0.8)
    return x, jnp.argmax(network(weights_of(0))(x), -1)


def test_every_function_behind_the_front_door_is_called_here():
    modules = (attacks, energy, jacobian, margins)
    public = {name: fn for module in modules for name, fn in vars(module).items()}
    found = {name for name, fn in public.items() if getattr(fn, "is_compiled", False)}
    assert found == set(FUNCTIONS)


def test_a_criterion_may_compare_outputs_with_anything():
    x, _ = examples()
    f = network(weights_of(0))

    def moved(logits, reference):
        return jnp.abs(logits - reference).max(-1) > 0.5

    def distance(logits, reference):
        return jnp.abs(logits - reference).sum(-1)

    x_adv = attacks.pgd(f, x, f(x), KEY, eps=0.2, loss=distance, criterion=moved)
    assert moved(f(x_adv), f(x)).all()
    with pytest.raises(ValueError, match="has the label 9; the network has 4 classes"):
        attacks.pgd(f, x, jnp.full(len(x), 9), KEY, eps=0.2, criterion=attacks.misclassified)


@pytest.mark.parametrize("name", ALL)
def test_is_compiled_once_for_other_batches_keys_radii_and_weights(name):
    fn = ALL[name]
    calls = [
        (network(weights_of(seed)), *examples(seed), jax.random.key(seed)) for seed in (0, 1, 2)
    ]
    # AutoAttack's batches hold what stands, which is another number in each call: the same network.
    if name in ("autoattack", "audit"):
        calls = [calls[0], (network(weights_of(0)), *examples(0), jax.random.key(0))]
    fn(*calls[0])
    with lowerings() as seen:
        for i, (logits_fn, x, y, key) in enumerate(calls[1:]):
            if name not in ("autoattack", "audit"):
                y = jnp.argmax(logits_fn(x), -1)
                seen.clear()
            eps = {"eps": EPS.get(name, 0.1) * (1 - i / 4)} if name in WITH_EPS else {}
            fn(logits_fn, x, y, key, **eps)
            assert not seen, f"{name} compiled {len(seen)} programs again"


def test_a_wrong_setting_spoils_no_later_call():
    x, y = examples()
    f = network(weights_of(0))
    for wrong in (2.0, "2"):
        with pytest.raises(ValueError, match=f"not {wrong!r}"):
            attacks.pgd(f, x, y, KEY, eps=0.1, num_steps=wrong)
    plain = attacks.pgd(f, x, y, KEY, eps=0.1, num_steps=2)
    np.testing.assert_array_equal(attacks.pgd(f, x, y, KEY, eps=0.1, num_steps=np.int64(2)), plain)

    def called(num_steps):
        overrides = {"apgd_ce": {"num_steps": num_steps}}
        return attacks.autoattack(
            f, x, y, KEY, eps=0.1, version=("apgd_ce",), overrides=overrides, progress=False
        )

    with pytest.raises(ValueError, match="not 3.0"):
        called(3.0)
    np.testing.assert_array_equal(called(np.int64(3)).x_adv, called(3).x_adv)


def test_settings_made_again_are_the_same_program():
    x, y = examples()

    def smoothed(amount):
        loss = functools.partial(losses.cross_entropy, label_smoothing=amount)
        return attacks.pgd(network(weights_of(0)), x, y, KEY, eps=0.1, num_steps=2, loss=loss)

    def nearest(num_steps):
        attack = functools.partial(attacks.deepfool, num_steps=num_steps)
        return margins.minimum_norm(network(weights_of(0)), x, y, KEY, attack=attack)

    for call, settings in ((smoothed, (0.1, 0.9)), (nearest, (1, 2))):
        one, other = (np.asarray(call(setting)) for setting in settings)
        assert (one != other).any()
        with lowerings() as seen:
            for setting, expected in zip(settings, (one, other), strict=True):
                np.testing.assert_array_equal(call(setting), expected)
        assert not seen


def test_a_custom_vjp_around_weights_is_compiled_once():
    x, y = examples()

    def made(weights):
        @jax.custom_vjp
        def logits_fn(x):
            return x.reshape(len(x), -1) @ weights

        def pull(shape, cotangent):
            return ((cotangent @ weights.T).reshape(shape),)

        logits_fn.defvjp(lambda x: (logits_fn(x), x.shape), pull)
        return logits_fn

    one, other = (jax.random.normal(jax.random.key(seed), (12, 4)) for seed in (0, 1))
    first = attacks.fgsm(made(one), x, y, KEY, eps=0.1)
    with lowerings() as seen:
        np.testing.assert_array_equal(attacks.fgsm(made(one), x, y, KEY, eps=0.1), first)
    assert not seen
    second = attacks.fgsm(made(other), x, y, KEY, eps=0.1)
    expected = attacks.fgsm(lambda x: x.reshape(len(x), -1) @ other, x, y, KEY, eps=0.1)
    chex_close(second, expected)


def test_a_programs_size_does_not_grow_with_the_network():
    sizes = []
    for width in (8, 512):
        weights = (jnp.ones((12, width)), jnp.ones((width, 4)))
        found = as_network(network(weights), SHAPE, jnp.float32)
        text = jax.jit(lambda f, x: f(x)).lower(found, jnp.ones((6, *SHAPE))).as_text()
        sizes.append(len(text))
    assert sizes[1] < 1.1 * sizes[0]


def test_programs_are_kept_a_bounded_number_of_them(monkeypatch):
    from robust_jax import _front, _network

    kept = (_front._program, _front._rows_program, _network._known)
    assert {cache.cache_info().maxsize for cache in kept} == {_network.MOST_PROGRAMS}
    small = functools.lru_cache(2)(_front._program.__wrapped__)
    monkeypatch.setattr(_front, "_program", small)
    x, y = examples()
    for factor in (1.0, 2.0, 3.0, 4.0):  # four programs
        jacobian.frobenius_norm(lambda x, factor=factor: factor * network(weights_of(0))(x), x)
    assert small.cache_info().currsize == 2 and small.cache_info().misses == 4


def test_memory_does_not_grow_with_calls():
    x, y = examples()
    for seed in range(300):
        attacks.fgsm(network(weights_of(0)), x, y, jax.random.key(seed), eps=0.1)
    gc.collect()
    before = len(gc.get_objects())
    for seed in range(200):
        attacks.fgsm(network(weights_of(0)), x, y, jax.random.key(seed), eps=0.1)
    gc.collect()
    assert len(gc.get_objects()) < before + 500


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traces_through_the_callers_transformations(name):
    fn, (x, y), weights = FUNCTIONS[name], examples(), weights_of(0)
    plain = fn(network(weights), x, y, KEY)
    keys = jax.random.split(KEY, len(x))
    jitted = jax.jit(lambda w, x, y, k: fn(network(w), x, y, k))(weights, x, y, KEY)
    chex_close(jitted, plain)
    per_key = fn(network(weights), x, y, keys)

    @jax.jit
    @jax.vmap
    def lifted(x, y, k):
        return fn(network(weights), x[None], y[None], k[None])

    chex_close(jax.tree.map(lambda a: a[:, 0], lifted(x, y, keys)), per_key)

    def body(carry, _):
        return carry, fn(network(weights), x, y, KEY)

    _, scanned = jax.lax.scan(body, 0, length=2)
    chex_close(jax.tree.map(lambda a: a[1], scanned), plain)


def chex_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, other)


def test_differentiates_through_the_callers_grad():
    x, y = examples()

    @jax.jit
    def loss(weights):
        x_adv = attacks.pgd(network(weights), x, y, KEY, eps=0.1, num_steps=2)
        return losses.cross_entropy(network(weights)(x_adv), y).mean()

    gradient = jax.grad(loss)(weights_of(0))
    assert all(np.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(gradient))


# Networks that are written in other ways.


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)).mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.conv(x)).mean((1, 2))))


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 8) / 8


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


def linen(seed, train=False):
    model = Linen()
    variables = model.init(jax.random.key(seed), jnp.ones((1, *SHAPE)))
    return lambda x: model.apply(variables, x, train)


def equinox(seed):
    one, two = jax.random.split(jax.random.key(seed))
    conv, head = eqx.nn.Conv2d(1, 4, 3, key=one), eqx.nn.Linear(4, 4, key=two)
    return jax.vmap(lambda x: head(jax.nn.relu(conv(jnp.transpose(x, (2, 0, 1)))).mean((1, 2))))


def flax_nnx(seed):
    model = Nnx(nnx.Rngs(seed))
    model.eval()
    return model


def convolution(seed):
    kernel = jax.random.normal(jax.random.key(seed), (3, 3, 1, 4))
    return lambda x: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).max((1, 2))


def exported(seed):
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3, 4, 1"), jnp.float32)
    found = jax.export.export(jax.jit(network(weights_of(seed))))(shape)
    return lambda x: found.call(x)


def around(fn, first=lambda x: x):
    return lambda x: fn(first(x))


def repeated(fn):
    def logits_fn(x):
        return jax.lax.scan(lambda z, _: (jnp.tanh(z), None), fn(x), length=2)[0]

    return logits_fn


def prelu(weights, slope):
    """With a weight that has no axes."""

    def logits_fn(x):
        hidden = x.reshape(x.shape[0], -1) @ weights[0]
        return jnp.where(hidden > 0, hidden, slope * hidden) @ weights[1]

    return logits_fn


NETWORKS = {
    "lambda": lambda seed: network(weights_of(seed)),
    "jitted": lambda seed: jax.jit(network(weights_of(seed))),
    "a lambda around a jitted one": lambda seed: around(jax.jit(network(weights_of(seed)))),
    "Partial": lambda seed: jax.tree_util.Partial(lambda w, x: network(w)(x), weights_of(seed)),
    "linen": linen,
    "nnx": flax_nnx,
    "equinox": equinox,
    "lax convolution": convolution,
    "remat": lambda seed: jax.checkpoint(network(weights_of(seed))),
    "scan": lambda seed: repeated(network(weights_of(seed))),
    "custom_vjp": lambda seed: around(network(weights_of(seed)), straight_through),
    "PReLU": lambda seed: prelu(weights_of(seed), jnp.float32(0.1 + seed)),
    "jitted PReLU": lambda seed: jax.jit(prelu(weights_of(seed), jnp.float32(0.1 + seed))),
    "numpy weights": lambda seed: network(tuple(map(np.asarray, weights_of(seed)))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_compiled_once_however_it_is_written(name):
    x, _ = examples()
    make = NETWORKS[name]
    y = jnp.argmax(make(0)(x), -1)
    first = attacks.pgd(make(0), x, y, KEY, eps=0.1, num_steps=2)
    other = make(1)
    with lowerings() as seen:
        second = attacks.pgd(other, x, y, KEY, eps=0.1, num_steps=2)
        again = attacks.pgd(make(0), x, y, KEY, eps=0.1, num_steps=2)
        made = len(seen)
    expected = jax.jit(lambda x, y: attacks.pgd(other, x, y, KEY, eps=0.1, num_steps=2))(x, y)
    np.testing.assert_allclose(second, expected, atol=1e-5)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    # What makes the weights may compile; the attack's program is the largest, and is not among it.
    assert made == 0 or name in ("linen", "nnx", "equinox", "lax convolution"), made


def test_what_a_function_refers_to_may_change():
    x, y = examples()
    weights = weights_of(0)

    def logits_fn(x):
        return network(weights)(x)

    before = attacks.pgd(logits_fn, x, y, KEY, eps=0.1, num_steps=2)
    weights = weights_of(1)
    after = attacks.pgd(logits_fn, x, y, KEY, eps=0.1, num_steps=2)
    expected = attacks.pgd(network(weights_of(1)), x, y, KEY, eps=0.1, num_steps=2)
    np.testing.assert_array_equal(after, expected)
    assert (before != after).any()


def test_functions_that_differ_in_a_derivative_alone_are_two():
    x, y = examples()

    def scaled(scale):
        @jax.custom_vjp
        def fn(x):
            return x

        fn.defvjp(lambda x: (x, None), lambda _, g: (scale * g,))
        return lambda x: fn(network(weights_of(0))(x))

    up, down = (attacks.fgsm(scaled(s), x, y, KEY, eps=0.1) for s in (1.0, -1.0))
    assert (up != down).any()


@pytest.mark.parametrize("name", ["pgd", "fab", "square", "frobenius_norm"])
def test_a_function_that_cannot_be_vmapped_works_on_the_whole_batch(name):
    x, y = examples()
    found = FUNCTIONS[name](exported(0), x, y, KEY)
    chex_close(found, FUNCTIONS[name](network(weights_of(0)), x, y, KEY))


def test_a_network_outside_jax_is_attacked_by_its_outputs_alone():
    x, y = examples()
    chex_close(
        FUNCTIONS["square"](outside(), x, y, KEY),
        FUNCTIONS["square"](network(weights_of(0)), x, y, KEY),
    )
    for name in ("pgd", "frobenius_norm", "first_order", "autoattack", "audit"):
        with pytest.raises(ValueError, match="has no gradient there: attacks.square needs none"):
            ALL[name](outside(), x, y, KEY)


# Mistakes.


class Module:
    """What it looks like; PyTorch need not be installed."""

    __module__ = "torch.nn.modules.module"

    def __call__(self, x):
        return x


def remembering():
    """A network with a running mean of its own, in training mode, as Keras has."""
    weights, state = weights_of(0), [jnp.zeros(4)]

    def logits_fn(x):
        logits = network(weights)(x)
        state[0] = (state[0] + logits.mean(0)) / 2
        return logits - state[0]

    return logits_fn


def jitted_nnx():
    """An NNX module in evaluation mode, called as its training loop does."""
    model, call = flax_nnx(0), nnx.jit(lambda model, x: model(x))
    return lambda x: call(model, x)


def outside():
    """A network outside JAX, without a gradient."""
    first, second = map(np.asarray, weights_of(0))

    def logits(x):
        return np.maximum(np.asarray(x).reshape(len(x), -1) @ first, 0) @ second

    return lambda x: jax.pure_callback(logits, jax.ShapeDtypeStruct((len(x), 4), jnp.float32), x)


def mistakes():
    x, y = (np.asarray(a) for a in examples())
    nan = x.copy()
    nan[0, 0, 0, 0] = np.nan
    f = network(weights_of(0))
    return {
        "uint8": ({"x": (255 * x).astype(np.uint8)}, r"x\w* is uint8; pixels are floats .* by 255"),
        "0 to 255": ({"x": 255 * x}, r"x\w* ranges over .*; pixels must be in \[0, 1\]"),
        "a rounding error": (
            {"x": np.where(x == x.max(), np.float32(1.0000001), x)},
            r"x\w* ranges over \[0.\d+, 1.0000001\]; .* jnp.clip\(x\w*, 0, 1\)",
        ),
        "-1 to 1": ({"x": 2 * x - 1}, r"x\w* ranges over .*; pixels must be in \[0, 1\]"),
        "NaN": ({"x": nan}, r"x\w* holds NaN"),
        "one image": ({"x": x[0], "y": y[0]}, r"y has the shape \[\].*batch axis"),
        "no image": ({"x": x[:0], "y": y[:0]}, r"x\w* has the shape \[0, 3, 4, 1\]; give a batch"),
        "one-hot": ({"y": np.eye(4)[y]}, r"y has the shape \[8, 4\]; labels are integers \[B\]"),
        "float labels": ({"y": y * 1.0}, "y is float.*; labels are integers from 0 to 3"),
        "from 1": ({"y": y * 0 + 4}, "y has the label 4; the network has 4 classes"),
        "no labels": ({"y": None}, "y is None; give a label for each of the 8 examples"),
        "too few": ({"y": y[:3]}, r"y has the shape \[3\]; one label for each of the 8"),
        "an int as key": ({"key": 0}, r"key is 0; give a key such as jax.random.key\(0\)"),
        "two keys": ({"key": jax.random.split(KEY, 2)}, r"key has the shape \[2\]; give one key"),
        "one logit": (
            {"logits_fn": lambda x: f(x)[:, :1]},
            "one number an example; .* jnp.concatenate",
        ),
        "no classes": ({"logits_fn": lambda x: f(x)[:, 0]}, r"returns the shape \[1\] for one"),
        "with aux": ({"logits_fn": lambda x: (f(x), x)}, r"a tuple, .*lambda x: f\(x\)\[0\]"),
        "a dict": ({"logits_fn": lambda x: {"z": f(x)}}, r"a dict, .*lambda x: f\(x\)\['z'\]"),
        "numpy": ({"logits_fn": lambda x: np.asarray(x)}, "hands its input to numpy"),
        "no function": ({"logits_fn": 3}, "logits_fn is 3; give a function"),
        "a branch": ({"logits_fn": lambda x: f(x) if x.sum() > 0 else x}, "use jnp.where or"),
        "state": ({"logits_fn": remembering()}, "stores values in one call and uses them in the"),
        "PyTorch": ({"logits_fn": Module()}, "a PyTorch module; docs/attack_your_model.md has"),
        "NNX without eval": ({"logits_fn": Nnx(nnx.Rngs(0))}, r"call its eval\(\) first"),
        "linen in training": ({"logits_fn": linen(0, train=True)}, "or pass train=False"),
    }


# Of the energies; they compare outputs then.
LABEL_FREE = ("mean_square", "oscillation", "rise", "total_variation", "path")
RADII = {
    "text": ("8/255", "eps is '8/255'; give a number in pixel units, 8/255 without quotes"),
    "negative": (-0.1, "eps must not be negative"),
    "None": (None, "eps is None; give a number"),
    "NaN": (float("nan"), "eps must not be negative, not nan"),
}


@pytest.mark.parametrize("mistake", mistakes())
def test_a_mistake_is_told_in_one_line(mistake):
    changes, message = mistakes()[mistake]
    x, y = examples()
    for name in (*WITH_LABELS, "autoattack", "audit"):
        arguments = {"logits_fn": network(weights_of(0)), "x": x, "y": y, "key": KEY, **changes}
        if name in WITHOUT_KEY and "key" in changes:
            continue
        if name in LABEL_FREE and "y" in changes and changes["y"] is None:
            continue
        with pytest.raises(ValueError, match=message) as caught:
            ALL[name](*arguments.values())
        assert "\n" not in str(caught.value), name


def scaled(scale, x):
    return scale * network(weights_of(0))(x)


IMAGE = np.ones(SHAPE, np.float32)
OTHER_MISTAKES = {
    "one image": (
        lambda: jacobian.frobenius_norm(convolution(0), IMAGE),
        r"fn takes an example of the shape \[3, 4, 1\], .* \(x\[None\]\)",
    ),
    "a function that returns a dict": (
        lambda: jacobian.frobenius_norm(lambda x: {"z": x[:, 0, :, 0]}, IMAGE[None]),
        r"fn returns a dict, not an array; .* lambda x: f\(x\)\['z'\]",
    ),
    # Apart from the others, as a failed call leaves the module damaged.
    "NNX within nnx.jit": (
        lambda: attacks.pgd(jitted_nnx(), *examples(), KEY, eps=0.1),
        r"or calls nnx.jit: call its eval\(\) first and the model itself",
    ),
    "one logit, no labels": (
        lambda: margins.clever(lambda x: network(weights_of(0))(x)[:, :1], examples()[0], KEY),
        "one number an example; .* jnp.concatenate",
    ),
    "bytes, no labels": (
        lambda: margins.clever(network(weights_of(0)), 255 * examples()[0], KEY),
        r"pixels must be in \[0, 1\]",
    ),
    "a derivative that has no forward mode": (
        lambda: jacobian.spectral_norm(
            around(network(weights_of(0)), straight_through), examples()[0], KEY
        ),
        "a derivative by jax.custom_vjp, which cannot be taken forwards",
    ),
    "other points": (
        lambda: attacks.distances(np.ones((8, 3)), np.ones((3, 3))),
        r"x has the shape \[8, 3\] and x_adv \[3, 3\]; give as many points",
    ),
    **{
        f"{name} within {transformation.__name__}": (
            lambda name=name, transformation=transformation: transformation(
                lambda scale: (
                    ALL[name](lambda x: scale * network(weights_of(0))(x), *examples(), KEY).x_adv
                )
            )(jnp.ones(2)[:, None, None]),
            "loops on the host: call them outside jit, vmap",
        )
        for name in ("autoattack", "audit")
        for transformation in (jax.jit, jax.vmap)
    },
    "weights of a trace in a pytree": (
        lambda: jax.vmap(
            lambda scale: (
                ALL["autoattack"](jax.tree_util.Partial(scaled, scale), *examples(), KEY).x_adv
            )
        )(jnp.ones(2)),
        "loops on the host: call them outside jit, vmap",
    ),
    **{
        f"{name} of a traced radius": (
            lambda name=name: jax.jit(
                lambda eps: ALL[name](network(weights_of(0)), *examples(), KEY, eps=eps)
            )(0.1),
            "loops on the host: call them outside jit, vmap",
        )
        for name in ("autoattack", "audit")
    },
}


@pytest.mark.parametrize("mistake", OTHER_MISTAKES)
def test_another_mistake_is_told_in_one_line(mistake):
    call, message = OTHER_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mistake", RADII)
def test_a_radius_that_is_none_is_told_in_one_line(mistake):
    eps, message = RADII[mistake]
    x, y = examples()
    for name in (*WITH_EPS, "autoattack", "audit"):
        with pytest.raises(ValueError, match=message):
            ALL[name](network(weights_of(0)), x, y, KEY, eps=eps)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_legacy_keys_lists_and_numpy_are_taken(name):
    x, y = examples()
    plain = FUNCTIONS[name](network(weights_of(0)), x, y, KEY)
    other = FUNCTIONS[name](
        network(weights_of(0)), np.asarray(x), list(map(int, y)), jax.random.PRNGKey(0)
    )
    chex_close(other, plain)


@pytest.mark.parametrize("name", ["pgd", "spectral_norm"])
@pytest.mark.parametrize("count", [2, 8])
def test_legacy_keys_are_taken_within_the_callers_jit_too(name, count):
    x, y = examples(count=count)
    call = functools.partial(FUNCTIONS[name], network(weights_of(0)), x, y)
    plain, legacy = call(KEY), jax.random.PRNGKey(0)
    chex_close(jax.jit(call)(legacy), plain)
    chex_close(call(legacy), plain)
    with jax.disable_jit():
        chex_close(call(legacy), plain)
        x, y = np.asarray(x), list(map(int, y))
        chex_close(FUNCTIONS[name](network(weights_of(0)), x, y, legacy), plain)


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_KEY])
def test_keys_of_another_implementation_are_taken(name):
    x, y = examples()
    key = jax.random.key(0, impl="rbg")
    found = ALL[name](network(weights_of(0)), x, y, key)
    keys = ALL[name](network(weights_of(0)), x, y, example_keys(key, len(x)))
    assert jax.tree.structure(found) == jax.tree.structure(keys)
    if name not in ("autoattack", "audit"):
        chex_close(found, keys)


def test_an_evaluation_takes_keys_of_another_implementation_and_tells_of_logits_that_are_nan():
    x, y = examples()
    is_broken = x.mean((1, 2, 3)) > 0.5

    def logits_fn(x):
        broken = x.mean((1, 2, 3))[:, None] > 0.5
        return jnp.where(broken, jnp.nan, network(weights_of(0))(x))

    found = robust_jax.evaluate(
        logits_fn,
        x,
        y,
        jax.random.key(0, impl="rbg"),
        eps=0.1,
        version=("apgd_ce",),
        overrides={"apgd_ce": {"num_steps": 2}},
        num_audited=0,
        progress=False,
    )
    assert 0 < found.clean_accuracy == 1 - is_broken.mean()
    many = f"{is_broken.sum()} of 8 points have logits that are NaN"
    assert found.warnings[0].startswith(many)


def test_a_randomised_network_takes_keys_of_another_implementation():
    x, y = examples()

    def logits_fn(x, key):
        return network(weights_of(0))(x) + jax.random.normal(key, (len(x), 4))

    found = attacks.autoattack(
        logits_fn,
        x,
        y,
        jax.random.key(0, impl="rbg"),
        eps=0.1,
        version="rand",
        overrides=dict.fromkeys(("apgd_ce", "apgd_dlr"), {"num_steps": 2, "eot_samples": 2}),
        progress=False,
    )
    assert found.x_adv.shape == x.shape


def test_logits_that_are_not_finite_or_depend_on_the_batch_are_warned_of():
    x, y = examples()
    f = network(weights_of(0))
    masked = autoattack(lambda x: jnp.where(jnp.arange(4) == 3, -jnp.inf, f(x)), x, y % 3, KEY)
    assert "8 of 8 points have logits of -inf" in masked.warnings[0]
    broken = autoattack(lambda x: jnp.where(jnp.arange(4) == 3, jnp.nan, f(x)), x, y % 3, KEY)
    assert "8 of 8 points have logits that are NaN" in broken.warnings[0]
    inside = 0.2 + 0.6 * jnp.asarray(x)
    low, high = inside.min(), inside.max()

    def with_a_hole(z):  # off the images only, where attacks lead
        outside = ((z < low) | (z > high)).reshape(len(z), -1).any(-1)
        return jnp.where(outside[:, None], jnp.nan, f(z))

    found = autoattack(with_a_hole, inside, f(inside).argmax(-1), KEY)
    assert not found.robust.all() and any("attacks led" in line for line in found.warnings)
    whole = autoattack(lambda x: f(x) - f(x).mean(0), x, y, KEY)
    assert any("alone in its batch" in warning for warning in whole.warnings)


@pytest.mark.parametrize("name", [n for n in ATTACKS if n not in ("jsma", "apgd_targeted")])
def test_a_class_that_is_ruled_out_protects_nobody(name):
    # Its logit is -inf. The targeted DLR loss has no value there, and AutoAttack says so.
    x, _ = examples(count=16)
    f = network(weights_of(0))
    y = f(x)[:, :3].argmax(-1)

    def ruled_out(x):
        return jnp.where(jnp.arange(4) == 3, -jnp.inf, f(x))

    def plain(x):
        return f(x)[:, :3]

    broken = [
        float((plain(FUNCTIONS[name](fn, x, y, KEY)).argmax(-1) != y).mean())
        for fn in (ruled_out, plain)
    ]
    assert broken[0] >= broken[1] - 0.2, broken
    assert not attacks.is_adversarial(ruled_out, x, y).any()
    np.testing.assert_allclose(
        margins.first_order(ruled_out, x, y), margins.first_order(plain, x, y), rtol=1e-5
    )


def test_a_batch_too_large_for_memory_is_halved_with_a_warning(monkeypatch):
    from robust_jax import _front

    x, y = examples(count=32)
    real, sizes = _front._rows_program, []

    def small(*arguments):
        run = real(*arguments)

        def limited(network, rows, scalars):
            sizes.append(len(rows["x"]))
            if len(rows["x"]) > 8:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return run(network, rows, scalars)

        return limited

    expected = attacks.autoattack(
        network(weights_of(0)),
        x,
        y,
        KEY,
        eps=0.05,
        batch_size=32,
        version=("apgd_ce",),
        progress=False,
    )
    monkeypatch.setattr(_front, "_rows_program", small)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = attacks.autoattack(
            network(weights_of(0)),
            x,
            y,
            KEY,
            eps=0.05,
            batch_size=32,
            version=("apgd_ce",),
            progress=False,
        )
    np.testing.assert_array_equal(found.broken_by, expected.broken_by)
    told = [str(warning.message) for warning in caught]
    assert [text.partition(";")[2] for text in told] == [
        " continuing with 16",
        " continuing with 8",
    ]
    assert sizes[-1] == 8
