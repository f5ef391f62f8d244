"""Gradient attacks: optimal on linear models, inside ball and box, independent of the batch."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from robust_jax import attacks, losses
from robust_jax.attacks import NORMS
from robust_jax.attacks.norms import L1
from tests.calls import FEW
from tests.linear import (
    DUAL_ORDERS,
    ORDERS,
    POINTWISE,
    WITH_NORMS,
    interior_images,
    make_linear,
    make_nonlinear,
    norms_of,
    sizes,
)

KEY = jax.random.key(0)
# FAB, DeepFool and Carlini-Wagner look for the nearest adversarial, Square stops at its first,
# JSMA spends its budget on few pixels, noise has no aim: none continues to the rim of the ball.
OFF_THE_RIM = {
    "carlini_wagner",
    "deepfool",
    "fab",
    "gaussian_noise",
    "jsma",
    "square",
    "uniform_noise",
}
# From a random start the iterates turn towards the optimum faster with longer steps.
LONG_STEPS = ("pgd", "multi_targeted")
QUICK = {
    "apgd": {"num_steps": 20},
    "apgd_targeted": {"num_steps": 20},
    "carlini_wagner": {"num_steps": 30, "num_searches": 5},
    "fab": {"num_steps": 20, "num_restarts": 2},
    "multi_targeted": {"num_steps": 20},
    "pgd": {"num_steps": 20},
    "square": {"num_queries": 200},
}
SHAPE = (3, 5, 2)


def network(weights, x):
    flat = x.reshape(len(x), -1)
    hidden = jnp.tanh((flat - 0.5) @ weights["in"])
    return hidden @ weights["out"] + flat @ weights["linear"] + weights["bias"]


def of_kind(*, is_linear):
    """Weights of a smooth network, or of a linear one whose third class is out of reach."""
    rng, linear = np.random.default_rng(0), np.float32(is_linear)
    weights = {
        "in": (1 - linear) * rng.normal(size=(30, 16)) / 2,
        "out": (1 - linear) * rng.normal(size=(16, 3)),
        "linear": linear * rng.normal(size=(30, 3)) * [1, 1, 0],
        "bias": linear * np.array([0, 0, -1e3]),
    }
    return {name: np.float32(value) for name, value in weights.items()}


SMOOTH, LINEAR = of_kind(is_linear=False), of_kind(is_linear=True)
smooth = jax.jit(functools.partial(network, SMOOTH))


@functools.cache
def compiled(name, norm):
    """One program for both networks: attack(weights, x, y, keys, eps)."""

    @jax.jit
    def attack(weights, x, y, keys, eps):
        settings = QUICK.get(name, {}) | ({"step_size": 2 * eps} if name in LONG_STEPS else {})
        logits_fn = functools.partial(network, weights)
        return POINTWISE[name](logits_fn, x, y, keys, eps=eps, norm=norm, **settings)

    return attack


@jax.jit
def examples_and_keys(key):
    """Four examples and their keys; some pixels are close to the walls."""
    x = jax.random.uniform(key, (4, *SHAPE))
    return x, jax.random.randint(key, (4,), 0, 3), jax.random.split(key, 4)


@pytest.mark.parametrize(("name", "norm"), WITH_NORMS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(eps=st.floats(0, 3, width=32), seed=st.integers(0, 1000))
def test_stays_in_the_ball_and_the_box(name, norm, eps, seed):
    x, y, keys = examples_and_keys(jax.random.key(seed))
    x_adv = np.asarray(compiled(name, norm)(SMOOTH, x, y, keys, eps))
    assert x_adv.shape == x.shape
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    assert (sizes(x_adv, x, norm) <= eps * (1 + 1e-6)).all()
    if name == "fab":
        # FAB leaves what it cannot break, and a misclassified point is its own nearest adversarial.
        right_before, right_after = (np.asarray(smooth(z)).argmax(-1) == y for z in (x, x_adv))
        unchanged = right_after | ~right_before
        np.testing.assert_array_equal(x_adv[unchanged], x[unchanged])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", sorted({*POINTWISE} - OFF_THE_RIM))
def test_reaches_the_optimum_of_a_binary_linear_model(name, norm):
    """The best attack there moves by eps along the dual direction of w_other - w_y."""
    x, _, keys = examples_and_keys(KEY)
    x, eps = np.asarray(0.4 + 0.2 * x), 0.05  # no attack meets a wall
    logits = network(LINEAR, x)
    y = np.asarray(logits.argmax(-1))
    x_adv = compiled(name, norm)(LINEAR, x, y, keys, eps)
    one, other, _ = LINEAR["linear"].T
    dual = np.linalg.norm(one - other, DUAL_ORDERS[norm])
    drop = losses.margin(logits, y) - losses.margin(network(LINEAR, x_adv), y)
    np.testing.assert_allclose(drop, np.full(4, eps * dual), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *{name: (name, norm) for name, norm in reversed(WITH_NORMS)}.values(),
        *((name, "l1") for name in ("apgd", "apgd_targeted", "square", "fab")),
        *((name, "l2") for name in ("square", "deepfool")),
    ],
)
def test_result_is_independent_of_batch_size_and_company(name, norm):
    eps = {"linf": 0.2, "l2": 0.5, "l1": 1.0, "l0": 4.0}[norm]
    x, _, keys = examples_and_keys(KEY)
    y = smooth(x).argmax(-1)  # all are right, so that an attack has work to do
    attack = functools.partial(compiled(name, norm), SMOOTH)
    whole = attack(x, y, keys, eps)
    assert (whole != x).any((1, 2, 3)).sum() > 1
    for index in (np.array([2]), np.array([3, 1, 2, 1])):
        part = attack(x[index], y[index], keys[index], eps)
        np.testing.assert_allclose(part, whole[index], atol=1e-6)


# Each loss and each norm once, since what is kept depends on them separately.
PAIRS = [(loss, list(NORMS)[i % 3]) for i, loss in enumerate(losses.ATTACK_LOSSES)]


@pytest.mark.parametrize(
    ("loss", "norm"),
    [
        pytest.param(loss, norm, marks=[] if (loss, norm) in PAIRS else pytest.mark.slow)
        for loss in losses.ATTACK_LOSSES
        for norm in NORMS
    ],
)
def test_never_ends_below_its_start(norm, loss):
    logits_fn, loss_fn = make_nonlinear(KEY), losses.ATTACK_LOSSES[loss]
    rng = np.random.default_rng(0)
    x, y = rng.random((32, 4, 5, 1), np.float32), rng.integers(0, 3, 32, np.int32)

    @jax.jit
    def outcome(x):
        return losses.correct(logits_fn(x), y) == 0, loss_fn(logits_fn(x), y)

    # A huge step often makes the last iterate worse than the first.
    x_adv = attacks.pgd(
        logits_fn,
        x,
        y,
        KEY,
        eps=0.3,
        norm=norm,
        step_size=5.0,
        num_steps=4,
        random_start=False,
        loss=loss_fn,
    )
    (wrong_before, before), (wrong_after, after) = jax.device_get((outcome(x), outcome(x_adv)))
    assert (wrong_after | ~wrong_before).all()
    assert (after >= before - 1e-5)[wrong_before == wrong_after].all()


@pytest.mark.parametrize("norm", NORMS)
def test_elementwise_network_is_bit_for_bit_independent_of_the_batch(norm):
    """Without matrix products, whose blocking depends on the batch, not a bit may differ."""

    def logits_fn(x):
        s = (jnp.sin(7 * x) * jnp.arange(1.0, 21).reshape(4, 5, 1)).sum((1, 2, 3))
        return jnp.stack([s, -s, 0.3 * s**2], -1)

    x = jax.random.uniform(KEY, (9, 4, 5, 1))
    y = jnp.arange(9) % 3
    keys = jax.random.split(KEY, 9)
    attack = jax.jit(lambda x, y, k: attacks.pgd(logits_fn, x, y, k, eps=0.1, norm=norm))
    np.testing.assert_array_equal(attack(x, y, keys)[4:6], attack(x[4:6], y[4:6], keys[4:6]))


def test_one_key_is_folded_with_the_place_in_the_batch():
    logits_fn = make_nonlinear(KEY)
    x = jnp.broadcast_to(jax.random.uniform(KEY, (1, 4, 5, 1)), (3, 4, 5, 1))
    y = jnp.zeros(3, jnp.int32)
    x_adv = attacks.pgd(logits_fn, x, y, KEY, eps=0.1, num_steps=1, step_size=0.0, keep_best=False)
    assert np.abs(x_adv[0] - x_adv[1]).max() > 1e-3  # different starts
    folded = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(3))
    again = attacks.pgd(
        logits_fn, x, y, folded, eps=0.1, num_steps=1, step_size=0.0, keep_best=False
    )
    np.testing.assert_array_equal(x_adv, again)


def test_more_restarts_never_hurt_and_stronger_attacks_break_more():
    logits_fn = make_nonlinear(jax.random.key(4))
    x = jax.random.uniform(KEY, (200, 4, 5, 1))
    y = jnp.argmax(logits_fn(x), -1)

    def accuracy(name, **keywords):
        x_adv = POINTWISE[name](logits_fn, x, y, KEY, eps=0.1, **keywords)
        return float(losses.correct(logits_fn(x_adv), y).mean())

    fgsm, pgd = accuracy("fgsm"), accuracy("pgd", num_steps=20, num_restarts=5)
    assert 0.05 < pgd <= fgsm < 0.95
    # Restarts are split from one key, so five restarts do not contain the single one.
    assert pgd <= accuracy("pgd", num_steps=2)


def test_targeted_attack_goes_to_its_target():
    logits_fn, _, _ = make_linear(KEY, num_classes=4)
    x = interior_images(KEY, 16)
    y = jnp.argmax(logits_fn(x), -1)
    targets = (y + 2) % 4
    x_adv = attacks.pgd(logits_fn, x, y, KEY, eps=0.5, num_steps=40, targets=targets)
    assert (jnp.argmax(logits_fn(x_adv), -1) == targets).mean() > 0.9


def test_kl_attack_leaves_the_clean_prediction():
    """The TRADES adversary: y is the clean logits."""
    logits_fn = make_nonlinear(KEY)
    x = interior_images(KEY, 16)
    clean = logits_fn(x)
    x_adv = attacks.pgd(logits_fn, x, clean, KEY, eps=0.1, loss=losses.kl, criterion=attacks.never)
    assert (losses.kl(logits_fn(x_adv), clean) > 1e-4).all()


TAKE_A_CRITERION = sorted(
    name
    for name, attack in POINTWISE.items()
    if "criterion" in inspect.signature(attack).parameters
)


@pytest.mark.parametrize("name", TAKE_A_CRITERION)
def test_a_criterion_says_what_counts_before_the_loss(name):
    """The loss pulls away from misclassified points; the default keeps them anyway."""
    logits_fn = make_nonlinear(KEY)
    x = jax.device_put(jax.random.uniform(KEY, (40, 4, 5, 1)), jax.devices()[0])
    y = jnp.argmax(logits_fn(x), -1)
    keywords = {"num_queries": 30} if name == "square" else {}
    keywords |= {"num_samples": 5} if "noise" in name else {}

    def away(logits, y):
        return -losses.cross_entropy(logits, y)

    # Any function of outputs and labels will do: here, that class 0 wins by 1/2.
    def by_half(logits, y):
        return losses.margin(logits, 0 * y) > 0.5

    def attack(x, **criterion):
        return POINTWISE[name](logits_fn, x, y, KEY, eps=0.3, **keywords, **criterion, loss=away)

    @jax.jit
    def found(which, x):
        """One program for all criteria."""
        table = (attacks.never, attacks.misclassified, by_half)
        x_adv = attack(x, criterion=lambda z, y: jax.lax.switch(which, table, z, y))
        logits = logits_fn(x_adv)
        return losses.cross_entropy(logits, y), logits.argmax(-1) != y, by_half(logits, y)

    (loss, wrong, _), (default_loss, default_wrong, few), (*_, many) = (
        jax.device_get(found(which, x)) for which in range(3)
    )
    assert (default_wrong | ~wrong).all()
    if name != "square":  # Square stops at its first success
        assert (loss <= default_loss + 1e-5).all()
    if name not in ("fgsm", "bim", "mim"):  # they start at x, where the loss is low already
        assert default_wrong.sum() > wrong.sum()
    assert many.sum() >= few.sum()
    by_default = jax.make_jaxpr(attack)(x)
    assert str(by_default) == str(
        jax.make_jaxpr(functools.partial(attack, criterion=attacks.misclassified))(x)
    )


def test_a_loss_that_compares_outputs_needs_a_criterion_without_labels():
    logits_fn = make_nonlinear(KEY)
    x = interior_images(KEY, 2)
    attack = functools.partial(attacks.pgd, logits_fn, eps=0.1, loss=losses.kl)
    with pytest.raises(
        ValueError, match=r"labels \[B\], and these are float32 \[1, 3\]; .*attacks.never"
    ):
        jax.eval_shape(attack, x, logits_fn(x), KEY)


BY_GRADIENTS = [
    (name, norm)
    for name, norm in WITH_NORMS
    if name not in ("square", "uniform_noise", "gaussian_noise", "fab", "jsma")
]


@pytest.mark.parametrize(("name", "norm"), [*BY_GRADIENTS, ("fab", "linf")])
def test_an_infinite_gradient_is_followed(name, norm):
    """A square root has one at black pixels, and several pixels are black."""

    def logits_fn(x):
        rooted = jnp.sqrt(x).sum(-1)
        return jnp.stack([jnp.full(len(x), 0.52), rooted, -jnp.ones(len(x))], -1)

    # FAB and Adam drop infinite entries, which leaves nothing of a gradient that is all infinite.
    images = [[0.0, 0.0, 0.25, 0.0], *([] if name in ("fab", "carlini_wagner") else [[0.0] * 4])]
    x, y = jnp.array(images), jnp.zeros(len(images), jnp.int32)
    few = {"num_steps": 10} if "num_steps" in FEW.get(name, {}) else {}
    few |= {"random_start": False} if name == "pgd" else {}
    few |= {"num_searches": 5, "num_steps": 50} if name == "carlini_wagner" else {}
    eps = 0.3 if name != "fab" else np.inf
    x_adv = POINTWISE[name](logits_fn, x, y, KEY, eps=eps, norm=norm, **few)
    assert attacks.is_adversarial(logits_fn, x_adv, y).all()


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *((name, norm) for name in ("apgd", "bim") for norm in NORMS),
        ("jsma", "l0"),
        ("multi_targeted", "linf"),
    ],
)
def test_zero_and_nan_gradients_are_survived(name, norm):
    x, y = interior_images(KEY, 3), jnp.zeros(3, jnp.int32)
    for value in (np.zeros(1), np.full(1, np.nan)):  # arrays, so that both share one program
        x_adv = POINTWISE[name](
            lambda x, v=value: jnp.zeros((x.shape[0], 3)) + v * x.sum((1, 2, 3))[:, None],
            x,
            y,
            KEY,
            eps=0.1 if norm != "l0" else 10,
            norm=norm,
            **FEW.get(name, {}),
        )
        assert np.isfinite(x_adv).all()
        assert (sizes(x_adv, x, norm) <= 0.1 * (1 + 1e-6)).all()
        if name in ("bim", "jsma"):
            np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize("name", POINTWISE)
def test_the_settings_that_attacks_share_are_checked_in_a_trace_too(name):
    """In a trace the front door does not check radii and counts."""
    logits_fn, _, _ = make_linear(KEY)
    norms = ", ".join(norms_of(POINTWISE[name]))
    counts = [n for n in inspect.signature(POINTWISE[name]).parameters if n.startswith("num_")]
    mistakes = [
        ({"eps": -0.1}, "eps must not be negative, not -0.1"),
        ({"norm": "l7"}, f"norm must be (one of )?{norms}, not 'l7'"),
        *(({n: 0}, f"{n} must be a whole number of at least 1, not 0") for n in counts),
    ]
    for keywords, message in mistakes:
        attack = functools.partial(POINTWISE[name], logits_fn, **{"eps": 0.1, **keywords})
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(attack, interior_images(KEY, 2), jnp.zeros(2, jnp.int32), KEY)


def test_attacks_any_framework_through_logits_fn():
    x = interior_images(KEY, 4, (6, 6, 1))
    y = jnp.zeros(4, jnp.int32)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    linen = Linen()
    variables = linen.init(KEY, x)
    net = nnx.Linear(36, 3, rngs=nnx.Rngs(0))
    plain, _, _ = make_linear(KEY, (6, 6, 1))
    for logits_fn in (
        lambda x: linen.apply(variables, x),
        lambda x: net(x.reshape(x.shape[0], -1)),
        plain,
    ):
        before = losses.cross_entropy(logits_fn(x), y)
        x_adv = attacks.pgd(logits_fn, x, y, KEY, eps=0.1)
        assert (losses.cross_entropy(logits_fn(x_adv), y) > before).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"eps": 0.1, "step_size": -1.0}, "step_size must not be negative"),
        ({"eps": 0.1, "momentum": 2.0}, "momentum"),
        ({"eps": 0.1, "num_restarts": 2, "keep_best": False}, "keep_best=True"),
    ],
)
def test_mistakes_are_told(keywords, message):
    logits_fn, _, _ = make_linear(KEY)
    with pytest.raises(ValueError, match=message):
        attacks.pgd(logits_fn, interior_images(KEY, 2), jnp.zeros(2, jnp.int32), KEY, **keywords)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball(norm):
    like = jnp.zeros((2, 1, 1))
    draw = jax.vmap(lambda k: NORMS[norm].random_in_ball(k, like, 0.5))
    points = np.asarray(draw(jax.random.split(KEY, 4000))).reshape(-1, 2)
    radii = np.linalg.norm(points, ORDERS[norm], axis=-1)
    assert radii.max() <= 0.5 + 1e-6
    # Uniform in two dimensions: a quarter of the mass is within half the radius.
    np.testing.assert_allclose((radii < 0.25).mean(), 0.25, atol=0.03)
    mean = {"linf": 1 / 2, "l2": 4 / (3 * np.pi), "l1": 1 / 3}[norm]
    np.testing.assert_allclose(np.abs(points).mean(0), 0.5 * mean, atol=0.01)
    np.testing.assert_allclose(points.mean(0), 0, atol=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_direction_gains_the_dual_norm(norm):
    gradient = jax.random.normal(KEY, (3, 2, 2))
    threat = NORMS[norm]
    direction = threat.steepest(gradient)
    np.testing.assert_allclose(threat.size(direction), 1, rtol=1e-6)
    gain = np.linalg.norm(gradient.ravel(), DUAL_ORDERS[norm])
    np.testing.assert_allclose((direction * gradient).sum(), gain, rtol=1e-5)
    np.testing.assert_allclose(threat.dual_size(gradient), gain, rtol=1e-6)
    np.testing.assert_array_equal(threat.steepest(0 * gradient), 0 * gradient)


@pytest.mark.parametrize("length", [0.0, 0.3, 2.0, 9.0])
def test_the_steepest_step_of_l1_is_that_of_a_linear_program(length, rng):
    x, gradient = rng.uniform(size=8), rng.normal(size=8)
    x[:2], gradient[4] = (0, 1), 0
    up_and_down = np.r_[gradient, -gradient]
    best = optimize.linprog(
        -up_and_down, np.ones((1, 16)), [length], bounds=[(0, room) for room in [*(1 - x), *x]]
    )
    as_image = functools.partial(jnp.reshape, shape=(2, 2, 2))
    step = L1.steepest_step(*map(as_image, (jnp.float32(x), jnp.float32(gradient))), length)
    np.testing.assert_allclose((step.ravel() * gradient).sum(), -best.fun, atol=1e-5)
    assert np.abs(step).sum() <= length + 1e-6
    assert (np.abs(x + step.ravel() - 0.5) <= 0.5 + 1e-6).all()


def nearest_in_l1(delta, low, high, eps):
    """Bisects, in float64, how much every entry is shrunk before it is clipped."""

    def shrunk(by):
        return np.clip(np.sign(delta) * np.maximum(np.abs(delta) - by, 0), low, high)

    none, all_of_it = 0.0, np.abs(delta).max()
    for _ in range(100):
        middle = (none + all_of_it) / 2
        enough = np.abs(shrunk(middle)).sum() <= eps
        none, all_of_it = (none, middle) if enough else (middle, all_of_it)
    return shrunk(none if np.abs(shrunk(0.0)).sum() <= eps else all_of_it)


project_l1 = jax.jit(lambda delta, eps: L1.project(delta, eps, jnp.full_like(delta, jnp.inf)))
project_l1_and_box = jax.jit(jax.vmap(L1.project_to_ball_and_box))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    reach=st.sampled_from([0.1, 1.0, 10.0]),
    eps=st.sampled_from([0.0, 0.01, 0.5, 3.0, 30.0, 1000.0]),
)
def test_projection_onto_the_l1_ball_and_the_box_is_the_nearest_point(seed, reach, eps):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(2, 4, 5, 2)).round(1).astype(np.float32)  # some pixels at the walls
    x_adv = (x + reach * rng.normal(size=x.shape)).astype(np.float32)
    x_adv[0, 0] = x[0, 0] + 0.5  # ties
    found = np.asarray(project_l1_and_box(x_adv, x, np.full(2, eps, np.float32)))
    delta, centre = np.float64(x_adv) - x, np.float64(x)
    for i in range(2):
        for low, high, got in (
            (-centre[i], 1 - centre[i], found[i] - centre[i]),
            (-np.inf, np.inf, project_l1(jnp.float32(delta[i]), eps)),
        ):
            nearest = nearest_in_l1(delta[i], low, high, eps)
            # A little inside, so that rounding never leaves the ball.
            within = nearest * min(1, eps * (1 - 4e-6) / max(np.abs(nearest).sum(), 1e-30))
            np.testing.assert_allclose(got, within, atol=2e-6 * max(reach, 1))
    assert (np.abs(found - 0.5) <= 0.5).all()
    assert (sizes(found, x, "l1") <= eps * (1 + 1e-6)).all()
    if eps == 1000:
        np.testing.assert_allclose(found, np.clip(x_adv, 0, 1), atol=1e-6)
