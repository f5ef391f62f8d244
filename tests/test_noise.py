"""Noise: its sizes, and the worst of several draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import losses
from robust_jax.attacks import NORMS, distances, gaussian_noise, uniform_noise
from tests.linear import make_linear, make_nonlinear

KEY = jax.random.key(0)
NOISES = {"uniform": uniform_noise, "gaussian": gaussian_noise}


def sizes(delta, norm):
    return np.asarray(distances(0 * delta, delta, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
def test_noise_has_the_size_it_says(norm):
    """Uniform: a quarter of the mass is within (1/4)^(1/n) eps. Gaussian: half is on the sphere."""
    logits_fn, _, _ = make_linear(KEY, (2, 1, 3))
    x = np.full((2000, 2, 1, 3), 0.5, np.float32)
    y = np.zeros(2000, np.int32)
    delta = np.asarray(uniform_noise(logits_fn, x, y, KEY, eps=0.2, norm=norm)) - x
    radii = sizes(delta, norm)
    assert radii.max() <= 0.2 * (1 + 1e-6)
    np.testing.assert_allclose((radii < 0.2 * 0.25 ** (1 / 6)).mean(), 0.25, atol=0.04)
    np.testing.assert_allclose(delta.mean(0), 0, atol=0.02)
    delta = np.asarray(gaussian_noise(logits_fn, x, y, KEY, eps=0.2, norm=norm)) - x
    radii = sizes(delta, norm)
    assert radii.max() <= 0.2 * (1 + 1e-6)
    np.testing.assert_allclose((radii > 0.2 * (1 - 1e-5)).mean(), 0.45, atol=0.08)
    np.testing.assert_allclose(delta.mean(0), 0, atol=0.02)


def test_gaussian_noise_has_one_deviation_for_every_pixel():
    """The ball hardly changes the draws on an image of 784 pixels."""
    x = np.full((40, 28, 28, 1), 0.5, np.float32)
    y = np.zeros(40, np.int32)
    logits_fn, _, _ = make_linear(KEY, (28, 28, 1))
    delta = np.asarray(gaussian_noise(logits_fn, x, y, KEY, eps=2.8, norm="l2") - x)
    np.testing.assert_allclose(delta.std(), 2.8 / 28, rtol=0.03)
    np.testing.assert_allclose((np.abs(delta) < 0.1).mean(), 0.6827, atol=0.02)
    delta = np.asarray(gaussian_noise(logits_fn, x, y, KEY, eps=0.1) - x)
    # P(|z| < t)^784 = ½ at t = 3.326.
    np.testing.assert_allclose(delta.std(), 0.1 / 3.326, rtol=0.02)


@pytest.mark.parametrize("noise", NOISES)
def test_more_draws_find_more_and_the_misclassified_one_is_returned(noise):
    logits_fn = make_nonlinear(KEY)
    x = np.asarray(jax.random.uniform(KEY, (100, 4, 5, 1)))
    y = np.asarray(logits_fn(x)).argmax(-1)
    wrong, loss = {}, {}
    for num_samples in (1, 10):
        x_adv = NOISES[noise](logits_fn, x, y, KEY, eps=0.3, num_samples=num_samples)
        logits = logits_fn(x_adv)
        wrong[num_samples] = np.asarray(jnp.argmax(logits, -1) != y)
        loss[num_samples] = np.asarray(losses.cross_entropy(logits, y))
    # The single draw is the first of the ten.
    assert (wrong[1] <= wrong[10]).all()
    assert wrong[1].sum() < wrong[10].sum()
    assert (loss[1] <= loss[10] + 1e-5)[wrong[1] == wrong[10]].all()
    # A loss that prefers correctly classified points does not hide the misclassified ones.
    against = NOISES[noise](
        logits_fn,
        x,
        y,
        KEY,
        eps=0.3,
        num_samples=10,
        loss=lambda logits, y: -losses.cross_entropy(logits, y),
    )
    np.testing.assert_array_equal(jnp.argmax(logits_fn(against), -1) != y, wrong[10])
