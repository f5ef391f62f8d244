"""Energies of the loss in a neighbourhood: closed forms, and what bounds them from below."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, logsumexp, softmax

from robust_jax import attacks, energy, losses
from robust_jax.train.regularizers import Half, vat
from tests import digits
from tests.linear import interior_images

KEY = jax.random.key(0)
SHAPE = (4, 5, 1)
WEIGHTS = np.asarray(jax.random.normal(KEY, SHAPE), np.float64)
EPS = 0.05


def two_classes(offset, scale=1.0):
    """Logits 0 and w·(x - ½) + offset; far above 0, class 0's loss is the second logit."""
    offset, scale = np.float32([offset]), np.float32([scale])  # arrays, so arguments of one program

    def logits_fn(x):
        second = scale * (((x - 0.5) * np.float32(WEIGHTS)).sum((1, 2, 3)) + offset)
        return jnp.stack([jnp.zeros_like(second), second], -1)

    return logits_fn


X = interior_images(jax.random.key(1), 6)
ZEROS = jnp.zeros(6, jnp.int32)


@pytest.mark.parametrize(
    ("norm", "mean", "width"),
    [
        ("linf", EPS**2 * (WEIGHTS**2).sum() / 3, 2 * EPS * np.abs(WEIGHTS).sum()),
        ("l2", EPS**2 * (WEIGHTS**2).sum() / 22, 2 * EPS * np.sqrt((WEIGHTS**2).sum())),
    ],
)
def test_energies_of_a_linear_loss(norm, mean, width):
    """E (w·r)² = ‖w‖² E r_1²: eps²/3 in a cube, eps²/(d+2) in a ball of d dimensions."""
    keywords = {"eps": EPS, "norm": norm}
    got = energy.mean_square(two_classes(40.0), X, ZEROS, KEY, num_samples=4000, **keywords)
    np.testing.assert_allclose(got, np.full(6, mean), rtol=0.1)
    np.testing.assert_allclose(got.mean(), mean, rtol=0.04)
    got = energy.oscillation(two_classes(40.0), X, ZEROS, KEY, step_size=4 * EPS, **keywords)
    np.testing.assert_allclose(got, np.full(6, width**2), rtol=1e-3)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", np.inf)])
def test_variation_of_a_linear_loss_is_its_slope(norm, dual):
    slope = np.linalg.norm(WEIGHTS.ravel(), dual)
    for squared in (False, True) if norm == "linf" else (True,):
        got = energy.total_variation(
            two_classes(40.0), X, ZEROS, KEY, eps=EPS, norm=norm, num_samples=3, squared=squared
        )
        np.testing.assert_allclose(got, np.full(6, slope ** (1 + squared)), rtol=1e-4)
    # At a constant slope all pieces of the path are alike and add up to the rise of the loss.
    num_pieces = {"linf": 1, "l2": 2, "l1": 5}[norm]
    keywords = {"eps": EPS, "norm": norm, "step_size": 4 * EPS, "num_pieces": num_pieces}
    got = energy.path(two_classes(40.0), X, ZEROS, KEY, **keywords)
    np.testing.assert_allclose(got, np.full(6, (EPS * slope) ** 2), rtol=2e-3)


def test_variation_is_the_mean_gradient_over_the_ball(trained):
    """In float64, by finite differences along each pixel, at points drawn by numpy."""
    logits_fn, x, y = trained
    x, y = x[:4], y[:4]
    got = energy.total_variation(logits_fn, x, y, KEY, eps=0.1, norm="l2", num_samples=4000)
    rng = np.random.default_rng(0)
    r = rng.normal(size=(400, x[0].size))
    r *= 0.1 * rng.uniform(size=(400, 1)) ** (1 / x[0].size) / np.linalg.norm(r, axis=1)[:, None]
    points = np.clip(np.asarray(x).reshape(4, 1, -1) + r, 0, 1)
    steps = 1e-3 * np.concatenate([np.eye(20), -np.eye(20)])
    moved = np.float32(points[:, :, None] + steps).reshape(-1, *SHAPE)
    logits = np.asarray(logits_fn(moved), np.float64)
    values = logsumexp(logits, -1) - logits[np.arange(len(moved)), np.repeat(y, 400 * 40)]
    up, down = np.moveaxis(values.reshape(4, 400, 2, 20), 2, 0)
    expected = np.linalg.norm((up - down) / 2e-3, axis=-1).mean(-1)
    np.testing.assert_allclose(got, expected, rtol=0.05)


