"""Margins, feature changes, calibration, latents and loss surfaces, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import optimize

from robust_jax import losses, margins
from robust_jax.analysis import calibration, features, latent, spectra, summaries, surface
from robust_jax.analysis.spectra import Layer
from robust_jax.attacks import fab, pgd
from robust_jax.models import MLP, Linear
from tests.linear import (
    make_linear,
    make_nonlinear,
    near_boundary,
    sizes,
)

KEY = jax.random.key(0)


def interior_images(count):
    """Images so far inside [0,1] that small attacks never meet its walls."""
    rng = np.random.default_rng(count)
    return rng.uniform(0.4, 0.6, (count, 4, 5, 1)).astype(np.float32)


def attacked(norm, logits_fn, x, y, *, num_steps=30, chunk_size=None):
    """minimum_norm with FAB."""
    measure = functools.partial(
        margins.minimum_norm,
        logits_fn,
        norm=norm,
        chunk_size=chunk_size,
        attack=functools.partial(fab, num_steps=num_steps),
    )
    return np.asarray(jax.jit(measure)(x, y, KEY))


def as_matrix(logits_fn, x):
    """The weights [K,D] and bias [K] of a linear logits_fn, in float64."""
    jacobian = jax.jacobian(lambda x: logits_fn(x[None])[0])(x[0])
    bias = logits_fn(jnp.zeros_like(x[:1]))[0]
    return np.float64(jacobian.reshape(len(bias), -1)), np.float64(bias)


# Margins.


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_all_margins_of_a_linear_model_are_its_distance(norm):
    logits_fn, x, y, distance = near_boundary(5, norm)
    weights, bias = as_matrix(logits_fn, x)
    exact = margins.linear(weights, bias, x, y, norm=norm)
    np.testing.assert_allclose(exact, distance, rtol=1e-3, atol=1e-5)
    first = margins.first_order(logits_fn, x, y, norm=norm)
    np.testing.assert_allclose(first, exact, rtol=1e-3, atol=1e-5)
    guaranteed = margins.lipschitz(logits_fn(x), y, {"head": spectra.Layer(weights.T)}, norm=norm)
    np.testing.assert_allclose(guaranteed, exact, rtol=1e-3, atol=1e-5)
    found = attacked(norm, logits_fn, x, y)
    assert (found >= exact * (1 - 1e-3)).all()
    assert (found <= exact * 1.01).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_margins_of_two_classes_change_sign_with_the_label(norm):
    logits_fn, weights, bias = make_linear(KEY, num_classes=2)
    x, y = interior_images(9), jnp.arange(9) % 2
    signed = margins.linear(weights, bias, x, y, norm=norm)
    assert (signed < 0).any() and (signed > 0).any()
    np.testing.assert_array_equal(np.sign(signed), np.where(losses.correct(logits_fn(x), y), 1, -1))
    np.testing.assert_allclose(margins.linear(weights, bias, x, 1 - y, norm=norm), -signed)
    first = margins.first_order(logits_fn, x, y, norm=norm, chunk_size=4)
    np.testing.assert_allclose(first, signed, rtol=1e-3)


@pytest.mark.parametrize("label", [0, 1])
def test_minimum_norm_is_infinite_where_all_logits_are_equal(label):
    x, y = interior_images(2), jnp.full(2, label)
    found = attacked("linf", lambda x: jnp.zeros((len(x), 3)) + 0 * x.sum(), x, y, num_steps=2)
    # The first of equal logits is the prediction.
    np.testing.assert_array_equal(found, np.inf if label == 0 else -np.inf)


def test_minimum_norm_of_a_misclassified_example_is_the_way_to_its_label():
    """Against a general solver: the nearest point of a polytope cut to the box, in l2."""
    logits_fn, x, _, _ = near_boundary(5, "l2")
    x = x[:8]
    weights, bias = as_matrix(logits_fn, x)
    y = jnp.argsort(logits_fn(x))[:, 2]
    found = attacked("l2", logits_fn, x, y)
    in_corner = 0
    for image, label, margin in zip(np.asarray(x), np.asarray(y), found, strict=True):
        others = np.arange(5) != label
        lead, gap = (weights[label] - weights)[others], (bias[label] - bias)[others]
        flat = image.astype(np.float64).ravel()
        best = optimize.minimize(
            lambda d: d @ d,
            np.zeros(20),
            method="SLSQP",
            jac=lambda d: 2 * d,
            bounds=[*zip(-flat, 1 - flat, strict=True)],
            options={"ftol": 1e-10},
            constraints={
                "type": "ineq",
                "jac": lambda d, w=lead: w,
                "fun": lambda d, w=lead, b=gap, z=flat: w @ (z + d) + b,
            },
        )
        assert best.success
        in_corner += (lead @ (flat + best.x) + gap < 1e-4).sum() > 1
        assert np.sqrt(best.fun) * (1 - 1e-3) <= -margin <= np.sqrt(best.fun) * 1.05
    assert in_corner > 2  # where two boundaries meet
    exact = margins.linear(weights, bias, x, y, norm="l2")
    assert (exact < 0).all()
    assert (exact >= np.asarray(found) * (1 + 1e-3)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_lower_bound_is_below_the_upper_bound_and_has_its_sign(norm):
    model = MLP(num_classes=3, hidden=(8, 6), std=(0.5,))
    x = jax.random.uniform(KEY, (24, 4, 5, 1))
    variables = jax.jit(model.init)(KEY, x)
    logits_fn = jax.jit(functools.partial(model.apply, variables))
    y = jnp.where(jnp.arange(24) % 3 == 0, 2, jnp.argmax(logits_fn(x), -1))
    layers = spectra.layers(model, variables, x.shape[1:])
    lower = margins.lipschitz(logits_fn(x), y, layers, norm=norm, std=model.std)
    upper = attacked(norm, logits_fn, x, y, chunk_size=8)
    right = np.asarray(losses.correct(logits_fn(x), y), bool)
    assert 0 < right.sum() < 24
    for bound in (lower, upper):
        np.testing.assert_array_equal(np.sign(bound), np.where(right, 1, -1))
    assert (np.abs(lower) <= np.abs(upper) * (1 + 1e-4)).all()
    assert np.isfinite(upper).any()
    by_l2 = margins.lipschitz(logits_fn(x), y, layers, norm="l2", std=model.std)
    carried = by_l2 / np.sqrt(20) if norm == "linf" else by_l2
    assert (np.abs(lower) >= np.abs(carried)).all()


def test_lipschitz_takes_in_what_the_input_is_divided_by():
    model = Linear(num_classes=3, std=(0.25,))
    x, y = interior_images(5), jnp.array([0, 1, 2, 0, 1])
    variables = jax.jit(model.init)(KEY, x)
    logits_fn = jax.jit(functools.partial(model.apply, variables))
    layers = spectra.layers(model, variables, x.shape[1:])
    lower = margins.lipschitz(logits_fn(x), y, layers, norm="linf", std=model.std)
    np.testing.assert_allclose(lower, margins.first_order(logits_fn, x, y, norm="linf"), rtol=1e-3)


def test_margins_where_nothing_changes_the_class():
    x, y = interior_images(2), jnp.array([0, 1])

    def constant(x):
        return jnp.tile(jnp.array([1.0, 0.0, 0.0]), (x.shape[0], 1))

    expected = [np.inf, -np.inf]
    np.testing.assert_array_equal(margins.first_order(constant, x, y, norm="l2"), expected)
    found = attacked("l2", constant, x, y, num_steps=1)
    np.testing.assert_array_equal(found, expected)
    none = margins.linear(np.zeros((3, 20)), np.array([1.0, 0.0, 0.0]), x, y, norm="l2")
    np.testing.assert_array_equal(none, expected)


def test_mistakes_about_margins_are_told():
    logits_fn, weights, bias = make_linear(KEY)
    x, y = interior_images(2), jnp.zeros(2, int)
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, not 'l7'"):
        margins.first_order(logits_fn, x, y, norm="l7")
    layers = {"head": spectra.Layer(weights.T), "conv": spectra.Layer(np.ones((1, 1, 3, 3)))}
    with pytest.raises(ValueError, match="the last layer, conv, must be dense"):
        margins.lipschitz(logits_fn(x), y, layers, norm="l2")


# Changes of features.


def test_feature_change_of_a_linear_network_is_the_gain_of_its_maps(rng):
    one, two = rng.normal(size=(20, 6)), rng.normal(size=(6, 3))

    def features_fn(x):
        hidden = x.reshape(len(x), -1) @ jnp.float32(one)
        return {"z first": hidden, "a second": hidden @ jnp.float32(two)}

    x, noise = interior_images(7), 0.1 * rng.normal(size=(7, 4, 5, 1))
    found = features.change(features_fn, x, x + jnp.float32(noise), chunk_size=3)
    assert list(found) == ["z first", "a second"]
    delta = noise.reshape(7, -1)
    for name, total in (("z first", one), ("a second", one @ two)):
        gain = np.linalg.norm(delta @ total, axis=-1) / np.linalg.norm(delta, axis=-1)
        np.testing.assert_allclose(found[name], gain, rtol=1e-4)
        assert (found[name] <= np.linalg.norm(total, 2)).all()
    # Relative to the layer's values, the change does not depend on the layer's scale.
    shares = [
        features.change(
            lambda x, s=s: {"h": s * features_fn(x)["a second"]}, x, x + 0.1, relative=True
        )
        for s in (1, 8)
    ]
    size = np.linalg.norm(features_fn(x)["a second"], axis=-1)
    raw = features.change(features_fn, x, x + 0.1)["a second"]
    for share in shares:
        np.testing.assert_allclose(share["h"], raw / size, rtol=1e-4)


def test_feature_change_where_nothing_moved_is_not_a_number():
    x = interior_images(2)
    assert np.isnan(features.change(lambda x: {"x": x}, x, x)["x"]).all()
    moved = features.change(
        lambda x: {"x": x, "3x": 3 * x}, x, x + 0.1 * (np.arange(4) == 0)[:, None, None]
    )
    np.testing.assert_allclose(moved["x"], 1, rtol=1e-5)
    np.testing.assert_allclose(moved["3x"], 3, rtol=1e-5)


def test_captured_holds_the_layers_in_their_order():
    model = MLP(num_classes=3, hidden=(8, 6))
    x = interior_images(2)
    variables = jax.jit(model.init)(KEY, x)
    found = features.captured(model, variables)(x)
    assert {name: value.shape for name, value in found.items()} == {
        "dense1": (2, 8),
        "dense2": (2, 6),
        "features": (2, 6),
        "logits": (2, 3),
    }
    np.testing.assert_array_equal(found["logits"], model.apply(variables, x))
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        found["dense2"] @ head["kernel"] + head["bias"], found["logits"], rtol=1e-5
    )


class Foreign(nn.Module):
    """A network that sows nothing and calls a layer twice."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(20, name="layer")
        return layer(nn.relu(layer(x.reshape(len(x), -1))))


