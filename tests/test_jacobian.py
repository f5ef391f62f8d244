"""Jacobian norms: closed form for linear maps, SVD of the exact Jacobian for a network."""

import chex
import jax
import numpy as np
import pytest
from scipy.special import softmax

from robust_jax import jacobian, margins
from tests.linear import interior_images, make_linear, make_nonlinear

KEY = jax.random.key(0)


def exact_by_finite_differences(fn, x, step=1e-3):
    """[B,K,D] in float64, an independent reference."""
    fn = jax.jit(fn)
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    columns = []
    for d in range(flat.shape[1]):
        e = np.zeros(flat.shape[1])
        e[d] = step
        up, down = (fn(np.float32(flat + s * e).reshape(x.shape)) for s in (1, -1))
        columns.append((np.asarray(up, np.float64) - np.asarray(down, np.float64)) / (2 * step))
    return np.stack(columns, -1)


def test_linear_map_is_its_own_jacobian():
    fn, weights, _ = make_linear(KEY)
    x = np.asarray(interior_images(KEY, 7))
    norms = jacobian.frobenius_norm(fn, x, chunk_size=3)
    np.testing.assert_allclose(norms, np.full(7, np.linalg.norm(weights)), rtol=1e-5)
    spectral = jacobian.spectral_norm(fn, x, KEY, num_iterations=100)
    np.testing.assert_allclose(spectral, np.full(7, np.linalg.norm(weights, 2)), rtol=1e-3)
    full = jacobian.jacobian(fn, x)
    chex.assert_shape(full, (7, 3, 4, 5, 1))
    np.testing.assert_allclose(full[0].reshape(3, -1), weights, rtol=1e-5)


