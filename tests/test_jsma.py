"""JSMA: the pair against a full search, the path against numpy, the budget."""

import functools
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax.attacks import _jsma, distances, jsma
from robust_jax.attacks._jsma import most_salient_pair
from tests.linear import interior_images, make_linear, make_nonlinear

KEY = jax.random.key(0)


def best_pair(gain, cost, free, changed, budget):
    """The best pair by exhaustive search in float64; None where none is allowed."""
    best, best_saliency = None, 0.0
    for i, j in combinations(np.flatnonzero(free), 2):
        gains, costs = gain[i] + gain[j], cost[i] + cost[j]
        fits = (changed | np.isin(np.arange(len(gain)), (i, j))).sum() <= budget
        if fits and gains > 0 > costs and -gains * costs > best_saliency:
            best, best_saliency = {i, j}, -gains * costs
    return best


@pytest.mark.parametrize("pairs_at_once", [1, 20, 2**14])  # a row at a time, 2 of 9 rows, all
def test_pair_is_the_best_of_all_that_are_allowed(monkeypatch, rng, pairs_at_once):
    monkeypatch.setattr(_jsma, "_PAIRS_AT_ONCE", pairs_at_once)
    search = jax.jit(lambda *args: most_salient_pair(*args))  # a new function, so traced again
    outcomes = set()
    for _ in range(60):
        gain, cost = rng.normal(size=(2, 9)).astype(np.float32) + [[-0.5], [0.5]]
        free, changed = rng.random((2, 9)) < [[0.6], [0.3]]
        budget = float(rng.integers(0, 6))
        expected = best_pair(gain, cost, free, changed, budget)
        pair, found = search(
            jnp.asarray(gain, jnp.float32), jnp.asarray(cost, jnp.float32), free, changed, budget
        )
        assert bool(found) == (expected is not None)
        if found:
            assert set(np.asarray(pair).tolist()) == expected
        outcomes.add(bool(found))
    assert outcomes == {True, False}


def walk(weights, bias, x, y, target, eps, theta):
    """The attack on a linear model in numpy, float64; target None: the likeliest wrong class."""
    any_wrong, x_adv = target is None, x.copy()
    logits = weights @ x + bias
    if any_wrong:
        target = max((k for k in range(len(bias)) if k != y), key=lambda k: logits[k])
    sign = np.sign(theta)
    gain = sign * weights[target]
    cost = sign * (weights.sum(0) - weights[target])
    while True:
        top = np.argmax(weights @ x_adv + bias)
        if top != y if any_wrong else top == target:
            return x_adv
        pair = best_pair(gain, cost, x_adv < 1 if theta > 0 else x_adv > 0, x_adv != x, eps)
        if pair is None:
            return x_adv
        x_adv[list(pair)] = np.clip(x_adv[list(pair)] + theta, 0, 1)


@pytest.mark.parametrize(
    ("theta", "num_classes", "targeted"),
    [(1.0, 4, True), (1.0, 4, False), (-1.0, 4, False), (0.375, 2, True), (-1.0, 3, True)],
)
def test_takes_the_path_of_the_algorithm_on_a_linear_model(theta, num_classes, targeted):
    _, weights, _ = make_linear(KEY, (2, 3, 2), num_classes)
    weights = np.asarray(weights)
    bias = -weights.sum(1) / 2  # all classes alike at mid-grey

    @jax.jit
    def logits_fn(x):
        return x.reshape(len(x), -1) @ weights.T + bias

    # Multiples of 1/8, so that sums are exact; some are on the walls.
    x = np.asarray(jax.random.uniform(KEY, (10, 2, 3, 2)) * 8).round() / 8
    y = np.asarray(logits_fn(x)).argmax(-1)
    targets = (y + 1) % num_classes if targeted else None
    attack = jax.jit(lambda eps: jsma(logits_fn, x, y, KEY, eps=eps, theta=theta, targets=targets))
    reached = []
    for eps in (0, 2, 3, 4, 12):
        x_adv = np.asarray(attack(eps), np.float64)
        for i in range(10):
            expected = walk(
                np.asarray(weights, np.float64),
                np.asarray(bias, np.float64),
                np.asarray(x[i], np.float64).ravel(),
                int(y[i]),
                int(targets[i]) if targeted else None,
                eps,
                theta,
            )
            np.testing.assert_array_equal(x_adv[i].ravel(), expected)
        assert ((x_adv != x).sum((1, 2, 3)) <= eps).all()
        top = np.asarray(logits_fn(x_adv)).argmax(-1)
        reached.append(float((top == targets if targeted else top != y).mean()))
    assert reached == sorted(reached)
    assert reached[0] < reached[-1]