def test_captured_of_a_network_that_sows_nothing():
    x = interior_images(2)
    model = Foreign()
    variables = jax.jit(model.init)(KEY, x)
    assert list(features.captured(model, variables)(x)) == ["logits"]
    found = features.captured(model, variables, every_module=True)(x)
    assert list(found) == ["layer[0]", "layer[1]", "logits"]
    np.testing.assert_array_equal(found["layer[1]"], found["logits"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_points_are_at_that_distance_and_in_the_box(norm):
    x = interior_images(6)
    moved = features.point_at_distance(x, KEY, eps=0.05, norm=norm)
    np.testing.assert_allclose(sizes(moved, x, norm), 0.05, rtol=1e-4)
    far = features.point_at_distance(x, KEY, eps=3.0, norm=norm)
    assert far.min() >= 0 and far.max() <= 1
    one = features.point_at_distance(x[4:], jax.random.split(KEY, 6)[4:], eps=0.05, norm=norm)
    all_six = features.point_at_distance(x, jax.random.split(KEY, 6), eps=0.05, norm=norm)
    np.testing.assert_array_equal(one, all_six[4:])


# Calibration.


def test_calibration_worked_by_hand():
    p = [0.0, 0.5, 0.55, 0.6, 0.9, 1.0]
    correct = [True, True, False, True, True, False]
    curve = calibration.reliability(p, correct, num_bins=2)
    np.testing.assert_array_equal(curve.edges, [0, 0.5, 1])
    np.testing.assert_array_equal(curve.examples, [2, 4])  # 0.5 is the end of the first bin
    np.testing.assert_allclose(curve.confidence, [0.25, 3.05 / 4])
    np.testing.assert_allclose(curve.accuracy, [1, 0.5])
    error = calibration.expected_calibration_error(curve)
    assert error == pytest.approx((2 * 0.75 + 4 * (3.05 / 4 - 0.5)) / 6)


def test_calibration_error_of_the_sure_and_of_the_honest(rng):
    correct = rng.random(4000) < 0.7
    sure = calibration.reliability(np.ones(4000), correct)
    np.testing.assert_array_equal(sure.examples[:-1], 0)
    assert np.isnan(sure.accuracy[:-1]).all()
    assert calibration.expected_calibration_error(sure) == pytest.approx(1 - correct.mean())
    p = rng.random(4000)
    honest = calibration.reliability(p, rng.random(4000) < p)
    assert calibration.expected_calibration_error(honest) < 0.03
    order = rng.permutation(4000)
    mixed = calibration.reliability(p[order], correct[order])
    for a, b in zip(mixed, calibration.reliability(p, correct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    whole = calibration.reliability(p, correct, num_bins=1)
    error = calibration.expected_calibration_error(whole)
    assert error == pytest.approx(abs(correct.mean() - p.mean()))


def test_outcomes_are_those_of_the_records(rng):
    logits, y = rng.normal(size=(9, 4)) * 300, np.arange(9) % 4
    logits[0] = 0.0
    logits[1, 2] = np.inf
    found = calibration.outcomes(logits[[0, *range(2, 9)]], y[[0, *range(2, 9)]])
    args = jnp.float32(logits[[0, *range(2, 9)]]), jnp.asarray(y[[0, *range(2, 9)]])
    for name, fn in (("correct", losses.correct), ("confidence", losses.confidence)):
        np.testing.assert_allclose(found[name], fn(*args), atol=1e-4)
    np.testing.assert_allclose(found["entropy"], losses.entropy(args[0]), atol=1e-4)
    np.testing.assert_allclose(found["top_probability"], jax.nn.softmax(args[0]).max(-1), atol=1e-4)
    assert found["entropy"][0] == pytest.approx(np.log(4))


@pytest.mark.parametrize(
    ("row", "correct", "entropy"),
    [
        ([2.0, 0.0, -np.inf], True, 0.3653),  # a class that is ruled out
        ([np.inf, 0.0, 0.0], False, np.nan),
        ([-np.inf] * 3, False, np.nan),
        ([np.nan, 0.0, 0.0], False, np.nan),
    ],
)
def test_outcomes_of_logits_that_are_not_finite(row, correct, entropy):
    found = calibration.outcomes(np.array([row]), np.array([0]))
    assert found["correct"] == losses.correct(jnp.array([row]), jnp.array([0])) == correct
    np.testing.assert_allclose(found["entropy"], entropy, atol=1e-4)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "call",
    [
        calibration.outcomes,
        calibration.temperature,
        lambda z, y: margins.linear(z, np.zeros(3), z, y),
        lambda z, y: margins.lipschitz(z, y, {"head": Layer(z)}),
    ],
)
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([[0], [1], [2]]), r"not a column: y\[:, 0\]"),
        (np.eye(3), r"not one-hot: y.argmax\(-1\)"),
        (np.array([0, -1, 2]), "y has the label -1; the network has 3 classes"),
    ],
)
def test_labels_of_another_form_are_refused(call, y, message):
    with pytest.raises(ValueError, match=message):
        call(np.eye(3), y)


