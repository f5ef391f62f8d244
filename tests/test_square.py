"""Square: patches within the image up to its edges, no gradients, any image shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_jax import losses
from robust_jax.attacks import NORMS, square
from robust_jax.attacks._square import _hill, _place, patch_sides
from robust_jax.attacks.norms import L1, L2, LINF
from tests.linear import (
    ORDERS,
    interior_images,
    make_linear,
    make_nonlinear,
    near_boundary,
    robust_accuracy,
    sizes,
)

KEY = jax.random.key(0)


@functools.cache
def compiled(norm, shape):
    logits_fn = make_nonlinear(KEY, shape)
    return jax.jit(
        lambda x, y, key, eps: square(logits_fn, x, y, key, eps=eps, norm=norm, num_queries=60)
    )


@pytest.mark.parametrize(
    ("norm", "shape"), [("linf", (1, 7, 2)), ("l2", (12, 7, 3)), ("l1", (1, 7, 2))]
)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(eps=st.floats(0, 3, width=32), seed=st.integers(0, 1000))
def test_stays_in_the_ball_and_the_box(norm, shape, eps, seed):
    key = jax.random.key(seed)
    rng = np.random.default_rng(seed)
    x, y = rng.random((4, *shape), np.float32), rng.integers(0, 3, 4)
    x_adv = np.asarray(compiled(norm, shape)(x, y, key, eps))
    assert x_adv.shape == x.shape
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    assert (sizes(x_adv, x, norm) <= eps * (1 + 1e-6)).all()


@pytest.mark.parametrize(("norm", "slack"), [("linf", 1.02), ("l2", 1.5), ("l1", 1.5)])
def test_breaks_a_network_without_gradients(norm, slack):
    """At a little more than the closed-form distance, and never below it."""
    linear, x, y, distance = near_boundary(3, norm)
    x, y, distance = x[:12], y[:12], distance[:12]

    def logits_fn(x):
        return jax.lax.stop_gradient(linear(x))

    @jax.jit
    @jax.vmap
    def attack(x, y, eps):
        # Restarts: on so few pixels a search in l2 may end where no window helps.
        return square(
            logits_fn, x[None], y[None], KEY, eps=eps, norm=norm, num_queries=750, num_restarts=4
        )[0]

    assert robust_accuracy(logits_fn, attack(x, y, 0.99 * distance), y) == 1
    assert robust_accuracy(logits_fn, attack(x, y, slack * distance), y) < 0.1


def test_needs_no_derivative_at_all():
    def logits_fn(x):
        out = jax.ShapeDtypeStruct((x.shape[0], 2), jnp.float32)
        return jax.pure_callback(host, out, x, vmap_method="expand_dims")

    def host(x):
        s = np.asarray(x).mean((-3, -2, -1))
        return np.stack([0.54 - s, 0 * s], -1).astype(np.float32)

    x = np.full((4, 6, 4, 1), 0.5, np.float32)
    y = np.zeros(4, np.int32)
    x_adv = square(logits_fn, x, y, KEY, eps=0.05, num_queries=200)
    assert robust_accuracy(logits_fn, x_adv, y) == 0


@pytest.mark.parametrize("shape", [(9, 5, 1), (5, 9, 1), (1, 1, 1)])
def test_windows_reach_every_edge_and_are_drawn_per_example(shape):
    keys = jax.random.split(KEY, 2000)
    for side in {1, min(shape[:2])}:
        corners = np.asarray(jax.vmap(lambda k, s=side: _place(k, s, shape))(keys))
        np.testing.assert_array_equal(corners.min(0), 0)
        np.testing.assert_array_equal(corners.max(0) + side, shape[:2])


def test_patches_shrink_as_in_the_paper_and_fit_any_image():
    sides = patch_sides((28, 28, 1), 0.8, 5000, LINF.patches)
    assert sides[[0, 10, 11, 50, 51, 4001]].tolist() == [25, 25, 18, 18, 13, 2]
    assert set(patch_sides((28, 28, 1), 0.8, 5000, L2.patches) % 2) == {1}
    assert patch_sides((8, 8, 1), 0.8, 5000, L1.patches).min() == 1
    for norm in NORMS.values():
        assert patch_sides((3, 40, 3), 1.0, 100, norm.patches).max() == 3
        assert patch_sides((1, 6, 1), 0.01, 10000, norm.patches).tolist() == [1] * 10000


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_hill_and_its_pit_have_norm_one_and_opposite_signs(norm):
    for side in (1, 2, 3, 5, 8):
        hill = _hill(side, NORMS[norm].patches)
        np.testing.assert_allclose(np.linalg.norm(hill.ravel(), ORDERS[norm]), 1, rtol=1e-6)
        assert (hill[: side // 2] > 0).all()
        assert (hill[side // 2 :] < 0).all()
    # The middle of the lower half of 5×5 is its highest: 1 + 1/4 + 1/9 against 1/4 + 1/9 in l2.
    k = np.arange(1.0, 4) ** {"l2": -2, "l1": -4}[norm]
    hill = _hill(5, NORMS[norm].patches)
    np.testing.assert_allclose(hill[3, 2] / hill[3, 1], k.sum() / k[1:].sum(), rtol=1e-5)


def test_more_queries_never_hurt():
    logits_fn = make_nonlinear(jax.random.key(4))
    x = np.asarray(jax.random.uniform(KEY, (100, 4, 5, 1)))
    y = np.asarray(logits_fn(x)).argmax(-1)
    values = []
    for num_queries in (1, 20, 200):
        x_adv = square(logits_fn, x, y, KEY, eps=0.05, num_queries=num_queries)
        values.append(np.asarray(losses.margin(logits_fn(x_adv), y)))
    # The keys are the same, so a longer search begins like the shorter one.
    assert (values[1] <= values[0] + 1e-5).all()
    assert ((values[2] <= values[1] + 1e-5) | (values[1] < 0)).all()
    assert (values[2] < 0).sum() > (values[0] < 0).sum()


def test_restarts_and_targets():
    logits_fn = make_nonlinear(jax.random.key(4))
    x = np.asarray(jax.random.uniform(KEY, (100, 4, 5, 1)))
    y = np.asarray(logits_fn(x)).argmax(-1)
    attack = functools.partial(square, logits_fn, x, y, KEY, eps=0.05, num_queries=20)
    one, three = (
        np.asarray(losses.margin(logits_fn(attack(**restarts)), y))
        for restarts in ({}, {"num_restarts": 3})
    )
    assert ((three <= one + 1e-5) | (three < 0)).all()  # the same first search
    assert (three < 0).sum() > (one < 0).sum()
    targets = (y + 1) % 3
    before, after = (
        np.asarray(losses.margin(logits_fn(z), targets)) for z in (x, attack(targets=targets))
    )
    assert (after >= before).all()
    assert ((before < 0) & (after > 0)).sum() > 5


def test_a_start_of_nan_is_left_for_a_number():
    x = jnp.full((8, 6, 6, 1), 0.5)

    def logits_fn(x):  # NaN where the first pixel rises; else class 1 at a low mean
        gap = 5 * (0.44 - x.mean((1, 2, 3)))
        logits = jnp.stack([-gap, gap], -1)
        return jnp.where((x[:, 0, 0, 0] > 0.5)[:, None], jnp.nan, logits)

    one = jnp.ones(8, int)
    x_adv = square(logits_fn, x, 1 - one, KEY, eps=0.1, num_queries=300, targets=one)
    assert (logits_fn(x_adv).argmax(-1) == 1).all()


def test_mistakes_are_told():
    logits_fn, _, _ = make_linear(KEY)
    x = np.asarray(interior_images(KEY, 2))
    with pytest.raises(ValueError, match=r"p_init must be in \(0, 1\], not 0"):
        square(logits_fn, x, jnp.zeros(2, jnp.int32), KEY, eps=0.1, p_init=0)
