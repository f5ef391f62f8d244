"""Carlini-Wagner and DeepFool: the distances of linear models, walls, targets, confidence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robust_jax.attacks import carlini_wagner, deepfool
from tests.linear import (
    interior_images,
    make_linear,
    make_nonlinear,
    margin,
    near_boundary,
    nearest,
    robust_accuracy,
    sizes,
)

KEY = jax.random.key(0)
ATTACKS = {"carlini_wagner": carlini_wagner, "deepfool": deepfool}
nearest_carlini_wagner = functools.partial(nearest, carlini_wagner, norm="l2")
QUICK = {"carlini_wagner": {"num_steps": 60, "num_searches": 6}, "deepfool": {}}
KINDS = [("carlini_wagner", "l2"), ("deepfool", "l2"), ("deepfool", "linf")]


@pytest.mark.parametrize("num_classes", [2, 5])
def test_carlini_wagner_finds_the_distance_of_a_linear_model(num_classes):
    logits_fn, x, y, distance = near_boundary(num_classes, "l2")
    # Some points are nearer than one Adam step at the default learning rate.
    found = nearest_carlini_wagner(
        logits_fn, x, y, KEY, num_steps=600, num_searches=14, learning_rate=1e-3
    )
    assert robust_accuracy(logits_fn, found.x_adv, y) == 0
    np.testing.assert_allclose(sizes(found.x_adv, x, "l2"), found.distance, rtol=1e-5)
    assert (np.asarray(found.distance) >= distance * (1 - 1e-4)).all()
    # It pursues the likeliest wrong class, so it may settle though another boundary is nearer.
    settled = np.asarray(found.distance) > distance * 1.02
    assert settled.mean() <= (0.1 if num_classes > 2 else 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("num_classes", "num_targets", "overshoot"),
    [(2, 9, 0.02), (5, 9, 0.0), (5, None, 0.0), (5, None, 0.02)],
)
def test_deepfool_oversteps_the_distance_of_a_linear_model(
    norm, num_classes, num_targets, overshoot
):
    logits_fn, x, y, distance = near_boundary(num_classes, norm)
    found = nearest(
        deepfool, logits_fn, x, y, KEY, norm=norm, num_targets=num_targets, overshoot=overshoot
    )
    assert robust_accuracy(logits_fn, found.x_adv, y) == 0
    np.testing.assert_allclose(sizes(found.x_adv, x, norm), found.distance, rtol=1e-5)
    np.testing.assert_allclose(found.distance, (1 + overshoot) * distance, rtol=0.01)


def test_deepfool_is_its_recurrence_on_a_curved_network():
    """Compares with Newton's method in float64 NumPy on one pixel, where all norms are the same."""

    def logits_fn(x):
        s = x[:, 0, 0, 0]
        return jnp.stack([jnp.ones_like(s), jnp.sqrt(5 * s), 0 * s], -1)

    x = jnp.array([0.001, 0.01, 0.05]).reshape(3, 1, 1, 1)
    y = np.zeros(3, np.int32)
    expected, steps = [], []
    for s in np.asarray(x, np.float64).ravel():
        steps.append(0)
        while np.sqrt(5 * s) <= 1:
            s += 1.02 * ((1 - np.sqrt(5 * s)) / (5 / (2 * np.sqrt(5 * s))) + 1e-5)
            steps[-1] += 1
        expected.append(s)
    for norm, num_steps in (("linf", min(steps)), ("linf", 20), ("l2", 20)):
        found = nearest(deepfool, logits_fn, x, y, KEY, norm=norm, num_steps=num_steps)
        there = np.array(steps) <= num_steps
        np.testing.assert_array_equal(np.isfinite(found.distance), there)
        np.testing.assert_allclose(
            found.x_adv.ravel(), np.where(there, expected, x.ravel()), rtol=1e-5
        )
    assert len({*steps}) > 1


@pytest.mark.parametrize("wall", [0.0, 1.0])
def test_carlini_wagner_moves_pixels_off_the_walls(wall):
    """All of x lies on a wall; the nearest boundary is straight into the box."""
    weights = jax.random.uniform(KEY, (20,), minval=0.2) * (1 - 2 * wall)
    x = np.full((2, 4, 5, 1), wall, np.float32)
    distance = 0.8

    def logits_fn(x):
        s = (x - wall).reshape(len(x), -1) @ weights - distance * jnp.linalg.norm(weights)
        return jnp.stack([-s, s], -1)

    y = np.zeros(2, np.int32)
    found = nearest_carlini_wagner(logits_fn, x, y, KEY, num_steps=200)
    assert robust_accuracy(logits_fn, found.x_adv, y) == 0
    np.testing.assert_allclose(found.distance, distance, rtol=0.01)


