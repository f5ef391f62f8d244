"""Transfer: the surrogate's adversarials, whatever the attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import losses
from robust_jax.attacks import (
    autoattack,
    deepfool,
    fgsm,
    is_adversarial,
    jsma,
    pgd,
    run,
    transfer,
)
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


def test_what_is_wrong_already_is_led_to_its_target_too():
    network = make_nonlinear(KEY)
    x = jax.random.uniform(KEY, (12, 4, 5, 1))
    logits = network(x)
    y, targets = (jnp.argsort(logits)[:, i] for i in (0, 1))  # all are wrong, none at its target
    alone = pgd(network, x, y, KEY, eps=0.3, num_steps=5, targets=targets)
    shown = transfer(network, x, y, KEY, surrogate=network, eps=0.3, num_steps=5, targets=targets)
    assert is_adversarial(network, alone, y, targets=targets).any()
    np.testing.assert_array_equal(shown, alone)


@pytest.mark.parametrize("count", [2, 7])
def test_networks_of_other_classes_are_told(count):
    x, y = jnp.full((1, 4, 5, 1), 0.5), jnp.zeros(1, int)
    surrogate = make_nonlinear(KEY, num_classes=count)
    with pytest.raises(ValueError, match=f"surrogate has {count} classes and logits_fn 3"):
        transfer(make_nonlinear(KEY, num_classes=3), x, y, KEY, surrogate=surrogate, eps=0.1)


def test_run_takes_it_with_an_attack_of_its_own():
    network, surrogate = (make_nonlinear(jax.random.key(seed)) for seed in (0, 1))
    x = jax.random.uniform(KEY, (4, 4, 5, 1))
    y = jnp.argmax(network(x), -1)
    settings = {"surrogate": surrogate, "attack": fgsm, "eps": 0.1}
    found = run(transfer, network, x, y, KEY, norm="l2", **settings)
    expected = transfer(network, x, y, KEY, norm="l2", **settings)
    np.testing.assert_array_equal(found.x_adv, expected)


def test_autoattack_is_no_attack_to_transfer():
    x, y = jnp.full((1, 4, 5, 1), 0.5), jnp.zeros(1, int)
    for attack in (autoattack, functools.partial(autoattack, version=("apgd_ce",))):
        with pytest.raises(ValueError, match="call it with the surrogate, and show its x_adv"):
            transfer(
                make_nonlinear(KEY),
                x,
                y,
                KEY,
                surrogate=make_nonlinear(KEY),
                attack=attack,
                eps=0.1,
            )


def test_settings_may_be_the_attacks_own_defaults():
    network = make_nonlinear(KEY)
    x = jax.random.uniform(KEY, (3, 4, 5, 1))
    y = jnp.argmax(network(x), -1)
    call = functools.partial(transfer, network, x, y, KEY, surrogate=network, eps=0.1, num_steps=2)
    np.testing.assert_array_equal(call(step_size=None), call())


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