def test_any_wrong_class_will_do_where_no_target_is_given():
    """On the way to the likeliest wrong class, 1, another gets ahead of it."""
    bias, slope = jnp.array([5.0, 3.0, 2.5]), jnp.array([-2.0, 0.5, 1.0])
    x = jnp.zeros((1, 2, 3, 1))
    y = np.zeros(1, np.int32)

    def logits_fn(x):
        return bias + slope * x.sum((1, 2, 3))[:, None]

    free, bound = (
        jsma(logits_fn, x, y, KEY, eps=6, targets=targets) for targets in (None, jnp.array([1]))
    )
    assert (float(free.sum()), int(jnp.argmax(logits_fn(free)))) == (2, 2)
    assert (float(bound.sum()), int(jnp.argmax(logits_fn(bound)))) == (6, 2)


@functools.cache
def compiled(shape, num_classes):
    logits_fn = make_nonlinear(KEY, shape, num_classes)
    return jax.jit(lambda x, y, key, eps: jsma(logits_fn, x, y, key, eps=eps)), logits_fn


@pytest.mark.parametrize(("shape", "num_classes"), [((4, 5, 1), 3), ((1, 7, 2), 2), ((1, 1, 1), 2)])
def test_stays_in_budget_and_box_and_leaves_the_misclassified(shape, num_classes):
    attack, logits_fn = compiled(shape, num_classes)
    x = np.asarray(jax.random.uniform(KEY, (12, *shape)))
    y = np.asarray(jax.random.randint(KEY, (12,), 0, num_classes))
    wrong = np.asarray(logits_fn(x)).argmax(-1) != y
    for eps in (0.0, 1.0, 2.0, 5.0):
        x_adv = np.asarray(attack(x, y, KEY, eps))
        assert (x_adv >= 0).all()
        assert (x_adv <= 1).all()
        # With theta = 1 every changed pixel becomes 1, and changes come in pairs.
        assert (x_adv[x_adv != x] == 1).all()
        changed = np.asarray(distances(x, x_adv, norm="l0"))
        assert (changed <= eps).all()
        assert (changed % 2 == 0).all()
        np.testing.assert_array_equal(x_adv[wrong], x[wrong])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_budget_that_16_bits_do_not_hold_is_kept(dtype):
    x = jnp.zeros((1, 400), dtype)  # 391 pixels do not break it, since all 400 count

    def logits_fn(x):
        moved = x.astype(jnp.float32).sum(-1)
        return jnp.stack([399 - moved, moved - 399], -1)

    x_adv = jsma(logits_fn, x, jnp.zeros(1, int), KEY, eps=391, theta=1.0)
    assert (np.asarray(x_adv, np.float32) != 0).sum() == 390


@pytest.mark.parametrize("theta", [-0.001, 0.001])
def test_ends_where_a_step_is_too_small_for_16_bits(theta):
    x, y = jnp.asarray([[0.6, 0.7, 0.6, 0.6]], jnp.bfloat16), jnp.asarray([0 if theta < 0 else 1])

    def logits_fn(x):
        return jnp.stack([x.sum(-1), 3 - x.sum(-1)], -1)

    x_adv = jsma(logits_fn, x, y, jax.random.key(0), eps=4, theta=theta)
    np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"theta": 0.0}, r"theta must be in \[-1, 1\] and not 0, not 0.0"),
        ({"theta": -1.5}, "theta"),
    ],
)
def test_mistakes_are_told(keywords, message):
    logits_fn, _, _ = make_linear(KEY)
    x = np.asarray(interior_images(KEY, 2))
    with pytest.raises(ValueError, match=message):
        jsma(logits_fn, x, jnp.zeros(2, jnp.int32), KEY, **{"eps": 4, **keywords})