def binary_kl(u, v):
    """KL between Bernoulli distributions with logits u and v."""
    p, q = expit(u), expit(v)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


@pytest.mark.parametrize("gap", [0.0, 15.0, 18.0, 25.0])
def test_variation_is_exact_however_sure_the_network_is(gap, rng):
    weights = rng.normal(size=(6, 4)).astype(np.float32)
    bias = np.where(np.arange(4) == 0, gap, 0).astype(np.float32)
    x, y = rng.uniform(size=(3, 6)).astype(np.float32), np.zeros(3, int)
    p = softmax(x.astype(np.float64) @ weights + bias, axis=-1)
    slope = np.linalg.norm(p[:, 1:] @ (weights.T[1:] - weights.T[0].astype(np.float64)), axis=-1)
    found = energy.total_variation(lambda x: x @ weights + bias, x, y, KEY, eps=0.0, norm="l2")
    np.testing.assert_allclose(found / slope, np.ones(3), rtol=1e-3)


def test_label_free_energies_are_those_of_the_kl(rng):
    logits_fn = two_classes(0.3)
    u = np.asarray(logits_fn(X)[:, 1], np.float64)
    r = rng.uniform(-0.2, 0.2, (20000, WEIGHTS.size))
    expected = (binary_kl(u, u + r @ WEIGHTS.reshape(-1, 1)) ** 2).mean(0)
    got = energy.mean_square(logits_fn, X, None, KEY, eps=0.2, num_samples=4000)
    np.testing.assert_allclose(got, expected, rtol=0.15)
    # KL is convex in the logit, so it is largest at one of the ball's two ends.
    reach = 0.2 * np.abs(WEIGHTS).sum()
    ends = np.stack([binary_kl(u, u - reach), binary_kl(u, u + reach)])
    got = energy.oscillation(logits_fn, X, None, KEY, eps=0.2, num_steps=20)
    assert np.isclose(np.sqrt(got), ends, rtol=1e-3).any(0).all()


