"""A threat model is one record: everything works in a made-up norm that is given as one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_jax
from robust_jax import attacks, losses, margins
from robust_jax.analysis import features, spectra
from robust_jax.app.evaluator import Evaluator
from robust_jax.attacks import NORMS, norms
from robust_jax.attacks.norms import L1, LINF, Flat, ThreatModel, boundary_step
from tests.linear import POINTWISE, WITH_NORMS, interior_images, make_linear, nearest

KEY = jax.random.key(0)
SHAPE = (3, 4, 1)
# max_i w_i·|δ_i|, as if some pixels were known better than others.
WEIGHTS = jnp.linspace(0.5, 2, 12).reshape(SHAPE)
WEIGHTED = ThreatModel(
    name="weighted",
    size=lambda delta: LINF.size(WEIGHTS * delta),
    dual_size=lambda gradient: L1.size(gradient / WEIGHTS),
    project=lambda delta, eps, room: jnp.clip(delta, -eps / WEIGHTS, eps / WEIGHTS),
    steepest=lambda gradient: jnp.sign(gradient) / WEIGHTS,
    random_in_ball=lambda key, like, eps: LINF.random_in_ball(key, like, eps) / WEIGHTS,
    noise=lambda key, shape, dtype: LINF.noise(key, shape, dtype) / WEIGHTS,
    gaussian_size=lambda n: LINF.gaussian_size(n) * 2,
    l2_radius=lambda n: float(np.sqrt((1 / np.asarray(WEIGHTS) ** 2).sum())),
    to_boundary=boundary_step(lambda gradient: 1 / WEIGHTS),
    patches=Flat(),
)
EPS = 0.15
# The attacks that accept any record.
OPEN = sorted({name for name, norm in WITH_NORMS if norm == "linf"})
ASCENTS = ("apgd", "apgd_targeted", "bim", "fgsm", "mim", "multi_targeted", "pgd")


def problem(num_classes=2):
    logits_fn, weights, bias = make_linear(KEY, SHAPE, num_classes)
    x = interior_images(KEY, 6, SHAPE)
    return logits_fn, weights, bias, x, jnp.argmax(logits_fn(x), -1)


def sizes(x_adv, x):
    return np.abs(np.float64(WEIGHTS) * (np.float64(x_adv) - np.float64(x))).max((1, 2, 3))


@pytest.mark.parametrize("name", OPEN)
def test_every_attack_stays_in_its_ball_and_ascents_reach_its_optimum(name):
    logits_fn, weights, _, x, y = problem()
    steps = {"num_steps": 20, "step_size": 2 * EPS} if name in ("pgd", "multi_targeted") else {}
    x_adv = POINTWISE[name](logits_fn, x, y, KEY, eps=EPS, norm=WEIGHTED, **steps)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (sizes(x_adv, x) <= EPS * (1 + 1e-6)).all()
    np.testing.assert_allclose(attacks.distances(x, x_adv, norm=WEIGHTED), sizes(x_adv, x), 1e-4)
    if name in ASCENTS:
        dual = np.abs((weights[0] - weights[1]) / WEIGHTS.ravel()).sum()
        drop = losses.margin(logits_fn(x), y) - losses.margin(logits_fn(x_adv), y)
        np.testing.assert_allclose(drop, np.full(6, EPS * dual), rtol=1e-3)


def test_square_breaks_what_its_ball_reaches():
    logits_fn, _, _, x, y = problem(num_classes=4)
    x_adv = attacks.square(logits_fn, x, y, KEY, eps=EPS, norm=WEIGHTED)
    distance = np.asarray(margins.first_order(logits_fn, x, y, norm=WEIGHTED))
    broken = np.asarray(attacks.is_adversarial(logits_fn, x_adv, y))
    assert broken.any()
    assert (broken | (distance > 0.8 * EPS)).all()
    assert not (broken & (distance > EPS)).any()


def test_minimum_norm_attacks_and_margins_find_its_distances():
    logits_fn, weights, bias, x, y = problem(num_classes=4)
    y = y.at[0].set((y[0] + 1) % 4)
    w, logits = np.float64(weights), np.float64(logits_fn(x))
    expected = []
    for i in range(6):
        gaps = logits[i, y[i]] - np.delete(logits[i], y[i])
        slopes = np.abs((w[y[i]] - np.delete(w, y[i], 0)) / np.float64(WEIGHTS).ravel()).sum(-1)
        expected.append((gaps / slopes).min())
    assert expected[0] < 0 < min(expected[1:])
    for found in (
        margins.linear(weights, bias, x, y, norm=WEIGHTED),
        margins.first_order(logits_fn, x, y, norm=WEIGHTED),
        margins.first_order(logits_fn, x, y, norm=WEIGHTED, chunk_size=4),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    attacked = margins.minimum_norm(logits_fn, x, y, KEY, norm=WEIGHTED)
    np.testing.assert_allclose(attacked[1:], expected[1:], rtol=0.01)
    by_deepfool = nearest(attacks.deepfool, logits_fn, x, y, KEY, norm=WEIGHTED).distance
    np.testing.assert_allclose(by_deepfool[1:], expected[1:], rtol=0.03)
    head = {"head": spectra.Layer(weights.T)}
    guaranteed = margins.lipschitz(logits, y, head, norm=WEIGHTED)
    assert (np.abs(guaranteed) <= np.abs(expected) * (1 + 1e-6)).all()
    np.testing.assert_array_equal(np.sign(guaranteed), np.sign(expected))


def test_autoattack_and_noise_work_in_it():
    logits_fn, weights, _, x, y = problem(num_classes=4)
    overrides = {"square": {"num_queries": 20}, "fab_t": {"num_steps": 10}}
    result = attacks.autoattack(
        logits_fn, x, y, KEY, eps=EPS, norm=WEIGHTED, overrides=overrides, progress=False
    )
    first_order = np.asarray(margins.first_order(logits_fn, x, y, norm=WEIGHTED))
    np.testing.assert_array_equal(result.robust, first_order > EPS)
    assert 0 < result.robust.sum() < 6
    broken = ~result.robust
    np.testing.assert_allclose(result.distance[broken], sizes(result.x_adv, x)[broken], rtol=1e-4)
    moved = features.point_at_distance(x, KEY, eps=EPS, norm=WEIGHTED)
    np.testing.assert_allclose(sizes(moved, x), EPS, rtol=1e-4)


@pytest.mark.parametrize(
    ("attack", "field", "lack"),
    [("fab", "to_boundary", None), ("square", "patches", None), ("deepfool", "dense_steps", False)],
)
def test_an_attack_says_what_a_record_lacks(attack, field, lack):
    logits_fn, _, _, x, y = problem()
    norm = dataclasses.replace(WEIGHTED, **{field: lack})
    said = f"or a record with {field}, not 'weighted'"
    with pytest.raises(ValueError, match=said):
        POINTWISE[attack](logits_fn, x, y, KEY, eps=0.1, norm=norm)
    if attack != "deepfool":  # before anything is computed
        with pytest.raises(ValueError, match=said):
            attacks.autoattack(None, x, y, KEY, eps=0.1, norm=norm)


@pytest.mark.parametrize("name", norms.NORMS)
def test_many_pixels_of_16_bits_are_added_up_in_32(name):
    """Their sum overflows in float16, and their squares underflow."""
    norm, shape = norms.NORMS[name], (300, 300, 3)
    x = jnp.full(shape, 0.5, jnp.float16)
    for delta in (jnp.full(shape, 0.5, jnp.float16), jnp.full(shape, 1e-4, jnp.float16)):
        expected = float(norm.size(delta.astype(jnp.float32)))
        moved = jnp.zeros(shape, jnp.float16) + delta
        found = attacks.distances(0 * x[None], moved[None], norm=name)
        np.testing.assert_allclose(found, [expected], rtol=1e-3)
        shrunk = norm.project_to_ball_and_box(x + delta, x, expected / 2)
        size = norm.size(shrunk.astype(jnp.float32) - x.astype(jnp.float32))
        assert size <= expected / 2 * 1.001
    # In l1 each pixel's share is below the resolution of float16 at 0.5.
    black = jnp.zeros(shape, jnp.float16)
    for draw in (norm.random_on_sphere, norm.random_in_ball):
        size = norm.size(draw(KEY, black, 8.0).astype(jnp.float32))
        assert 0.9 * 8 < size < 8 * 1.001


def test_names_are_those_of_the_table():
    assert set(NORMS) == {"linf", "l2", "l1"}
    for name, record in NORMS.items():
        assert record.name == name
        assert norms.threat_model(name) is norms.threat_model(record) is record
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, not 'l0'"):
        norms.threat_model("l0")
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, l0, not 'l7'"):
        norms.measure("l7")


def test_a_record_is_evaluated_under_its_name(monkeypatch):
    """The audit gets the record too; tests/test_audit.py runs it."""
    logits_fn, _, _, x, y = problem(num_classes=3)
    few = {"version": ("apgd_ce",), "num_queries": 5, "progress": False}
    few["overrides"] = {"apgd_ce": {"num_steps": 5}}
    audits = []
    monkeypatch.setattr(Evaluator, "audit", lambda *arguments: audits.append(arguments))
    found = robust_jax.evaluate(logits_fn, x, y, KEY, eps=(EPS, 2 * EPS), norm=WEIGHTED, **few)
    assert found.card["threat_model"] == "Weighted"
    (_, _, settings, _), *others = audits
    assert settings.norm is WEIGHTED and not others
    margin = margins.first_order(logits_fn, x, y, norm=WEIGHTED)
    np.testing.assert_allclose(found.records["input_margin"], margin, rtol=1e-4)
    held = found.records[f"autoattack_weighted@{EPS:g}/held"].to_numpy(bool)
    assert not held[np.asarray(margin) < 0.9 * EPS].any()
