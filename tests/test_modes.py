"""Every attack, margin and analysis in any dtype, shape and mode of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_jax
from robust_jax import attacks, losses, margins
from robust_jax.analysis import features, surface
from tests.conftest import slow_but, strictly
from tests.linear import POINTWISE, WITH_NORMS, norms_of, sizes
from tests.small_networks import NETWORKS

KEY = jax.random.key(0)
NUM_CLASSES = 5
IMAGES, ROWS = (3, 4, 1), (5,)
QUICK = {
    "apgd": {"num_steps": 3, "num_restarts": 2},
    "apgd_targeted": {"num_steps": 3, "num_targets": 2},
    "bim": {"num_steps": 2},
    "carlini_wagner": {"num_steps": 2, "num_searches": 2},
    "deepfool": {"num_steps": 2},
    "fab": {"num_steps": 2, "num_targets": 2, "num_restarts": 2},
    "gaussian_noise": {"num_samples": 2},
    "mim": {"num_steps": 2},
    "multi_targeted": {"num_steps": 1, "num_targets": 2},
    "pgd": {"num_steps": 2, "num_restarts": 2},
    "square": {"num_queries": 3, "num_restarts": 2},
    "uniform_noise": {"num_samples": 2},
}
RADII = {"linf": 0.1, "l2": 0.3, "l1": 1.0, "l0": 4.0}
# Each attack with the first of its norms.
ONE_NORM = dict(reversed(WITH_NORMS))
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float64)
# The other attacks run in float64 within AutoAttack and the audit, or are PGD with other settings.
IN_FLOAT64 = ("carlini_wagner", "deepfool", "gaussian_noise", "jsma", "multi_targeted")
# Covers each attack in both half precisions and each norm, in another norm each time.
COVERING = [
    (name, norms[(i + j) % len(norms)], dtype)
    for i, (name, norms) in enumerate((name, norms_of(fn)) for name, fn in POINTWISE.items())
    for j, dtype in enumerate(DTYPES if name in IN_FLOAT64 else DTYPES[:2])
]
EVERY = [(name, norm, dtype) for name, norm in WITH_NORMS for dtype in DTYPES]


def problem(shape, dtype, device=None):
    """A linear network that computes in the dtype of its input, four examples and their labels.

    Its weights are a NumPy array, or on the device.
    """
    weights = np.random.default_rng(0).normal(size=(np.prod(shape), NUM_CLASSES))

    def logits_fn(x):
        return jnp.reshape(x, (len(x), -1)) @ jnp.asarray(weights, x.dtype)

    # Every dtype holds these pixels exactly.
    x = np.random.default_rng(1).integers(0, 65, (4, *shape)) / 64
    y = (x.reshape(4, -1) @ weights).argmax(-1)
    y[0] = 0
    if device:
        weights = jax.device_put(weights, device)
    return logits_fn, jnp.asarray(x, dtype), jnp.asarray(y, jnp.int32)


def called(name, norm, shape, dtype, **fewer):
    """attack(x, y, key, eps=…), and its arguments."""
    logits_fn, x, y = problem(shape, dtype)
    settings = {**QUICK.get(name, {}), **fewer}

    def attack(x, y, key, *, eps):
        return POINTWISE[name](logits_fn, x, y, key, eps=eps, norm=norm, **settings)

    return attack, x, y, jax.random.key(2)


def assert_inside(x, x_adv, norm):
    assert x_adv.dtype == x.dtype and x_adv.shape == x.shape
    assert ((np.asarray(x_adv) >= 0) & (np.asarray(x_adv) <= 1)).all()
    # Each pixel is rounded towards x, but earlier rounding in 16 bits may add up over pixels.
    rounding = 1e-6 if norm == "linf" or x.dtype.itemsize > 2 else 1e-3
    assert (sizes(x_adv, x, norm) <= RADII[norm] * (1 + rounding)).all()


def assert_dtype_is_kept(name, norm, shape, dtype, eps):
    """Only traces: loop carries and type promotion are known without a compilation."""
    with strictly(), jax.enable_x64(True):
        attack, *arguments = called(name, norm, shape, dtype)
        assert jax.eval_shape(lambda *a: attack(*a, eps=eps), *arguments).dtype == dtype


@pytest.mark.parametrize(("name", "norm"), WITH_NORMS)
def test_attacks_keep_float64(name, norm):
    # A radius of another dtype, as a compiled program takes it.
    assert_dtype_is_kept(name, norm, IMAGES, jnp.float64, jnp.float32(RADII[norm]))


@pytest.mark.parametrize(("name", "norm"), ONE_NORM.items())
def test_attacks_keep_float32_where_float64_is_on(name, norm):
    shape = IMAGES if name == "square" else ROWS
    assert_dtype_is_kept(name, norm, shape, jnp.float32, RADII[norm])


@pytest.mark.parametrize(
    ("name", "norm", "dtype"),
    [pytest.param(*c, marks=[] if c in COVERING else pytest.mark.slow) for c in EVERY],
)
def test_attacks_work_in_other_precisions_where_jax_is_strict(name, norm, dtype):
    with strictly(), jax.enable_x64(dtype == jnp.float64):
        attack, x, y, key = called(name, norm, IMAGES, dtype)
        x = jax.device_put((np.asarray(x) * np.asarray(0.97, dtype)), jax.devices()[0])
        x_adv = attack(x, y, key, eps=RADII[norm])  # a plain call
        assert_inside(x, x_adv, norm)


# These are PGD with other settings, or APGD with other losses.
LIKE_ANOTHER = ("apgd_targeted", "bim", "fgsm", "mim", "multi_targeted", "uniform_noise")


@pytest.mark.parametrize("name", slow_but([n for n in ONE_NORM if n not in LIKE_ANOTHER], ONE_NORM))
def test_attacks_work_on_rows_and_without_jit(name):
    norm = ONE_NORM[name]
    shape = IMAGES if name == "square" else ROWS
    # Each shape is compiled separately here, and the tests above cover restarts.
    fewer = {"num_restarts": 1} if "num_restarts" in QUICK.get(name, {}) else {}
    attack, x, y, key = called(name, norm, shape, jnp.float32, **fewer)
    with jax.disable_jit():
        x_adv = attack(x, y, key, eps=RADII[norm])
    assert_inside(x, x_adv, norm)
    expected = jax.jit(attack)(x, y, key, eps=RADII[norm])
    np.testing.assert_allclose(x_adv, expected, atol=1e-5)


STEEP = [
    *(("pgd", norm, {"loss": losses.margin_loss}) for norm in ("linf", "l2", "l1")),
    ("fab", "linf", {"num_targets": None}),
    ("deepfool", "linf", {}),
]


@pytest.mark.parametrize(("name", "norm", "settings"), STEEP)
def test_attacks_follow_gradients_whose_sum_float16_does_not_hold(name, norm, settings):
    logits_fn, x, y, exact = steep_problem()
    radius = 4 * RADII[norm]
    x_adv = POINTWISE[name](
        logits_fn, x, y, jax.random.key(2), eps=radius, norm=norm, num_steps=4, **settings
    )
    assert attacks.is_adversarial(logits_fn, x_adv, y).all()
    if name != "pgd":  # PGD does not look for the nearest point
        assert (sizes(x_adv, x, norm) < 1.3 * exact).all()


def test_margins_follow_gradients_whose_sum_float16_does_not_hold():
    logits_fn, x, y, exact = steep_problem()
    first = margins.first_order(logits_fn, x, y)
    sampled = margins.clever(logits_fn, x, jax.random.key(0), norm="linf", num_samples=1)
    for found in (first, sampled):
        np.testing.assert_allclose(found, exact, rtol=0.02)


def steep_problem():
    """A linear network, four examples far from its boundaries, their labels and margins in linf."""
    rng = np.random.default_rng(0)
    weights = 2000 * rng.normal(size=(64, NUM_CLASSES))
    assert np.abs(weights).sum(0).min() > np.finfo(np.float16).max

    def logits_fn(x):
        return (jnp.reshape(x, (len(x), -1)) - 0.5) @ jnp.asarray(weights, x.dtype)

    x = 0.5 + rng.integers(-8, 9, (40, 8, 8, 1)) / 64
    y = ((x.reshape(40, -1) - 0.5) @ weights).argmax(-1)
    exact = margins.linear(weights.T, -0.5 * weights.sum(0), x, y)
    far = np.argsort(exact)[-4:]
    return logits_fn, jnp.asarray(x[far], jnp.float16), jnp.asarray(y[far]), exact[far]


def feature_change(logits_fn, x, y, key):
    moved = jnp.clip(x + 1 / 8, 0, 1)
    return features.change(lambda x: {"logits": logits_fn(x)}, x, moved)["logits"]


def loss_surface(logits_fn, x, y, key):
    return surface.loss_surface(
        logits_fn, x, y, jnp.clip(x + 1 / 8, 0, 1), x / 8,
        along_adversarial=(0.0, 1.0, 2.0), along_direction=(0.0, 1.0),
    )  # fmt: skip


def minimum_norm(logits_fn, x, y, key):
    nearest = functools.partial(attacks.fab, num_steps=5)
    return margins.minimum_norm(logits_fn, x, y, key, norm="l2", attack=nearest)


# Numbers per example that are the same in every dtype up to rounding.
MEASURES = {
    "first order in linf": lambda f, x, y, key: margins.first_order(f, x, y),
    "first order in l2": lambda f, x, y, key: margins.first_order(f, x, y, norm="l2"),
    "first order in l1": lambda f, x, y, key: margins.first_order(f, x, y, norm="l1", chunk_size=3),
    "truncated": lambda f, x, y, key: margins.truncate(margins.boundary_distances(f, x, y), 0.1),
    "minimum norm": minimum_norm,
    # Exact for a linear network, whatever is drawn.
    "clever": lambda f, x, y, key: margins.clever(f, x, key, num_samples=2),
    "feature change": feature_change,
    "loss surface": loss_surface,
    "distances": lambda f, x, y, key: attacks.distances(x, x[::-1], norm="l2"),
}


@functools.cache
def measured(name, dtype):
    with strictly(), jax.enable_x64(dtype == jnp.float64):
        logits_fn, x, y = problem(ROWS, dtype)
        found = MEASURES[name](logits_fn, x, y, jax.random.key(2))
        assert found.dtype == jnp.float64 or dtype != jnp.float64
        return np.asarray(found, np.float64)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, pytest.param(jnp.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_float64(name, dtype):
    expected = measured(name, jnp.float64)
    assert np.isfinite(expected).any()
    tolerance = max(20 * float(jnp.finfo(dtype).eps), 1e-4)
    np.testing.assert_allclose(measured(name, dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_points_have_the_dtype_of_x(dtype):
    with strictly(), jax.enable_x64(dtype == jnp.float64):
        logits_fn, x, y = problem(ROWS, dtype)
        key = jax.random.key(2)
        for norm, radius in (("linf", 1 / 16), ("l2", 1 / 8), ("l1", 1 / 4)):
            moved = features.point_at_distance(x, key, eps=radius, norm=norm)
            assert_inside(x, moved, norm)
        direction = surface.random_direction(x, moved, key)
        transferred = attacks.transfer(logits_fn, x, y, key, surrogate=logits_fn, eps=0.1)
        assert_inside(x, transferred, "linf")
        assert direction.dtype == dtype
        assert attacks.is_adversarial(logits_fn, x, y).dtype == bool


def test_autoattack_keeps_the_dtype_and_takes_rows(tmp_path):
    for dtype in (jnp.float64, jnp.bfloat16, jnp.float32):
        with strictly(), jax.enable_x64(dtype != jnp.bfloat16):
            logits_fn, x, y = problem(ROWS, dtype)
            run = functools.partial(
                attacks.autoattack, logits_fn, x, y, KEY, eps=RADII["linf"], progress=False,
                version=("apgd_ce", "fab_t"), state_path=tmp_path / f"{x.dtype}.npz",
                overrides={"apgd_ce": {"num_steps": 5}, "fab_t": {"num_steps": 5}},
            )  # fmt: skip
            result = run()
            assert_inside(x, result.x_adv, "linf")
            assert 0 < result.robust.sum() < 4
            np.testing.assert_array_equal(run().x_adv, result.x_adv)  # resumed from its state


# float32 with x64 enabled, as another library may have done.
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16, jnp.float32])
def test_the_audit_takes_any_dtype(dtype):
    """Also takes a convolution, other kinds of keys, and weights on one of several devices."""
    convolution = NETWORKS["lax convolution"](0)
    key = jax.random.key(0, impl="rbg") if dtype == jnp.bfloat16 else KEY
    with strictly(), jax.enable_x64(dtype != jnp.bfloat16):
        logits_fn, x, y = problem(IMAGES, dtype, device=jax.devices()[0])
        if dtype == jnp.float32:
            logits_fn, y = convolution, convolution(x).argmax(-1)
        found = robust_jax.audit(
            logits_fn, x, y, key, eps=1 / 8, num_queries=3, surrogates={"itself": logits_fn},
            progress=False,
        )  # fmt: skip
    assert jax.local_device_count() == 8
    assert "skipped" not in {check.verdict for check in found.checks}


def test_a_network_that_computes_in_half_precision_is_measured():
    logits_fn, x, y = problem(ROWS, jnp.float32)
    exact = margins.clever(logits_fn, x, KEY, num_samples=2)
    found = margins.clever(lambda x: logits_fn(x.astype(jnp.bfloat16)), x, KEY, num_samples=2)
    np.testing.assert_allclose(found, exact, rtol=0.05, atol=0.05)
