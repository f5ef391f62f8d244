"""Small networks trained on the embedded digits in a few seconds, as plain functions of x."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_jax import data, losses
from robust_jax.attacks import never, pgd

EPS = 0.1


@functools.cache
def test_points(count=200):
    """The first test images [N,8,8,1] in [0,1] and their labels."""
    test = data.load("digits", validation_size=100, seed=0).test
    return np.asarray(data.to_pixels(test.images[:count])), test.labels[:count]


@functools.cache
def trained(method="standard", seed=0, hidden=64, steps=400):
    """logits_fn of a ReLU network after standard, adversarial (linf EPS) or TRADES training."""
    train = data.load("digits", validation_size=100, seed=0).train
    images, labels = data.to_pixels(train.images), jnp.asarray(train.labels)
    one, two, key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w1": jax.random.normal(one, (64, hidden)) / 8,
        "b1": np.zeros(hidden, np.float32),
        "w2": jax.random.normal(two, (hidden, 10)) / hidden**0.5,
        "b2": np.zeros(10, np.float32),
    }
    keys = jax.random.split(key, steps)
    return functools.partial(network, jax.device_get(_train(params, images, labels, keys, method)))


@functools.partial(jax.jit, static_argnames="method")
def _train(params, images, labels, keys, method):
    """The parameters after one step for each key."""
    optimizer = optax.adam(3e-3)

    def objective(params, key):
        rows = jax.random.randint(key, (128,), 0, len(labels))
        x, y = images[rows], labels[rows]
        fn = functools.partial(network, params)
        if method == "standard":
            return losses.cross_entropy(fn(x), y).mean()
        frozen = functools.partial(network, jax.lax.stop_gradient(params))
        settings = {"eps": EPS, "num_steps": 5, "keep_best": False}
        if method == "trades":
            x_adv = pgd(frozen, x, frozen(x), key, loss=losses.kl, criterion=never, **settings)
            return (losses.cross_entropy(fn(x), y) + 4 * losses.kl(fn(x_adv), fn(x))).mean()
        return losses.cross_entropy(fn(pgd(frozen, x, y, key, **settings)), y).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def network(params, x):
    hidden = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


test_points.__test__ = False