def test_carlini_wagner_reaches_walls_that_are_on_the_way():
    """Compares with a general solver where several pixels are exactly 1 at the boundary."""
    weights = np.array([5.0, 4.0, 1.0, 0.5])
    x = np.array([0.6, 0.7, 0.3, 0.0])

    def logits_fn(images):
        s = images.reshape(len(images), -1) @ jnp.asarray(weights, jnp.float32) - 10.0
        return jnp.stack([-s, s], -1)

    best = optimize.minimize(
        lambda d: d @ d,
        np.zeros(4),
        method="SLSQP",
        bounds=[*zip(-x, 1 - x, strict=True)],
        constraints={"type": "ineq", "fun": lambda d: weights @ (x + d) - 10},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    image = jnp.asarray(x, jnp.float32).reshape(1, 2, 2, 1)
    found = nearest_carlini_wagner(
        logits_fn, image, jnp.array([0]), KEY, num_steps=400, num_searches=14
    )
    np.testing.assert_allclose(found.distance, np.sqrt(best.fun), rtol=0.01)
    np.testing.assert_array_equal(found.x_adv.ravel()[:2], 1.0)


def test_carlini_wagner_is_misclassified_by_the_margin_asked_for():
    logits_fn, weights, _ = make_linear(KEY, num_classes=2)
    weights, x = np.asarray(weights), interior_images(KEY, 6)
    y = np.asarray(logits_fn(x)).argmax(-1)
    kappa = 2.0
    found = nearest_carlini_wagner(
        logits_fn, x, y, KEY, kappa=kappa, num_steps=300, num_searches=12
    )
    assert (margin(logits_fn(found.x_adv), y) <= -kappa + 1e-4).all()
    apart = np.linalg.norm(np.subtract(*weights))
    distance = (margin(logits_fn(x), y) + kappa) / apart
    np.testing.assert_allclose(found.distance, distance, rtol=0.01)
    # A point that is misclassified by too little moves; one misclassified by more stays.
    for change, stays in ((1, False), (-1, True)):
        again = carlini_wagner(logits_fn, found.x_adv, y, KEY, kappa=kappa + change, num_steps=300)
        assert (np.all(np.asarray(again) == found.x_adv, (1, 2, 3)) == stays).all()


def test_carlini_wagner_goes_to_its_targets():
    """Compares with a general solver for the nearest point where the target's logit is largest."""
    logits_fn, weights, bias = make_linear(KEY, num_classes=4)
    weights, bias, x = (np.asarray(a) for a in (weights, bias, interior_images(KEY, 4)))
    y = np.asarray(logits_fn(x)).argmax(-1)
    targets = (y + 1 + np.arange(4) % 3) % 4
    found = nearest_carlini_wagner(
        logits_fn, x, y, KEY, targets=targets, num_steps=1000, num_searches=12
    )
    np.testing.assert_array_equal(np.asarray(logits_fn(found.x_adv)).argmax(-1), targets)
    for image, target, distance in zip(x, targets, found.distance, strict=True):
        point = np.asarray(image, np.float64).ravel()
        gaps = np.asarray(weights[target] - weights, np.float64)
        gaps_at_0 = np.asarray(bias[target] - bias, np.float64)
        best = optimize.minimize(
            lambda d: d @ d,
            np.full(20, 1e-3),
            jac=lambda d: 2 * d,
            method="SLSQP",
            bounds=[*zip(-point, 1 - point, strict=True)],
            constraints={
                "type": "ineq",
                "jac": lambda d, g=gaps: g,
                "fun": lambda d, p=point, g=gaps, b=gaps_at_0: g @ (p + d) + b,
            },
            options={"ftol": 1e-12, "maxiter": 500},
        )
        np.testing.assert_allclose(distance, np.sqrt(best.fun), rtol=0.01)
    # An example already at its target is its own nearest point, whatever its label.
    there = nearest_carlini_wagner(logits_fn, x, targets, KEY, targets=y, num_steps=5)
    np.testing.assert_array_equal(there.distance, 0)


@functools.cache
def compiled(name, norm, shape, num_classes):
    """attack(x, y, key, eps), which also returns its distance, and the network."""
    logits_fn = jax.jit(make_nonlinear(KEY, shape, num_classes))

    def attack(x, y, key, eps):
        return nearest(ATTACKS[name], logits_fn, x, y, key, norm=norm, eps=eps, **QUICK[name])

    return jax.jit(attack), logits_fn


@pytest.mark.parametrize(("name", "norm"), KINDS)
@pytest.mark.parametrize(
    ("shape", "num_classes", "batch_size"), [((4, 5, 1), 6, 12), ((1, 7, 2), 2, 1)]
)
def test_is_inside_the_box_and_within_eps_or_unchanged(name, norm, shape, num_classes, batch_size):
    x = np.asarray(jax.random.uniform(KEY, (batch_size, *shape))).round(1)  # some on the walls
    attack, logits_fn = compiled(name, norm, shape, num_classes)
    wrong = np.arange(batch_size) % 4 == 1
    y = (np.asarray(logits_fn(x)).argmax(-1) + wrong) % num_classes
    found = jax.device_get(attack(x, y, KEY, np.inf))
    assert found.x_adv.shape == x.shape
    assert (found.x_adv >= 0).all()
    assert (found.x_adv <= 1).all()
    np.testing.assert_allclose(sizes(found.x_adv, x, norm), found.distance, rtol=1e-5)
    wrong_before, wrong_after = (np.asarray(logits_fn(z)).argmax(-1) != y for z in (x, found.x_adv))
    assert wrong_after.all()
    np.testing.assert_array_equal(found.distance == 0, wrong_before)
    eps = float(np.median(found.distance))
    assert eps > 0
    x_adv = np.asarray(attack(x, y, KEY, eps).x_adv)
    near = found.distance <= eps
    np.testing.assert_array_equal(x_adv, np.where(near[:, None, None, None], found.x_adv, x))
    assert (sizes(x_adv, x, norm) <= eps * (1 + 1e-6)).all()


@pytest.mark.parametrize(("name", "norm"), KINDS)
def test_points_that_cannot_be_broken_or_already_are(name, norm):
    x = np.asarray(interior_images(KEY, 3))
    for slope in (np.zeros(1), np.full(1, np.nan)):  # arrays, so that one program serves both
        flat = with_gradient(slope, lambda x: jnp.tile(np.float32([1, 0, 0]), (len(x), 1)))
        found = nearest(ATTACKS[name], flat, x, jnp.array([0, 1, 0]), KEY, norm=norm, **QUICK[name])
        np.testing.assert_array_equal(found.x_adv, x)
        np.testing.assert_array_equal(found.distance, [np.inf, 0, np.inf])


@pytest.mark.parametrize(("name", "norm"), KINDS)
def test_a_pixel_whose_gradient_is_nan_stays_while_others_move(name, norm):
    slope = np.ones((4, 5, 1), np.float32)
    slope[1, 2] = np.nan
    one, two = np.float32([1, 0, -9]), np.float32([0, 1, 0])
    net = with_gradient(slope, lambda x: one + two * (x - 0.55).sum((1, 2, 3))[:, None])
    x = np.asarray(interior_images(KEY, 3))
    found = nearest(ATTACKS[name], net, x, jnp.zeros(3, jnp.int32), KEY, norm=norm, **QUICK[name])
    assert robust_accuracy(net, found.x_adv, jnp.zeros(3, jnp.int32)) == 0
    moved = np.any(np.asarray(found.x_adv) != x, 0)
    np.testing.assert_array_equal(moved, np.isfinite(slope))


def with_gradient(slope, fn):
    """fn, except that the derivative of class 1 is declared to be slope [H,W,C]."""

    @jax.custom_jvp
    def logits_fn(x):
        return fn(x)

    @logits_fn.defjvp
    def _(primals, tangents):
        change = (slope * tangents[0]).sum((1, 2, 3))
        return fn(*primals), change[:, None] * np.float32([0, 1, 0])

    return logits_fn


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("carlini_wagner", {"learning_rate": 0}, "learning_rate must be positive, not 0"),
        ("carlini_wagner", {"initial_c": -1.0}, "initial_c must be positive, not -1.0"),
        ("carlini_wagner", {"kappa": -1.0}, "kappa must not be negative, not -1.0"),
        ("deepfool", {"overshoot": -0.1}, "overshoot must not be negative, not -0.1"),
    ],
)
def test_mistakes_are_told(name, keywords, message):
    logits_fn, _, _ = make_linear(KEY)
    x = np.asarray(interior_images(KEY, 2))
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](logits_fn, x, jnp.zeros(2, jnp.int32), KEY, **{"eps": 0.1, **keywords})
