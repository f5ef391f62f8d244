"""A mistake in a call is told in one line, by every public function."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import robust_jax
from robust_jax import attacks, jacobian, losses, margins
from robust_jax.analysis import features, surface
from tests.calls import (
    ALL,
    ATTACKS,
    FUNCTIONS,
    KEYLESS_NORMS,
    WITH_EPS,
    WITH_LABELS,
    WITHOUT_KEY,
    evaluate,
)
from tests.small_networks import (
    KEY,
    SHAPE,
    Nnx,
    around,
    convolution,
    examples,
    flax_nnx,
    linen,
    network,
    straight_through,
    weights_of,
)


class Module:
    """Looks like a module of PyTorch, which need not be installed."""

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
        "NaN on the device": ({"x": jnp.asarray(nan)}, r"x\w* holds NaN"),
        "0 to 255 on the device": (
            {"x": jnp.asarray(255 * x)},
            r"x\w* ranges over .*; pixels must be in \[0, 1\]",
        ),
        "one image": ({"x": x[0], "y": y[0]}, r"y has the shape \[\].*batch axis"),
        "no image": ({"x": x[:0], "y": y[:0]}, r"x\w* has the shape \[0, 3, 4, 1\]; give a batch"),
        "one-hot": ({"y": np.eye(4)[y]}, r"y has the shape \[8, 4\]; labels are integers \[B\]"),
        "a column": (
            {"y": y[:, None]},
            r"y has the shape \[8, 1\]; .* integers \[B\], not a column: y\[:, 0\]",
        ),
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
        "no classes": ({"logits_fn": lambda x: f(x)[:, 0]}, r"returns the shape \[1\] for a batch"),
        "one at a time": ({"logits_fn": lambda x: f(x[None])[0]}, r"the shape \[4\] .*jax.vmap\("),
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


# The energies that compare outputs if there are no labels.
LABEL_FREE = ("mean_square", "oscillation", "rise", "total_variation", "path")
RADII = {
    "text": ("8/255", "eps is '8/255'; give a number in pixel units, 8/255 without quotes"),
    "negative": (-0.1, "eps must not be negative"),
    "None": (None, "eps is None; give a number"),
    "NaN": (float("nan"), "eps must not be negative, not nan"),
}


CALLS = {**ALL, "evaluate": evaluate}


@pytest.mark.parametrize("mistake", mistakes())
def test_a_mistake_is_told_in_one_line(mistake):
    changes, message = mistakes()[mistake]
    x, y = examples()
    for name in (*WITH_LABELS, "autoattack", "audit", "evaluate"):
        arguments = {"logits_fn": network(weights_of(0)), "x": x, "y": y, "key": KEY, **changes}
        if name in WITHOUT_KEY and "key" in changes:
            continue
        if name in LABEL_FREE and "y" in changes and changes["y"] is None:
            continue
        with pytest.raises(ValueError, match=message) as caught:
            CALLS[name](*arguments.values())
        assert "\n" not in str(caught.value), name


WITHOUT_LABELS = [
    (name, mistake)
    for name in FUNCTIONS
    if name not in WITH_LABELS
    for mistake, (changes, _) in mistakes().items()
    if {"y", "eps"}.isdisjoint(changes) and not (name in KEYLESS_NORMS and "key" in changes)
    # A Jacobian may be taken at any pixels, and of a single output.
    if mistake not in ("0 to 255", "0 to 255 on the device", "a rounding error", "-1 to 1")
    and mistake not in ("one logit", "one at a time")
]


@pytest.mark.parametrize(("name", "mistake"), WITHOUT_LABELS)
def test_a_mistake_is_told_where_there_are_no_labels(name, mistake):
    changes, message = mistakes()[mistake]
    x, y = examples()
    arguments = {"logits_fn": network(weights_of(0)), "x": x, "y": y, "key": KEY, **changes}
    with pytest.raises(ValueError, match=message.removeprefix("logits_")) as caught:
        FUNCTIONS[name](*arguments.values())
    assert "\n" not in str(caught.value)


def scaled(scale, x):
    return scale * network(weights_of(0))(x)


def mean_cross_entropy(logits, labels):
    return losses.cross_entropy(logits, labels).mean()


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
    "a network of one example": (
        lambda: attacks.pgd(
            lambda x: convolution(0)(x[None])[0], *examples(), KEY, eps=0.1, num_steps=2
        ),
        r"takes one example of the shape \[3, 4, 1\] .* give jax.vmap\(logits_fn\)",
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
        "has no forward-mode derivative .*singular_values and frobenius_norm do not",
    ),
    "AutoAttack as an attack like others": (
        lambda: attacks.run(
            attacks.autoattack, network(weights_of(0)), *examples(), KEY, eps=(0.1, 0.2)
        ),
        "autoattack returns its own mask and distances",
    ),
    "shard_map as JAX has it": (
        lambda: jax.eval_shape(
            jax.shard_map(
                lambda x, y: FUNCTIONS["pgd"](network(weights_of(0)), x, y, KEY),
                mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
                in_specs=PartitionSpec("d"),
                out_specs=PartitionSpec("d"),
            ),
            *examples(),
        ),
        "need check_vma=False there",
    ),
    **{
        f"the mean of a loss, {name}": (
            lambda name=name: attacks.ATTACKS[name](
                network(weights_of(0)), *examples(), KEY, eps=0.1, loss=mean_cross_entropy
            ),
            r"loss returns the shape \[\]; it must return one number an example",
        )
        for name in ATTACKS
        if "loss" in inspect.signature(attacks.ATTACKS[name]).parameters
    },
    **{
        f"{keyword} of {attack}": (
            lambda attack=attack, keyword=keyword: attacks.autoattack(
                network(weights_of(0)),
                *examples(),
                KEY,
                eps=0.1,
                version=(attack,),
                overrides={attack: {keyword: -1}},
                progress=False,
            ),
            f"{keyword} must be a whole number of at least 1, not -1",
        )
        for attack, keyword in (
            ("apgd_ce", "num_restarts"),
            ("apgd_t", "num_targets"),
            ("fab", "num_restarts"),
            ("fab_t", "num_targets"),
        )
    },
    "no batch to audit in": (
        lambda: robust_jax.audit(network(weights_of(0)), *examples(), KEY, eps=0.1, batch_size=0),
        "batch_size must be a whole number of at least 1, not 0",
    ),
    "no chunk": (
        lambda: jacobian.frobenius_norm(network(weights_of(0)), examples()[0], chunk_size=0),
        "chunk_size must be a whole number of at least 1, not 0",
    ),
    "no draw": (
        lambda: attacks.apgd(network(weights_of(0)), *examples(), KEY, eps=0.1, eot_samples=0),
        "eot_samples must be a whole number of at least 1, not 0",
    ),
    "a mask of success where answers are random, bound": (
        lambda: attacks.run(
            functools.partial(attacks.apgd, eot_samples=2),
            lambda x, key: network(weights_of(0))(x),
            *examples(),
            KEY,
            eps=0.1,
        ),
        "call the attack directly, and judge its points over several keys",
    ),
    "a mask of success where answers are random": (
        lambda: attacks.run(
            attacks.apgd,
            lambda x, key: network(weights_of(0))(x),
            *examples(),
            KEY,
            eps=0.1,
            eot_samples=2,
        ),
        "call the attack directly, and judge its points over several keys",
    ),
    "bytes to measure": (
        lambda: attacks.distances(np.ones((1, 3), np.uint8), np.zeros((1, 3), np.uint8)),
        "x is uint8; pixels are floats",
    ),
    "a feature map": (
        lambda: jacobian.singular_values(lambda x: x**2, examples()[0]),
        r"fn returns the shape \[1, 3, 4, 1\] .*lambda x: fn\(x\).reshape\(len\(x\), -1\)",
    ),
    "other points on the way": (
        lambda: surface.loss_along(
            network(weights_of(0)), *examples(), examples()[0][:1], steps=(0.0, 1.0)
        ),
        r"x has the shape \[8, 3, 4, 1\] and x_moved \[1, 3, 4, 1\]; give as many points",
    ),
    "other points of a layer": (
        lambda: features.change(lambda x: {"x": x}, examples()[0], examples()[0][:, 1:]),
        r"x has the shape \[8, 3, 4, 1\] and x_moved \[8, 2, 4, 1\]; give as many points",
    ),
    "other points in a trace": (
        lambda: jax.jit(surface.random_direction)(*examples(), KEY),
        r"x_adv is int32; pixels are floats",
    ),
    "a direction of bytes": (
        lambda: surface.loss_surface(
            network(weights_of(0)),
            *examples(),
            examples()[0],
            np.zeros(examples()[0].shape, np.uint8),
            along_adversarial=(0.0,),
            along_direction=(0.0,),
        ),
        "direction is uint8; pixels are floats",
    ),
    **{
        f"{fn.__name__} at {ranks}": (
            lambda fn=fn, ranks=ranks: fn(
                network(weights_of(0)), *examples(), KEY, eps=0.1, num_steps=1, ranks=ranks
            ),
            r"ranks is \[.*\]; give one or more from 2, the likeliest wrong class, to 4",
        )
        for fn in (attacks.fab, attacks.apgd_targeted)
        for ranks in ([], [1], [2, 5])
    },
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


IN_A_TRACE = {
    "uint8": (lambda x, y: {"x": x.astype(jnp.uint8)}, r"x\w* is uint8; pixels are floats"),
    "one-hot": (lambda x, y: {"y": jax.nn.one_hot(y, 4)}, "not one-hot"),
    "float labels": (lambda x, y: {"y": y * 1.0}, "y is float.*; labels are integers from 0 on"),
    "too few": (lambda x, y: {"y": y[:3]}, r"y has the shape \[3\]; one label for each of the 8"),
    "a radius each": (lambda x, y: {"eps": x[:, 0, 0, 0]}, r"eps is an array .*under vmap, one"),
}


@pytest.mark.parametrize("mistake", IN_A_TRACE)
def test_shapes_and_types_are_looked_at_in_a_trace_too(mistake):
    changes, message = IN_A_TRACE[mistake]
    x, y = examples()

    def call(x, y, name):
        changed = {"x": x, "y": y, **changes(x, y)}
        x, y = changed.pop("x"), changed.pop("y")
        return FUNCTIONS[name](network(weights_of(0)), x, y, KEY, **changed)

    for name in WITH_EPS if mistake == "a radius each" else WITH_LABELS:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(call, name=name), x, y)


@pytest.mark.parametrize("mistake", RADII)
def test_a_radius_that_is_none_is_told_in_one_line(mistake):
    eps, message = RADII[mistake]
    x, y = examples()
    for name in (*WITH_EPS, "autoattack", "audit", "evaluate"):
        with pytest.raises(ValueError, match=message):
            CALLS[name](network(weights_of(0)), x, y, KEY, eps=eps)
