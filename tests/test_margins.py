"""Margins: exact for a linear network; which regularisers of them are Fisher-consistent."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from robust_jax import attacks, jacobian, losses, margins
from robust_jax.attacks import NORMS
from robust_jax.train import regularizers
from tests.linear import interior_images, make_linear, make_nonlinear

KEY = jax.random.key(0)
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


@pytest.mark.parametrize("norm", DUAL)
def test_distances_to_a_linear_networks_boundaries_are_exact(norm):
    logits_fn, weights, _ = make_linear(KEY, num_classes=4)
    x, y = interior_images(KEY, 6), np.arange(6) % 4
    logits, w = (np.asarray(a, np.float64) for a in (logits_fn(x), weights))
    got = np.asarray(margins.boundary_distances(logits_fn, x, y, norm=norm))
    for i in range(6):
        others = [j for j in np.argsort(-logits[i]) if j != y[i]]
        expected = [
            (logits[i, y[i]] - logits[i, j]) / np.linalg.norm(w[y[i]] - w[j], DUAL[norm])
            for j in others
        ]
        np.testing.assert_allclose(got[i], expected, rtol=1e-4)
    least = np.asarray(margins.first_order(logits_fn, x, y, norm=norm))
    np.testing.assert_array_equal(least, got.min(-1))
    # Negative exactly where the label does not win.
    np.testing.assert_array_equal(least > 0, logits.argmax(-1) == y)


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_network_is_on_the_boundary_at_that_distance(norm):
    logits_fn, weights, _ = make_linear(KEY, num_classes=2)
    weights, x = np.asarray(weights), interior_images(KEY, 5)
    y = np.argmax(logits_fn(x), -1)
    towards = weights[1 - y] - weights[y]
    step = np.asarray(jax.jit(jax.vmap(NORMS[norm].steepest))(towards)).reshape(x.shape)
    distance = np.asarray(margins.first_order(logits_fn, x, y, norm=norm))
    at = np.asarray(x) + distance[:, None, None, None] * step
    np.testing.assert_allclose(np.subtract(*logits_fn(at).T), np.zeros(5), atol=1e-4)


def test_slopes_are_those_of_the_exact_jacobian():
    logits_fn = make_nonlinear(KEY, num_classes=5)
    x, y = interior_images(KEY, 6), jnp.arange(6) % 5
    got = margins.boundary_distances(logits_fn, x, y, num_boundaries=2)
    assert got.shape == (6, 2)
    rows = np.asarray(jacobian.jacobian(logits_fn, x), np.float64).reshape(6, 5, -1)
    logits = np.asarray(logits_fn(x), np.float64)
    for i in range(6):
        for n, j in enumerate([j for j in np.argsort(-logits[i]) if j != y[i]][:2]):
            slope = np.abs(rows[i, y[i]] - rows[i, j]).sum()
            expected = (logits[i, y[i]] - logits[i, j]) / slope
            np.testing.assert_allclose(got[i, n], expected, rtol=1e-3)
    alone = margins.boundary_distances(logits_fn, x[2:3], y[2:3], num_boundaries=2)
    np.testing.assert_allclose(alone[0], got[2], rtol=1e-5)


@pytest.mark.parametrize("norm", DUAL)
def test_a_flat_network_has_no_boundary_near_and_pulls_nothing(norm):
    """The first example is right, the second wrong, the third on the boundary."""
    logits = jnp.asarray([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])

    @jax.jit
    def term(scale):
        def logits_fn(x):
            which = (2 * x[:, 0, 0, 0]).astype(int)
            return logits[which] + scale * x.sum((1, 2, 3))[:, None] * jnp.arange(3.0)

        images = jnp.broadcast_to(jnp.array([0.0, 0.5, 1.0])[:, None, None, None], (3, 2, 2, 1))
        half = regularizers.Half(images, logits)
        labels = jnp.zeros(3, jnp.int32)
        return regularizers.input_margin(logits_fn, half, labels, norm=norm, tau=0.1)

    np.testing.assert_allclose(term(0.0), [0.0, 1.0, 2 / 3], atol=1e-6)
    np.testing.assert_array_equal(jax.jacrev(term)(0.0), np.zeros(3))


@jax.jit
def truncated(distances, tau):
    return jax.value_and_grad(lambda d: margins.truncate(d[None], tau)[0])(distances)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(*[st.floats(-1, 1)] * 3), st.floats(0.2, 2), st.floats(0.05, 1))
def test_truncation_is_bounded_falls_strictly_and_is_near_the_hard_one(values, tau, step):
    for distances in (values, values[:1]):
        value, gradient = truncated(np.float32(distances), tau)
        least, slack = min(distances), tau * np.log(len(distances))
        assert 0 < value < 1
        assert expit(-least / tau) - 1e-5 <= value <= expit((slack - least) / tau) + 1e-5
        assert (gradient < 0).all()
        assert np.abs(gradient).sum() <= 0.25 / tau + 1e-5
        assert truncated(np.float32(distances) + np.float32(step), tau)[0] < value


def test_truncation_lets_go_of_safe_and_of_hopeless_examples():
    gradient = jax.jit(jax.vmap(jax.grad(lambda d: margins.truncate(d[None], 0.1)[0])))
    far = jnp.array([[np.inf, np.inf], [-np.inf, 0], [7000, 7000]])
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        assert jnp.isfinite(gradient(far.astype(dtype))).all()
    pull = np.abs(gradient(np.float32([[-3, 1], [0, 1], [3, 4]]))).sum(-1)
    assert pull[1] > 2
    assert (pull[[0, 2]] < 1e-6).all()


def minimisers(p, weight, num_boundaries):
    """The lowest logits [N,K] of Σ_k p_k (CE_k + weight·ψ_k) for class probabilities p [N,K].

    The logits are a table. With one input for each class, the difference of any two logits
    has a gradient of norm 1.
    """
    num_classes = p.shape[-1]
    x = jnp.zeros((num_classes, 1, num_classes, 1))
    labels = jnp.arange(num_classes)

    def risk(table, p):
        def logits_fn(x):
            return table + x.reshape(-1, num_classes) / jnp.sqrt(2.0)

        half = regularizers.Half(x, logits_fn(x))
        term = regularizers.input_margin(
            logits_fn, half, labels, norm="l2", tau=0.5, num_boundaries=num_boundaries
        )
        return (p * (losses.cross_entropy(half.logits, labels) + weight * term)).sum()

    tx = optax.adam(optax.cosine_decay_schedule(0.05, 1500))

    def descend(start, p):
        def step(carry, _):
            table, state = carry
            updates, state = tx.update(jax.grad(risk)(table, p), state)
            return (optax.apply_updates(table, updates), state), None

        (table, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=1500)
        return table, risk(table, p), jax.grad(risk)(table, p)

    # The objective is not convex, so start at CE's minimiser, at its opposite and at equal logits.
    starts = jnp.stack([jnp.log(p), -jnp.log(p), jnp.zeros_like(p)])
    tables, values, gradients = jax.jit(jax.vmap(jax.vmap(descend), in_axes=(0, None)))(starts, p)
    best, rows = values.argmin(0), jnp.arange(len(p))
    return np.asarray(tables[best, rows]), np.asarray(gradients[best, rows])


@pytest.mark.parametrize(("weight", "num_classes"), [(0.5, 5), (5.0, 3)])
def test_cross_entropy_with_input_margin_is_fisher_consistent_for_equal_norms(
    weight, num_classes, rng
):
    p = rng.dirichlet(np.ones(num_classes), 60)
    # The first 20 are hard cases, whose two likeliest classes are a hundredth apart.
    order, rows = np.argsort(-p[:20], -1), np.arange(20)
    middle = (p[rows, order[:, 0]] + p[rows, order[:, 1]]) / 2
    p[rows, order[:, 0]], p[rows, order[:, 1]] = middle + 0.005, middle - 0.005
    top = np.sort(p, -1)
    p = p[(top[:, -1] - top[:, -2] > 2e-3) & (top[:, 0] > 1e-2)]
    assert len(p) > 30
    with jax.enable_x64(True):
        tables, gradients = minimisers(jnp.asarray(p), weight, None)
    assert np.abs(gradients).max() < 1e-3
    np.testing.assert_array_equal(tables.argmax(-1), p.argmax(-1))


def test_a_hard_minimum_would_tie_the_two_likeliest_classes():
    """The minimum is smooth because the kink of the nearest boundary alone holds the minimiser."""
    with jax.enable_x64(True):
        p = jnp.asarray([[0.36, 0.34, 0.3]])
        hard, smooth = (np.sort(minimisers(p, 3.0, n)[0][0])[::-1] for n in (1, None))
    assert hard[0] - hard[1] < 1e-3
    assert smooth[0] - smooth[1] > 0.03


def test_unequal_gradient_norms_break_fisher_consistency():
    """The counterexample of the docstring, minimised from many starts in float64."""
    p = np.array([0.393, 0.364, 0.243])
    norms = np.array([[1, 0.64, 1.8], [0.64, 1, 0.61], [1.8, 0.61, 1]])
    others = np.array([[1, 2], [0, 2], [0, 1]])

    def best(norms):
        def risk(z):
            boundaries = (z[:, None] - z[others]) / np.take_along_axis(norms, others, 1)
            cross_entropies = losses.cross_entropy(jnp.tile(z, (3, 1)), jnp.arange(3))
            return (p * (cross_entropies + 20 * margins.truncate(boundaries, 1.0))).sum()

        value_and_gradient = jax.jit(jax.value_and_grad(risk))
        starts = np.random.default_rng(0).normal(size=(20, 3)) * 2
        found = [minimize(value_and_gradient, z, jac=True, tol=1e-10) for z in starts]
        return min(found, key=lambda result: result.fun)

    with jax.enable_x64(True):
        unequal, equal = best(norms), best(np.ones((3, 3)))
    assert max(np.abs(result.jac).max() for result in (unequal, equal)) < 1e-5
    assert unequal.x.argmax() == 1 and unequal.x[1] - unequal.x[0] > 0.1
    assert equal.x.argmax() == 0


scores = st.tuples(*[st.floats(-8, 8)] * 4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scores, st.tuples(*[st.floats(0.01, 1)] * 4), st.floats(0.1, 20))
def test_the_ramp_of_output_margins_is_fisher_consistent(z, p, tau):
    """Giving the likeliest class the largest score lowers the ramp's risk and cross-entropy's."""
    z, p = np.array(z, np.float32), np.array(p) / sum(p)
    top, likeliest = z.argmax(), p.argmax()
    swapped = z.copy()
    swapped[[top, likeliest]] = z[[likeliest, top]]

    def risks(z):
        half = regularizers.Half(np.zeros((4, 1, 1, 1), np.float32), np.tile(z, (4, 1)))
        labels = np.arange(4)
        ramps = regularizers.output_margin_ramp(half, labels, tau=tau)
        return [
            float(p @ np.asarray(v)) for v in (ramps, losses.cross_entropy(half.logits, labels))
        ]

    (ramp, cross_entropy), (ramp_then, cross_entropy_then) = risks(z), risks(swapped)
    assert ramp_then <= ramp + 1e-4 * tau and cross_entropy_then <= cross_entropy + 1e-4
    # Strictly so where they are apart, so no minimiser has another class on top.
    if p[likeliest] - p[top] > 0.05 and z[top] - z[likeliest] > 0.1:
        assert cross_entropy_then < cross_entropy - 1e-3


@settings(max_examples=50, deadline=None, derandomize=True)
@given(scores, st.tuples(*[st.floats(0.01, 1)] * 4), st.floats(0.1, 20))
def test_a_tie_at_the_top_is_no_minimum_of_the_ramp(z, p, tau):
    """Such a tie is how a hard minimum of input margins fails; see its test above."""
    p = np.sort(np.array(p) / sum(p))[::-1]
    hypothesis.assume(p[0] - p[1] > 0.02)
    z = np.sort(np.array(z, np.float64))[::-1]
    z[1] = z[0]

    def risk(z):
        half = regularizers.Half(jnp.zeros((4, 1, 1, 1)), jnp.tile(z, (4, 1)))
        labels = jnp.arange(4)
        each = losses.cross_entropy(half.logits, labels)
        return p @ (each + regularizers.output_margin_ramp(half, labels, tau=tau))

    with jax.enable_x64(True):
        apart = jnp.asarray(z) + jnp.asarray([1e-4, -1e-4, 0, 0])
        assert risk(apart) < risk(jnp.asarray(z))


def test_the_ramp_is_the_difference_of_two_hinges(rng):
    logits, labels = rng.normal(size=(32, 5)) * 4, rng.integers(0, 5, 32)
    half = regularizers.Half(jnp.zeros((32, 1, 1, 1)), jnp.float32(logits))
    got = regularizers.output_margin_ramp(half, jnp.asarray(labels), tau=3.0)
    wrong = np.where(np.arange(5) == labels[:, None], -np.inf, logits).max(-1)
    alpha = logits[np.arange(32), labels] - wrong
    np.testing.assert_allclose(
        got, np.maximum(0, 3.0 - alpha) - np.maximum(0, -alpha), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="tau must be above 0, not 0"):
        regularizers.output_margin_ramp(half, jnp.asarray(labels), tau=0)


def test_orthogonality_is_that_of_matrices_and_of_reshaped_kernels(rng):
    kernel, dense, bias = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(5, 3)), np.ones(7)
    more_out = rng.normal(size=(2, 6))
    params = {"conv": {"kernel": kernel, "bias": bias}, "wide": more_out, "head": dense}
    params = jax.tree.map(np.float32, params)
    orthogonality = jax.jit(regularizers.orthogonality)
    rows = [kernel.transpose(3, 2, 0, 1).reshape(4, -1), more_out.T, dense.T]  # as in PyTorch
    expected = sum(((w @ w.T - np.eye(len(w))) ** 2).sum() for w in rows)
    np.testing.assert_allclose(orthogonality(params), expected, rtol=1e-5)
    gradient = jax.grad(orthogonality)(params)
    for name, w in (("wide", more_out.T), ("head", dense.T)):
        expected = 4 * (w @ w.T - np.eye(len(w))) @ w
        np.testing.assert_allclose(gradient[name].T, expected, rtol=1e-4, atol=1e-4)
    assert orthogonality({"kernel": np.eye(6, dtype=np.float32).reshape(1, 2, 3, 6)[..., :4]}) == 0


@pytest.mark.parametrize("norm", DUAL)
def test_clever_is_exact_for_a_linear_network_and_capped_by_the_ball(norm):
    logits_fn, _, _ = make_linear(KEY, num_classes=4)
    x = np.asarray(interior_images(KEY, 6))
    predicted = jnp.argmax(logits_fn(x), -1)
    exact = margins.first_order(logits_fn, x, predicted, norm=norm)
    got = margins.clever(logits_fn, x, KEY, norm=norm, eps=1e3, num_samples=2, chunk_size=4)
    np.testing.assert_allclose(got, exact, rtol=1e-4)
    radius = float(jnp.median(exact))
    capped = margins.clever(logits_fn, x, KEY, norm=norm, eps=radius, num_samples=2)
    np.testing.assert_allclose(capped, np.minimum(exact, radius), rtol=1e-4)


def test_clever_is_below_what_an_attack_finds_in_the_ball():
    """With many samples the largest gradient found is nearly the largest in the ball."""
    logits_fn = make_nonlinear(KEY, num_classes=3)
    x = np.asarray(interior_images(KEY, 6))
    predicted = jnp.argmax(logits_fn(x), -1)
    upper = margins.minimum_norm(logits_fn, x, predicted, KEY, norm="l2")
    few, many = (
        margins.clever(logits_fn, x, KEY, norm="l2", eps=0.1, num_samples=n) for n in (4, 400)
    )
    assert (many <= few).all() and (many <= upper * 1.02).all() and (many > 0).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"norm": "l3"}, "norm must be one of linf, l2, l1, not 'l3'"),
        ({"num_boundaries": 3}, "num_boundaries must be in 1…2, not 3"),
        ({"num_boundaries": 0}, "num_boundaries must be in 1…2, not 0"),
    ],
)
def test_mistakes_are_told(keywords, message):
    logits_fn, _, _ = make_linear(KEY)
    with pytest.raises(ValueError, match=message):
        margins.first_order(logits_fn, interior_images(KEY, 2), jnp.zeros(2, jnp.int32), **keywords)


def test_tau_must_be_above_0():
    with pytest.raises(ValueError, match="tau must be above 0, not 0"):
        margins.truncate(jnp.zeros((1, 2)), 0)


@pytest.mark.parametrize("attack", [attacks.fab, attacks.deepfool, attacks.carlini_wagner])
def test_what_a_minimum_norm_attack_finds_is_a_constant(attack):
    x, y = jnp.array([[0.4, 0.5], [0.6, 0.5]]), jnp.array([0, 0])
    quick = functools.partial(attack, num_steps=20)

    def margin(weights):
        return margins.minimum_norm(lambda x: x @ weights, x, y, KEY, norm="l2", attack=quick).sum()

    weights = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.isfinite(margin(weights))
    np.testing.assert_array_equal(jax.grad(margin)(weights), 0 * weights)
