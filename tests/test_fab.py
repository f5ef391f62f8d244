"""FAB: the distances of linear models, projections against brute force, few classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robust_jax.attacks import NORMS, fab
from tests.linear import (
    DUAL_ORDERS,
    interior_images,
    make_linear,
    make_nonlinear,
    near_boundary,
    nearest,
    robust_accuracy,
    sizes,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("num_classes", "num_targets", "norm"),
    [(2, 9, "linf"), *((5, targets, norm) for targets in (9, None) for norm in NORMS)],
)
def test_finds_the_closed_form_distance_of_a_linear_model(num_targets, norm, num_classes):
    logits_fn, x, y, distance = near_boundary(num_classes, norm)
    found = nearest(fab, logits_fn, x, y, KEY, norm=norm, num_targets=num_targets)
    assert robust_accuracy(logits_fn, found.x_adv, y) == 0
    np.testing.assert_allclose(sizes(found.x_adv, x, norm), found.distance, rtol=1e-5)
    assert (np.asarray(found.distance) >= distance * (1 - 1e-4)).all()
    assert (np.asarray(found.distance) <= distance * 1.01).all()


@functools.cache
def projection(norm):
    return jax.jit(NORMS[norm].to_boundary)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(6))
def test_projection_is_the_nearest_point_of_the_plane_in_the_box(norm, seed):
    """Against linear programming (linf, l1) and a general solver (l2)."""
    rng = np.random.default_rng(seed)
    x, w = rng.uniform(0, 1, 6), rng.normal(size=6) * np.array([1, 1, 1, 1, 0, 0.1])
    reach = sum(max(-wi * xi, wi * (1 - xi)) for wi, xi in zip(w, x, strict=True))
    value = -rng.uniform(0.3, 0.95) * reach
    image, direction = (np.float32(a).reshape(2, 3, 1) for a in (x, w))
    delta = projection(norm)(image, np.float32(value), direction)
    delta = np.asarray(delta, np.float64).ravel()
    np.testing.assert_allclose(value + w @ delta, 0, atol=1e-5)
    assert (x + delta > -1e-6).all()
    assert (x + delta < 1 + 1e-6).all()
    if norm == "linf":  # minimise t with -t <= delta <= t
        tied = np.vstack([np.c_[np.eye(6), -np.ones(6)], np.c_[-np.eye(6), -np.ones(6)]])
        best = optimize.linprog(
            [0] * 6 + [1],
            tied,
            np.zeros(12),
            [[*w, 0]],
            [-value],
            [*zip(-x, 1 - x, strict=True), (0, None)],
        ).fun
        np.testing.assert_allclose(np.abs(delta).max(), best, rtol=1e-4)
    elif norm == "l1":  # minimise the sum of the moves up and down
        best = optimize.linprog(
            np.ones(12), A_eq=[[*w, *-w]], b_eq=[-value], bounds=[(0, r) for r in [*(1 - x), *x]]
        ).fun
        np.testing.assert_allclose(np.abs(delta).sum(), best, rtol=1e-4)
    else:
        best = optimize.minimize(
            lambda d: d @ d,
            np.zeros(6),
            method="SLSQP",
            bounds=[*zip(-x, 1 - x, strict=True)],
            constraints={"type": "eq", "fun": lambda d: value + w @ d},
            options={"ftol": 1e-12, "maxiter": 500},
        ).fun
        np.testing.assert_allclose(delta @ delta, best, rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_out_of_reach_goes_as_far_as_the_box_allows(norm):
    x = np.full((2, 3, 1), 0.25, np.float32)
    w = np.float32([1.0, -1.0, 2.0, 0.0, 0.0, 0.0]).reshape(2, 3, 1)
    delta = np.asarray(projection(norm)(x, np.float32(-10.0), w))
    np.testing.assert_allclose(delta.ravel(), [0.75, -0.25, 0.75, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(projection(norm)(x, np.float32(1.0), 0 * w), 0 * x)


def test_points_that_cannot_be_broken_or_already_are():
    x = np.asarray(interior_images(KEY, 3))

    def constant(x):
        return jnp.tile(jnp.array([1.0, 0.0, 0.0]), (x.shape[0], 1))

    found = nearest(fab, constant, x, jnp.array([0, 1, 0]), KEY, num_steps=3)
    np.testing.assert_array_equal(found.x_adv, x)
    np.testing.assert_array_equal(found.distance, [np.inf, 0, np.inf])


def test_restarts_targets_and_ranks_only_help():
    logits_fn = make_nonlinear(KEY, num_classes=6)
    x = np.asarray(jax.random.uniform(KEY, (20, 4, 5, 1)))
    y = jnp.asarray(logits_fn(x)).argmax(-1)
    search = functools.partial(nearest, fab, logits_fn, x, y, KEY, norm="l2", num_steps=15)
    one, every, restarted = (
        np.asarray(search(**keywords).distance)
        for keywords in ({"num_targets": 1}, {}, {"num_targets": 1, "num_restarts": 3})
    )
    assert (every <= one * (1 + 1e-5)).all()
    assert (restarted <= one * (1 + 1e-5)).all()
    assert (restarted < one * (1 - 1e-5)).any()
    at_rank = jax.jit(lambda rank: search(ranks=rank[None]).distance)
    apart = [at_rank(rank) for rank in np.arange(2, 7)]
    np.testing.assert_allclose(np.min(apart, 0), every, rtol=1e-4)


def test_a_flag_may_be_a_number():
    x = interior_images(KEY, 2)
    search = functools.partial(fab, make_linear(KEY)[0], eps=0.1, num_steps=1, random_start=0.0)
    assert jax.eval_shape(search, x, jnp.zeros(2, int), KEY).shape == x.shape


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_target_of_its_own_is_reached_where_it_is_nearest(norm):
    """With three linear classes, the target beats both others at the larger of two distances."""
    logits_fn, weights, _ = make_linear(KEY)
    x = np.asarray(interior_images(KEY, 30))
    logits, weights = np.asarray(logits_fn(x)), np.asarray(weights)
    y, targets = logits.argmax(-1), logits.argsort(-1)[:, 1]
    found = nearest(fab, logits_fn, x, y, KEY, norm=norm, num_steps=100, targets=targets, eps=1.0)
    reached = np.isfinite(found.distance)
    assert reached.sum() > 5
    np.testing.assert_array_equal(
        np.asarray(logits_fn(found.x_adv)).argmax(-1)[reached], targets[reached]
    )
    apart = weights[targets][:, None] - weights  # [30,3,D]
    dual = np.linalg.norm(apart, DUAL_ORDERS[norm], axis=-1)
    gaps = logits - logits[np.arange(30), targets][:, None]
    least = np.where(dual > 0, gaps / np.maximum(dual, 1e-9), 0).max(1)
    distance = np.asarray(found.distance)
    assert (distance[reached] >= least[reached] * (1 - 1e-4)).all()
    assert np.median(distance[reached] / least[reached]) < 1.1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"alpha_max": 1.5}, r"alpha_max must be in \(0, 1\], not 1.5"),
        ({"beta": 0}, "beta"),
        ({"eta": 0.9}, "eta must be at least 1, not 0.9"),
    ],
)
def test_mistakes_are_told(keywords, message):
    logits_fn, _, _ = make_linear(KEY)
    x = np.asarray(interior_images(KEY, 2))
    with pytest.raises(ValueError, match=message):
        fab(logits_fn, x, jnp.zeros(2, jnp.int32), KEY, **{"eps": 0.1, **keywords})
