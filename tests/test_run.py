"""`attacks.run`: success and distance beside the points, at one radius and at several."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import attacks
from tests.calls import ATTACKS, EPS, FEW
from tests.small_networks import KEY, examples, network, weights_of

NEAREST = ("fab", "carlini_wagner", "deepfool")


def run(name, eps, **keywords):
    x, y = examples()
    keywords = {**FEW.get(name, {}), **keywords}
    attack = attacks.ATTACKS[name]
    return attacks.run(attack, network(weights_of(0)), x, y, KEY, eps=eps, **keywords)


@pytest.mark.parametrize("name", ATTACKS)
def test_says_which_points_succeed_and_how_far_they_are(name):
    x, y = examples()
    f = network(weights_of(0))
    large = EPS.get(name, 0.1)
    several = run(name, (large / 2, large))
    assert several.x_adv.shape == (2, *x.shape) and several.success.shape == (2, 8)
    for i, eps in enumerate((large / 2, large)):
        alone = run(name, eps)
        for one, other in zip(alone, several, strict=True):
            np.testing.assert_array_equal(one, other[i])
        np.testing.assert_array_equal(alone.success, attacks.is_adversarial(f, alone.x_adv, y))
        assert np.isinf(alone.distance[~alone.success]).all()
        assert (alone.distance[alone.success] <= eps * (1 + 1e-5) + 1e-6).all()
        if name not in NEAREST:
            usual = functools.partial(attacks.ATTACKS[name], f, x, y, KEY, **FEW.get(name, {}))
            np.testing.assert_array_equal(alone.x_adv, usual(eps=eps))


@pytest.mark.parametrize("name", NEAREST)
def test_a_minimum_norm_attack_runs_once(name):
    radii = []

    def counted(*arguments, eps=jnp.inf, norm="l2", **keywords):
        radii.append(eps)
        return attacks.ATTACKS[name](*arguments, eps=eps, norm=norm, **keywords)

    x, y = examples()
    steps = {"num_steps": 50, "num_searches": 3} if name == "carlini_wagner" else FEW[name]
    radii_asked = (0.0, 0.2, 0.4, 9.0)
    found = attacks.run(counted, network(weights_of(0)), x, y, KEY, eps=radii_asked, **steps)
    assert radii == [np.inf]
    many = found.success.sum(-1)
    assert (jnp.diff(many) >= 0).all() and many[0] == 0 < many[-1]
    np.testing.assert_array_equal(found.x_adv[0], x)


def test_targets_and_mistakes():
    _, y = examples()
    targets = (y + 1) % 4
    found = run("pgd", 0.3, targets=targets, num_steps=20)
    x_adv = found.x_adv
    reached = network(weights_of(0))(x_adv).argmax(-1) == targets
    np.testing.assert_array_equal(found.success, reached)
    assert found.success.any()
    with pytest.raises(ValueError, match="eps is empty"):
        run("pgd", ())
    x, y = examples()
    f = network(weights_of(0))
    transferred = functools.partial(attacks.run, attacks.transfer, f, x, y, KEY, eps=0.3)
    with pytest.raises(ValueError, match="norm is None and the attack has none of its own"):
        transferred(surrogate=f, num_steps=2)
    assert transferred(surrogate=f, num_steps=2, norm="linf").success.any()

    def with_any_norm(*arguments, eps, norm):
        return attacks.pgd(*arguments, eps=eps, norm=norm, num_steps=2)

    with pytest.raises(ValueError, match="norm is None and the attack has none of its own"):
        attacks.run(with_any_norm, f, x, y, KEY, eps=0.3)
    with pytest.raises(ValueError, match="eps must not be negative, not -0.1"):
        run("pgd", (0.1, -0.1))
    for name, norm in (("deepfool", "linf"), ("carlini_wagner", "l2")):  # their default norms
        np.testing.assert_array_equal(run(name, 0.5).x_adv, run(name, 0.5, norm=norm).x_adv)
