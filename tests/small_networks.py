"""Small networks for the calls of tests/calls.py, written in many ways, and examples for them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

KEY = jax.random.key(0)
SHAPE = (3, 4, 1)


def weights_of(seed, num_classes=4):
    one, two = jax.random.split(jax.random.key(seed))
    return jax.random.normal(one, (12, 8)), jax.random.normal(two, (8, num_classes))


def network(weights):
    """A new function at each call, as a user's lambda is."""
    return lambda x: jax.nn.relu(x.reshape(x.shape[0], -1) @ weights[0]) @ weights[1]


def examples(seed=0, count=8):  # one for each device
    x = jax.random.uniform(jax.random.key(seed), (count, *SHAPE), minval=0.2, maxval=0.8)
    return x, jnp.argmax(network(weights_of(0))(x), -1)


def chex_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, other)


def on_mesh(kind, *arrays, axes=("data",)):
    """The arrays on a mesh of eight devices, sharded along their first axis or replicated."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(*axes)))


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


@functools.cache
def linen_variables(seed):
    return jax.jit(Linen().init)(jax.random.key(seed), jnp.ones((1, *SHAPE)))


def linen(seed, train=False):
    model, variables = Linen(), linen_variables(seed)
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


@functools.cache
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


def in_loops(seed):
    """Jitted functions that close over weights, called where JAX does not hoist the weights."""
    scale = jnp.asarray(np.random.default_rng(seed).uniform(0.5, 1, SHAPE), jnp.float32)
    by_pixel = jax.jit(lambda x: scale * x)

    def first(x):
        x = jax.checkpoint(by_pixel)(x)
        x = jax.lax.scan(lambda z, _: (by_pixel(z), None), x, length=2)[0]
        return jax.lax.cond(x.sum() > 0, by_pixel, lambda x: x, x)

    return first


def prelu(weights, slope):
    """A network with a scalar weight."""

    def logits_fn(x):
        hidden = x.reshape(x.shape[0], -1) @ weights[0]
        return jnp.where(hidden > 0, hidden, slope * hidden) @ weights[1]

    return logits_fn


def outside():
    """A network outside JAX, without a gradient."""
    first, second = map(np.asarray, weights_of(0))

    def logits(x):
        return np.maximum(np.asarray(x).reshape(len(x), -1) @ first, 0) @ second

    return lambda x: jax.pure_callback(logits, jax.ShapeDtypeStruct((len(x), 4), jnp.float32), x)


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
    "jits in loops and branches": lambda seed: around(network(weights_of(seed)), in_loops(seed)),
    "custom_vjp": lambda seed: around(network(weights_of(seed)), straight_through),
    "PReLU": lambda seed: prelu(weights_of(seed), jnp.float32(0.1 + seed)),
    "jitted PReLU": lambda seed: jax.jit(prelu(weights_of(seed), jnp.float32(0.1 + seed))),
    "numpy weights": lambda seed: network(tuple(map(np.asarray, weights_of(seed)))),
}