@pytest.fixture(scope="module")
def trained():
    """A network fitted to noisy labels of random images, so that it is right, wrong and unsure."""
    x = np.asarray(jax.random.uniform(KEY, (64, *SHAPE)))
    y = jax.random.randint(jax.random.key(2), (64,), 0, 3)

    def network(params, x):
        return jnp.tanh((x - 0.5).reshape(len(x), -1) @ params[0]) @ params[1]

    def mean_loss(params):
        return losses.cross_entropy(network(params, x), y).mean()

    tx = optax.adam(0.02)

    def step(carry, _):
        updates, state = tx.update(jax.grad(mean_loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    params = (jax.random.normal(KEY, (20, 16)), jax.random.normal(KEY, (16, 3)) / 4)
    fit = jax.jit(lambda carry: jax.lax.scan(step, carry, length=15)[0])
    params, _ = fit((params, tx.init(params)))
    logits_fn = jax.jit(lambda x: network(params, x))
    assert 0.5 < losses.correct(logits_fn(x), y).mean() < 1
    return logits_fn, x, y


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_oscillation_is_above_the_adversarial_term_on_every_example(trained, norm):
    logits_fn, x, y = trained
    keywords = {"eps": 0.1 if norm == "linf" else 0.2, "norm": norm, "num_steps": 20}
    oscillation = energy.oscillation(logits_fn, x, y, KEY, **keywords)
    x_adv = attacks.pgd(logits_fn, x, y, jax.random.key(7), **keywords)
    at_x, at_adv = (losses.cross_entropy(logits_fn(point), y) for point in (x, x_adv))
    # The bound is strict, since no image is at a minimum of its own loss.
    assert (oscillation > 1.2 * (at_adv - at_x) ** 2).all()
    rise = energy.rise(logits_fn, x, y, KEY, **keywords)
    assert (rise <= oscillation).all() and (rise > 0).all()
    if norm == "linf":  # and without the labels
        free, above = (
            np.asarray(fn(logits_fn, x, None, KEY, **keywords))
            for fn in (energy.rise, energy.oscillation)
        )
        assert (above >= free * (1 - 1e-3) - 1e-6).all() and (free > 0).all()
    np.testing.assert_allclose(rise.mean(), ((at_adv - at_x) ** 2).mean(), rtol=0.1)


def test_the_label_free_rise_is_above_vats_term_on_every_example_inside_the_box(trained):
    logits_fn, x, _ = trained
    x, eps = 0.25 + x / 2, 0.2  # the box cuts nothing within eps of x
    keys = jax.random.split(KEY, len(x))
    term = vat(logits_fn, Half(x, logits_fn(x)), keys, eps=eps, num_iterations=10)
    # The KL has two maxima, on either side of x; an attack finds one of them.
    keywords = {"eps": eps, "norm": "l2", "num_steps": 40, "step_size": 0.02}
    rises = [energy.rise(logits_fn, x, None, jax.random.key(i), **keywords) for i in range(16)]
    assert (np.sqrt(np.max(rises, 0)) >= 0.999 * term).all() and (term > 0).all()


@pytest.mark.slow  # the tests around it check this for a network trained on random images
def test_the_bounds_hold_for_a_network_trained_on_digits():
    logits_fn, (x, y) = digits.trained(), digits.test_points(60)
    keywords = {"eps": 0.05, "num_steps": 20}
    for labels in (y, None):
        rise = np.asarray(energy.rise(logits_fn, x, labels, KEY, **keywords))
        assert (rise > 0).all()
        for bounded in (energy.oscillation, energy.path):
            found = np.asarray(bounded(logits_fn, x, labels, KEY, **keywords))
            assert (found >= rise * (1 - 1e-3) - 1e-6).all()


@pytest.mark.parametrize(
    ("norm", "labelled"),
    [
        ("linf", True),
        ("l2", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("linf", False), ("l2", True))),
    ],
)
def test_the_way_to_the_worst_point_is_above_the_adversarial_term_on_every_example(
    trained, norm, labelled
):
    """By Cauchy-Schwarz, for any number of pieces; the gap grows with their number."""
    logits_fn, x, y = trained
    y = y if labelled else None
    keywords = {"eps": 0.3 if norm == "linf" else 1.0, "norm": norm, "num_steps": 20}
    rise = np.asarray(energy.rise(logits_fn, x, y, KEY, **keywords))
    paths = [energy.path(logits_fn, x, y, KEY, num_pieces=n, **keywords) for n in (1, 2, 64)]
    tolerance = {"rtol": 1e-3, "atol": 1e-6}
    np.testing.assert_allclose(paths[0], rise, **tolerance)
    for fewer, more in itertools.pairwise(map(np.asarray, paths)):
        assert (more >= fewer * (1 - 1e-3) - 1e-6).all()
    assert (paths[-1] > 1.02 * rise).mean() > 0.5  # the loss does not rise evenly


def test_the_way_is_the_integral_of_the_squared_slope(trained):
    """∫₀¹ (∇ℓ(x+tr)·r)² dt, by Gauss-Legendre quadrature in float64, to the same worst point."""
    logits_fn, x, y = trained
    keywords = {"eps": 0.3, "num_steps": 20}
    worst = attacks.pgd(
        logits_fn,
        x,
        y,
        energy.fold_each(energy.example_keys(KEY, 64), 0),
        criterion=attacks.never,
        **keywords,
    )
    nodes, weights = np.polynomial.legendre.leggauss(16)

    def slope(t):
        def along(t):
            return losses.cross_entropy(logits_fn(x + t * (worst - x)), y)

        return jax.jvp(along, (t,), (1.0,))[1]

    slopes = np.stack([slope(float(t)) for t in (nodes + 1) / 2]).astype(np.float64)
    expected = (weights[:, None] / 2 * slopes**2).sum(0)
    got = energy.path(logits_fn, x, y, KEY, num_pieces=64, **keywords)
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("label", [0, 1])
def test_the_point_itself_is_among_both_ends(label):
    """The loss differs only at x itself: higher for class 0 and lower for class 1."""
    x = np.full((1, *SHAPE), 0.5, np.float32)

    def logits_fn(images):
        at_x = (images == 0.5).all((1, 2, 3))
        return jnp.stack([jnp.zeros_like(at_x, float), 5.0 * at_x], -1)

    jump = np.log1p(np.exp(5.0)) - np.log(2.0) - 5.0 * label
    got = energy.oscillation(logits_fn, x, jnp.asarray([label]), KEY, eps=0.1)
    np.testing.assert_allclose(got, [jump**2], rtol=1e-4)


def test_oscillation_is_above_any_sample(trained):
    logits_fn, x, y = trained
    for labels in (y, None):
        sample = energy.mean_square(logits_fn, x, labels, KEY, eps=0.1)
        ends = energy.oscillation(logits_fn, x, labels, KEY, eps=0.1, num_steps=20)
        assert (ends >= sample).all()
        assert (sample > 0).all()


def test_an_example_has_its_energy_in_any_batch(trained):
    """With labels: tests/test_functions.py."""
    logits_fn, x, _ = trained
    keys = jax.random.split(KEY, 64)

    @jax.jit
    def energies(x, keys, eps):
        return {
            name: getattr(energy, name)(logits_fn, x, None, keys, eps=eps)
            for name in ("mean_square", "oscillation", "total_variation", "path")
        }

    whole, still = (jax.device_get(energies(x, keys, eps)) for eps in (0.1, 0.0))
    alone = jax.device_get(energies(x[5:6], keys[5:6], 0.1))
    for name, values in whole.items():
        np.testing.assert_allclose(values[5:6], alone[name], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(still[name], np.zeros(64), atol=1e-5, err_msg=name)


def test_neighbours_stay_in_the_box():
    """Where every pixel is black or white, half of each interval lies outside the box."""
    x = jnp.stack([jnp.zeros(SHAPE), jnp.ones(SHAPE)])

    def logits_fn(x):
        outside = (jnp.abs(x - 0.5) > 0.5).any((1, 2, 3))
        return jnp.stack([outside * 5.0, x.sum((1, 2, 3))], -1)

    for y in (jnp.zeros(2, jnp.int32), None):
        inside = [
            energy.mean_square(logits_fn, x, y, KEY, eps=0.1, num_samples=20),
            energy.oscillation(logits_fn, x, y, KEY, eps=0.1),
        ]
        assert all((values < 2.1**2).all() for values in inside)


def test_numerically_extreme_losses_stay_finite():
    kinds = [*itertools.product(("mean_square", "oscillation", "total_variation", "path"), "yn")]

    @jax.jit
    def energies(x):
        labels, logits_fn = {"y": ZEROS, "n": None}, two_classes(0.0, 1e4)
        return [getattr(energy, n)(logits_fn, x, labels[y], KEY, eps=0.1) for n, y in kinds]

    for kind, values in zip(kinds, energies(X), strict=True):
        assert np.isfinite(values).all(), kind


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("mean_square", {"eps": -1.0}, "eps must not be negative"),
        ("mean_square", {"eps": 0.1, "num_samples": 0}, "num_samples must be a whole number"),
        ("mean_square", {"eps": 0.1, "norm": "l3"}, "norm must be one of"),
        ("oscillation", {"eps": -1.0}, "eps must not be negative"),
        ("oscillation", {"eps": 0.1, "num_steps": 0}, "num_steps must be a whole number"),
        ("total_variation", {"eps": -1.0}, "eps must not be negative"),
        ("total_variation", {"eps": 0.1, "num_samples": 0}, "num_samples must be a whole number"),
        ("path", {"eps": 0.1, "num_pieces": 0}, "num_pieces must be a whole number"),
    ],
)
def test_mistakes_are_told(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        getattr(energy, name)(two_classes(0.0), X, ZEROS, KEY, **keywords)