@pytest.mark.parametrize(
    ("p", "keywords", "message"),
    [
        ([0.5, 1.2], {}, r"in \[0, 1\]"),
        ([0.5, np.nan], {}, r"in \[0, 1\]"),
        ([0.5, 0.5], {"num_bins": 0}, "num_bins must be at least 1, not 0"),
    ],
)
def test_mistakes_about_calibration_are_told(p, keywords, message):
    with pytest.raises(ValueError, match=message):
        calibration.reliability(p, [True, False], **keywords)


# Latents.


@pytest.fixture(scope="module")
def blobs():
    """Three classes in five dimensions, far apart, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.repeat([2, 5, 7], 20)
    return np.repeat(10 * np.eye(5)[:3], 20, axis=0) + rng.normal(0, 0.2, (60, 5)), labels


def test_separated_blobs_are_seen_as_such(blobs):
    latents, labels = blobs
    assert latent.silhouette(latents, labels) > 0.9
    assert latent.distance_ratio(latents, labels) < 0.05
    shuffled = np.random.default_rng(1).permutation(labels)
    assert latent.silhouette(latents, shuffled) < 0.05
    assert latent.distance_ratio(latents, shuffled) > 1
    scaled = 7 * latents.reshape(60, 5, 1) + 3
    for measure in (latent.silhouette, latent.distance_ratio):
        assert measure(scaled, labels) == pytest.approx(measure(latents, labels))


def test_latent_numbers_worked_by_hand():
    # Two classes of two points on a line, their centres 1 and 9: each is 1 away from its own.
    latents, labels = np.array([[0.0], [2.0], [8.0], [10.0]]), np.array([0, 0, 1, 1])
    assert latent.distance_ratio(latents, labels) == pytest.approx(1 / 8)
    expected = np.mean([1 - 2 / 9, 1 - 2 / 7, 1 - 2 / 7, 1 - 2 / 9])
    assert latent.silhouette(latents, labels) == pytest.approx(expected)


def test_projection_keeps_what_lies_in_a_plane(rng):
    plane = rng.normal(size=(40, 2)) * [3, 1]
    axes, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    points = latent.projection(plane @ axes.T + 5)

    def distances(z):
        return np.linalg.norm(z[:, None] - z, axis=-1)

    np.testing.assert_allclose(distances(points), distances(plane), atol=1e-9)
    assert points[:, 0].var() > points[:, 1].var()


def test_tsne_keeps_clusters_apart_and_follows_its_seed(blobs):
    latents, labels = blobs
    points = latent.tsne(latents, seed=3)
    assert latent.silhouette(points, labels) > 0.6
    np.testing.assert_array_equal(points, latent.tsne(latents, seed=3))


def test_latents_of_a_collapsed_network_have_no_clusters(rng):
    points, labels = np.ones((40, 4)), np.arange(40) % 4
    np.testing.assert_array_equal(latent.tsne(points), np.zeros((40, 2)))
    assert np.isnan(latent.distance_ratio(points, labels))
    for few in (np.zeros(40, int), np.arange(40)):  # one class only, then no two of the same class
        assert np.isnan(latent.silhouette(rng.normal(size=(40, 4)), few))
    assert np.isnan(latent.distance_ratio(rng.normal(size=(40, 4)), np.zeros(40, int)))


# The loss surface.


def test_surface_meets_the_image_the_attack_and_points_in_between():
    logits_fn = make_nonlinear(KEY)
    x, y = interior_images(5), jnp.array([0, 1, 2, 0, 1])
    x_adv = pgd(logits_fn, x, y, KEY, eps=0.2, num_steps=5)
    direction = surface.random_direction(x, x_adv, KEY)
    move = np.asarray(x_adv - x).reshape(5, -1)
    across = np.asarray(direction).reshape(5, -1)
    np.testing.assert_allclose((move * across).sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(sizes(direction, 0 * x, "l2"), sizes(x_adv, x, "l2"), rtol=1e-5)
    a, b = [-0.5, 0.0, 0.5, 1.0], [-1.0, 0.0, 0.25]
    found = surface.loss_surface(
        logits_fn, x, y, x_adv, direction, along_adversarial=a, along_direction=b, chunk_size=2
    )
    assert found.shape == (5, 4, 3)
    np.testing.assert_allclose(found[:, 1, 1], losses.cross_entropy(logits_fn(x), y), rtol=1e-4)
    np.testing.assert_allclose(found[:, 3, 1], losses.cross_entropy(logits_fn(x_adv), y), rtol=1e-4)
    margin = surface.loss_surface(
        logits_fn,
        x,
        y,
        x_adv,
        direction,
        along_adversarial=a,
        along_direction=b,
        loss=losses.margin,
    )
    for i, j in np.ndindex(4, 3):
        points = x + a[i] * (x_adv - x) + b[j] * direction
        expected = losses.margin(logits_fn(points), y)
        np.testing.assert_allclose(margin[:, i, j], expected, rtol=1e-3, atol=1e-5)


def test_a_direction_of_many_pixels_of_16_bits_is_as_long_as_the_move():
    x = jnp.full((1, 300, 300, 3), 0.5, jnp.float16)
    direction = surface.random_direction(x, x + jnp.float16(1 / 128), KEY)
    assert direction.dtype == jnp.float16
    length = (3 * 300**2) ** 0.5 / 128
    np.testing.assert_allclose(sizes(direction, 0 * x, "l2"), length, rtol=1e-3)


def test_a_loss_has_one_number_an_example():
    x, y = jnp.full((2, 3), 0.5), jnp.array([0, 1])

    def mean(logits, labels):
        return losses.cross_entropy(logits, labels).mean()

    with pytest.raises(ValueError, match="leave out .mean"):
        surface.loss_along(lambda x: x, x, y, x, steps=(0, 1), loss=mean)
    with pytest.raises(ValueError, match="leave out .mean"):
        surface.loss_surface(
            lambda x: x, x, y, x, x, along_adversarial=(0, 1), along_direction=(0, 1), loss=mean
        )


def test_a_direction_from_an_attack_that_did_not_move_is_zero():
    x = interior_images(2)
    np.testing.assert_array_equal(surface.random_direction(x, x, KEY), 0 * x)


# Summaries.


def test_summary_leaves_out_and_counts_what_is_not_finite():
    values = [3.0, 1.0, np.inf, 2.0, -np.inf, 4.0, np.nan]
    assert summaries.summary(values, quantiles=(0.5, 0.025)) == {
        "count": 4,
        "not_finite": 3,
        "minimum": 1,
        "mean": 2.5,
        "maximum": 4,
        "standard_deviation": pytest.approx(np.sqrt(1.25)),
        "q50": 2.5,
        "q2.5": pytest.approx(1.075),
    }
    with pytest.raises(ValueError, match="none of 2 values is finite"):
        summaries.summary([np.nan, np.inf])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_temperature_scales_with_the_logits_and_is_the_least_where_all_are_right(scale, rng):
    logits, y = rng.normal(size=(200, 4)), rng.integers(4, size=200)
    temperature = calibration.temperature(logits, y)
    assert 1e-4 < temperature < 1e4
    assert calibration.temperature(scale * logits, y) == pytest.approx(
        np.clip(scale * temperature, 1e-4, 1e4), rel=1e-6
    )
    assert calibration.temperature(scale * logits, logits.argmax(-1)) == 1e-4