def test_network_matches_finite_differences_and_svd():
    fn = make_nonlinear(KEY)
    x = np.asarray(interior_images(jax.random.key(1), 4))
    reference = exact_by_finite_differences(fn, x)
    exact = jacobian.jacobian(fn, x, chunk_size=2)
    np.testing.assert_allclose(exact.reshape(reference.shape), reference, atol=5e-3)
    np.testing.assert_allclose(
        jacobian.frobenius_norm(fn, x), np.linalg.norm(reference, axis=(1, 2)), rtol=5e-3
    )
    np.testing.assert_allclose(
        jacobian.spectral_norm(fn, x, KEY, num_iterations=100),
        np.linalg.norm(reference, 2, axis=(1, 2)),
        rtol=5e-3,
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 3e9, 1e25])
@pytest.mark.parametrize("num_iterations", [40, 41])
def test_norms_of_tiny_and_of_huge_jacobians_neither_under_nor_overflow(scale, num_iterations):
    _, weights, _ = make_linear(KEY)
    x, scale = np.asarray(interior_images(KEY, 2)), np.float32(scale)

    def fn(x):
        return scale * (x.reshape(len(x), -1) @ weights.T)

    spectral = jacobian.spectral_norm(fn, x, KEY, num_iterations=num_iterations)
    np.testing.assert_allclose(spectral / scale, np.full(2, np.linalg.norm(weights, 2)), rtol=1e-3)
    frobenius = jacobian.frobenius_norm(fn, x)
    np.testing.assert_allclose(frobenius / scale, np.full(2, np.linalg.norm(weights)), rtol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("gap", [0.0, 14.0, 18.0, 30.0, 60.0])
def test_jacobians_of_probabilities_are_exact_however_sure_the_network_is(num_classes, gap, rng):
    weights = rng.normal(size=(6, num_classes)).astype(np.float32)
    bias = np.where(np.arange(num_classes) == 0, gap, 0).astype(np.float32)
    x = rng.uniform(size=(3, 6)).astype(np.float32)
    p = softmax(x.astype(np.float64) @ weights + bias, axis=-1)
    apart = weights.T[:, None] - weights.T[None].astype(np.float64)
    exact = np.einsum("bk,bj,kjd->bkd", p, p, apart)  # ∇p_k = p_k Σ_j p_j (∇z_k - ∇z_j)
    fn = jacobian.probabilities(lambda x: x @ weights + bias)
    frobenius = np.linalg.norm(exact, axis=(1, 2))
    found = jacobian.frobenius_norm(fn, x)
    np.testing.assert_allclose(found / frobenius, np.ones(3), rtol=1e-4)
    spectral = jacobian.spectral_norm(fn, x, KEY, num_iterations=100)
    np.testing.assert_allclose(spectral, np.linalg.norm(exact, 2, axis=(1, 2)), rtol=1e-3)
    np.testing.assert_allclose(jacobian.singular_values(fn, x)[:, 0], spectral, rtol=1e-3)
    np.testing.assert_allclose(fn(x), p, rtol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_relative_slope_is_one_over_the_margin_whatever_the_scale_of_the_logits(norm):
    fn = make_nonlinear(KEY)
    x = np.asarray(interior_images(jax.random.key(1), 5))
    logits = np.asarray(fn(x))
    y = logits.argmax(-1)
    y[0] = logits[0].argmin()  # the first is misclassified
    found = np.asarray(jacobian.relative_slope(fn, x, y, norm=norm, chunk_size=2))
    right = np.asarray(margins.first_order(fn, x, y, norm=norm))[1:]
    np.testing.assert_allclose(found[1:], 1 / right, rtol=1e-4)
    rows, logits = exact_by_finite_differences(fn, x)[0], logits[0]
    order = {"linf": 1, "l2": 2}[norm]
    slopes = [np.linalg.norm(rows[y[0]] - rows[j], order) for j in range(3) if j != y[0]]
    gaps = [abs(logits[y[0]] - logits[j]) for j in range(3) if j != y[0]]
    np.testing.assert_allclose(found[0], np.max(np.divide(slopes, gaps)), rtol=5e-3)
    if norm == "linf":
        scaled = jacobian.relative_slope(lambda x: 50 * fn(x), x, y, norm=norm)
        np.testing.assert_allclose(scaled, found, rtol=1e-4)
    else:
        twins = jacobian.relative_slope(lambda x: fn(x)[:, np.array([0, 0])], x, 0 * y, norm=norm)
        np.testing.assert_array_equal(twins, np.zeros(5))


def test_probabilities_jacobian_is_softmax_after_logits():
    fn, weights, _ = make_linear(KEY)
    x = np.asarray(interior_images(KEY, 3))
    p = np.asarray(jax.nn.softmax(fn(x)), np.float64)
    for i, norm in enumerate(jacobian.frobenius_norm(jacobian.probabilities(fn), x)):
        expected = (np.diag(p[i]) - np.outer(p[i], p[i])) @ np.asarray(weights)
        np.testing.assert_allclose(norm, np.linalg.norm(expected), rtol=1e-4)


def test_forward_mode_where_pixels_are_few_agrees():
    fn, weights, _ = make_linear(KEY, image_shape=(1, 2, 1), num_classes=6)
    x = np.asarray(interior_images(KEY, 3, (1, 2, 1)))
    np.testing.assert_allclose(
        jacobian.frobenius_norm(fn, x), np.full(3, np.linalg.norm(weights)), rtol=1e-5
    )


def test_estimate_is_unbiased_and_its_error_is_honest():
    fn = make_nonlinear(KEY)
    x = np.asarray(interior_images(jax.random.key(1), 200))
    exact = np.asarray(jacobian.frobenius_norm(fn, x))
    squares = jacobian.squared_frobenius_samples(fn, x, KEY, num_projections=64)
    # 12,800 samples with relative deviations below √2, so 3 % is over two standard errors.
    np.testing.assert_allclose((squares.mean(-1) / exact**2).mean(), 1.0, atol=0.03)
    estimate = jacobian.frobenius_norm_estimate(fn, x, KEY, num_projections=64)
    z = (np.asarray(estimate.norm) - exact) / np.asarray(estimate.standard_error)
    assert 0.85 < np.mean(np.abs(z) < 2) <= 1.0


def test_spectral_never_exceeds_frobenius_and_grows_with_iterations():
    fn = make_nonlinear(KEY, num_classes=4)
    x = np.asarray(interior_images(jax.random.key(2), 16))
    few, many = (jacobian.spectral_norm(fn, x, KEY, num_iterations=n) for n in (1, 30))
    assert (many >= few - 1e-5).all()
    assert (many <= jacobian.frobenius_norm(fn, x) * (1 + 1e-5)).all()


def test_per_example_keys_make_results_independent_of_the_batch():
    fn = make_nonlinear(KEY)
    x = np.asarray(interior_images(KEY, 6))
    keys = jax.random.split(KEY, 6)
    whole = jacobian.frobenius_norm_estimate(fn, x, keys, num_projections=4)
    part = jacobian.frobenius_norm_estimate(fn, x[3:], keys[3:], num_projections=4)
    np.testing.assert_allclose(whole.norm[3:], part.norm, rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda fn, x: jacobian.frobenius_norm_estimate(fn, x, KEY, num_projections=1),
        lambda fn, x: jacobian.squared_frobenius_samples(fn, x, KEY, num_projections=0),
        lambda fn, x: jacobian.spectral_norm(fn, x, KEY, num_iterations=0),
    ],
)
def test_too_few_samples_are_refused(call):
    fn, _, _ = make_linear(KEY)
    with pytest.raises(ValueError, match="at least"):
        call(fn, interior_images(KEY, 2))


@pytest.mark.parametrize("of", [lambda fn: fn, jacobian.probabilities])
@pytest.mark.parametrize("image_shape", [(4, 5, 1), (1, 2, 1)])
def test_spectrum_is_that_of_the_full_jacobian(of, image_shape):
    fn = of(make_nonlinear(KEY, image_shape, num_classes=4))
    x = np.asarray(interior_images(jax.random.key(1), 5, image_shape))
    full = jax.jit(jax.vmap(jax.jacrev(lambda one: fn(one[None])[0])))(x)
    full = np.asarray(full, np.float64).reshape(5, 4, -1)
    values = np.asarray(jacobian.singular_values(fn, x, chunk_size=2))
    np.testing.assert_allclose(values, np.linalg.svd(full, compute_uv=False), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(values, axis=-1), jacobian.frobenius_norm(fn, x), rtol=1e-4
    )
