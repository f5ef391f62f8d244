"""Transfer: the surrogate's adversarials, whatever the attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax import losses
from robust_jax.attacks import deepfool, jsma, pgd, transfer
from tests.linear import make_nonlinear

KEY = jax.random.key(0)


def test_shows_the_surrogates_adversarials_where_there_is_something_to_break():
    network, surrogate = (make_nonlinear(jax.random.key(seed)) for seed in (0, 1))
    x = jax.random.uniform(KEY, (40, 4, 5, 1))
    y = jnp.argmax(surrogate(x), -1)
    right = np.asarray(losses.correct(network(x), y)).astype(bool)
    assert 5 < right.sum() < 35

    @jax.custom_jvp
    def black_box(x):
        return network(x)

    @black_box.defjvp
    def _(primals, tangents):
        raise AssertionError("the network is not to be differentiated")

    for attack, keywords in (
        (pgd, {"eps": 0.1, "norm": "l2", "num_steps": 4}),
        (functools.partial(deepfool, overshoot=0.1), {"eps": 0.5}),
        (jsma, {"eps": 4.0}),
    ):
        x_adv = transfer(black_box, x, y, KEY, surrogate=surrogate, attack=attack, **keywords)
        expected = attack(surrogate, x, y, KEY, **keywords)
        np.testing.assert_array_equal(x_adv[right], expected[right])
        np.testing.assert_array_equal(x_adv[~right], x[~right])
        assert (x_adv[right] != x[right]).any()


def test_a_network_is_its_own_best_surrogate():
    network, other = (make_nonlinear(jax.random.key(seed)) for seed in (0, 1))
    x = jax.random.uniform(KEY, (100, 4, 5, 1))
    y = jnp.argmax(network(x), -1)
    held = {
        name: float(
            losses.correct(
                network(transfer(network, x, y, KEY, surrogate=surrogate, eps=0.1)), y
            ).mean()
        )
        for name, surrogate in (("itself", network), ("other", other))
    }
    assert held["itself"] < held["other"]
