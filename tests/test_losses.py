"""Every loss against an independent float64 formula, its gradient, and its limits."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads
from scipy.special import softmax

from robust_jax import losses

K = 5


def reference_cross_entropy(z, y, smoothing=0.0):
    p = softmax(z)
    target = np.full(len(z), smoothing / len(z))
    target[y] += 1 - smoothing
    return -(target * np.log(p)).sum()


def reference_gce(z, y, alpha=1 / 3):
    p = softmax(z)
    q = np.delete(p, y) / (1 - p[y])
    return p[y] ** alpha * (q * np.log(q)).sum() / np.log(len(z) - 1)


def reference_gce_published(z, y, alpha=1 / 3):
    """github.com/henry8527/GCE line by line, for any number of classes."""
    p = softmax(z)
    q = np.delete(p, y) / (np.delete(p, y).sum() + 1e-7)
    return (p[y] + 1e-7) ** alpha * (q * np.log(q + 1e-10)).sum() / np.log(len(z))


def reference_complement_entropy(z, y):
    q = np.delete(softmax(z), y) / (1 - softmax(z)[y])
    return -(q * np.log(q)).sum()


def reference_boosted(z, y):
    p = softmax(z)
    return -np.log(p[y]) - np.log(1 - np.delete(p, y).max())


def reference_margin(z, y):
    return z[y] - np.delete(z, y).max()


def reference_dlr(z, y):
    ordered = np.sort(z)[::-1]
    return -reference_margin(z, y) / (ordered[0] - ordered[2])


CASES = {
    "cross_entropy": (losses.cross_entropy, reference_cross_entropy),
    "label_smoothing": (
        lambda z, y: losses.cross_entropy(z, y, label_smoothing=0.3),
        lambda z, y: reference_cross_entropy(z, y, 0.3),
    ),
    "gce": (losses.guided_complement_entropy, reference_gce),
    "gce_alpha_0": (
        lambda z, y: losses.guided_complement_entropy(z, y, alpha=0.0),
        lambda z, y: reference_gce(z, y, 0.0),
    ),
    "gce_published": (
        losses.ATTACK_LOSSES["guided_complement_entropy_published"],
        reference_gce_published,
    ),
    "complement_entropy": (losses.complement_entropy, reference_complement_entropy),
    "boosted": (losses.boosted_cross_entropy, reference_boosted),
    "margin": (losses.margin, reference_margin),
    "margin_loss": (losses.margin_loss, lambda z, y: -reference_margin(z, y)),
    "dlr": (losses.dlr, reference_dlr),
    "confidence": (losses.confidence, lambda z, y: softmax(z)[y]),
}


@pytest.fixture
def batch(rng):
    return rng.normal(size=(64, K)) * 4, rng.integers(0, K, 64)


@pytest.mark.parametrize("name", CASES)
def test_value_is_the_float64_formula(name, batch):
    logits, labels = batch
    ours, reference = CASES[name]
    got = jax.jit(ours)(np.float32(logits), labels)
    expected = [reference(z, y) for z, y in zip(logits, labels, strict=True)]
    chex.assert_shape(got, (64,))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_numerical_one(name, batch):
    logits, labels = batch
    check_grads(
        jax.jit(lambda z: CASES[name][0](z, labels[:8])),
        (np.float32(logits[:8]),),
        order=1,
        modes=("rev", "fwd"),
        atol=2e-2,
        rtol=2e-2,
    )


def test_entropy_and_kl(batch):
    logits, _ = batch
    p = softmax(logits, axis=-1)
    entropy = jax.jit(losses.entropy)
    expected = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(entropy(np.float32(logits)), expected, rtol=1e-3, atol=1e-5)
    other = logits[::-1].copy()
    q = softmax(other, axis=-1)
    got = jax.jit(losses.kl)(np.float32(logits), np.float32(other))
    np.testing.assert_allclose(got, (q * np.log(q / p)).sum(-1), rtol=1e-3, atol=1e-4)
    check_grads(entropy, (np.float32(logits[:4]),), order=2, atol=2e-2, rtol=2e-2)


def test_optax_agrees(batch):
    logits, labels = jnp.float32(batch[0]), jnp.asarray(batch[1])
    smoothed = optax.smooth_labels(jax.nn.one_hot(labels, K), 0.2)
    np.testing.assert_allclose(
        losses.cross_entropy(logits, labels, label_smoothing=0.2),
        optax.softmax_cross_entropy(logits, smoothed),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", CASES)
def test_extreme_logits_stay_finite(name, rng):
    signs = np.sign(rng.normal(size=(32, K))).astype(np.float32)
    signs += np.linspace(0, 1e-3, K, dtype=np.float32)  # no ties
    labels = rng.integers(0, K, 32)
    value_and_gradient = jax.jit(jax.value_and_grad(lambda z: CASES[name][0](z, labels).sum()))
    for scale in np.float32([1e4, 1e-4]):
        value, gradient = value_and_gradient(scale * signs)
        assert np.isfinite(value), scale
        assert np.isfinite(gradient).all(), scale


logit_batches = hnp.arrays(np.float32, (6, K), elements=st.floats(-50, 50, width=32))
label_batches = hnp.arrays(np.int32, (6,), elements=st.integers(0, K - 1))


@jax.jit
def bounded(logits, labels):
    return {
        "gce": losses.guided_complement_entropy(logits, labels),
        "complement": losses.complement_entropy(logits, labels),
        "entropy": losses.entropy(logits),
        "kl": losses.kl(logits, logits[::-1]),
        "cross_entropy": losses.cross_entropy(logits, labels),
        "shifted": losses.cross_entropy(logits + 3.0, labels),
        "margin": losses.margin(logits, labels),
        "correct": losses.correct(logits, labels),
    }


@settings(max_examples=50, deadline=None, derandomize=True)
@given(logit_batches, label_batches)
def test_bounds_and_symmetries(logits, labels):
    found = {name: np.asarray(value) for name, value in bounded(logits, labels).items()}
    assert (found["gce"] >= -1 - 1e-5).all()
    assert (found["gce"] <= 1e-6).all()
    assert (found["complement"] >= -1e-6).all()
    assert (found["complement"] <= np.log(K - 1) + 1e-5).all()
    assert (found["entropy"] >= -1e-6).all()
    assert (found["entropy"] <= np.log(K) + 1e-5).all()
    assert (found["kl"] >= -1e-5).all()
    # A shift of the logits changes no probability.
    np.testing.assert_allclose(found["shifted"], found["cross_entropy"], atol=1e-4)
    # correct() is the sign of the margin, except at a tie.
    untied = found["margin"] != 0
    np.testing.assert_array_equal(found["correct"][untied], found["margin"][untied] > 0)


def test_gce_is_lowest_where_the_label_is_sure_and_the_rest_is_flat():
    best = losses.guided_complement_entropy(jnp.asarray([[50.0, 0, 0, 0]]), jnp.asarray([0]))
    np.testing.assert_allclose(best, -1.0, rtol=1e-5)


def test_the_published_gce_turns_round_at_a_gap_of_10_and_the_exact_one_never():
    """Ten classes, the nine wrong ones with equal logits, in float64."""
    gaps = np.linspace(0, 20, 2001)
    logits = np.zeros((len(gaps), 10))
    logits[:, 0] = gaps
    labels = np.zeros(len(gaps), np.int32)

    def values_and_slopes(form):
        def total(z):
            values = losses.guided_complement_entropy(z, labels, form=form)
            return values.sum(), values

        gradient, values = jax.jit(jax.grad(total, has_aux=True))(logits)
        return np.asarray(values), np.asarray(gradient)[:, 0]

    with jax.enable_x64(True):
        (exact, falls), (published, slopes) = map(values_and_slopes, ("exact", "published"))
    least = published.argmin()
    assert abs(gaps[least] - 10.0) < 0.1
    np.testing.assert_allclose(1 - softmax(logits[least])[0], 4.0e-4, rtol=0.1)
    assert (np.diff(published[:least]) < 0).all() and (np.diff(published[least:]) > 0).all()
    np.testing.assert_allclose(slopes[[1200, 1600]], [9e-4, 4.6e-2], rtol=0.1)
    assert (np.diff(exact) < 0).all() and (falls < 0).all()
    np.testing.assert_allclose(falls[[1200, 1600]], [-1.8e-5, -3e-7], rtol=0.2)
    # Far below that gap the two differ by little more than the constant factor.
    np.testing.assert_allclose(published[:400] / exact[:400], np.log(9) / np.log(10), rtol=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        losses.cross_entropy,
        losses.boosted_cross_entropy,
        losses.complement_entropy,
        losses.guided_complement_entropy,
        losses.margin_loss,
        lambda logits, labels: losses.entropy(logits),
        lambda logits, labels: losses.kl(logits, jnp.flip(logits, 0)),
    ],
)
def test_a_class_at_minus_infinity_is_like_one_of_very_low_logit(loss, batch):
    logits, labels = batch
    ruled_out, low = (
        jnp.concatenate([logits[:, :-1], jnp.full((len(logits), 1), lowest)], -1)
        for lowest in (-jnp.inf, -1e4)
    )
    labels = labels % (K - 1)

    def mean(logits):
        return loss(logits, labels).mean()

    np.testing.assert_allclose(loss(ruled_out, labels), loss(low, labels), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(mean)(ruled_out), jax.grad(mean)(low), rtol=1e-5, atol=1e-7)


def test_nan_logits_are_wrong():
    assert losses.correct(jnp.asarray([[jnp.nan, 0.0, 1.0]]), jnp.asarray([0]))[0] == 0


OF_LABELS = [
    getattr(losses, name)
    for name in losses.__all__
    if "labels" in getattr(inspect.unwrap(getattr(losses, name)), "__annotations__", {})
]


@pytest.mark.parametrize("fn", OF_LABELS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_labels_of_few_bits_are_those_classes_among_many(fn, dtype, rng):
    logits = jnp.asarray(rng.normal(size=(3, 300)), jnp.float32).at[0, 256].set(9.0)
    labels = np.array([0, 1, 127])  # 256 is 0 in eight bits
    more = {"targets": np.array([2, 3, 4])} if fn is losses.targeted_dlr else {}
    more |= {"targets": np.array([2, 3, 4])} if fn is losses.targeted_margin else {}
    expected = fn(logits, labels, **more)
    found = fn(logits, labels.astype(dtype), **{k: v.astype(dtype) for k, v in more.items()})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("fn", OF_LABELS, ids=lambda fn: fn.__name__)
def test_labels_in_a_column_are_refused(fn):
    wrong = jnp.zeros((3, 1), jnp.int32)  # as Keras loads CIFAR-10
    given = {
        "labels": wrong,
        "targets": jnp.ones(3, jnp.int32),
        "reference": jnp.zeros((3, 4)),
    }
    needed = inspect.signature(fn).parameters
    with pytest.raises(ValueError, match=r"the shape \[3, 1\]; .* not a column: labels\[:, 0\]"):
        fn(jnp.eye(3, 4), **{k: v for k, v in given.items() if k in needed})


def test_complement_keeps_order():
    logits = jnp.asarray([[0.0, 1.0, 2.0, 3.0]] * 4)
    np.testing.assert_array_equal(
        losses.complement(logits, jnp.arange(4)), [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: losses.cross_entropy(z, y, label_smoothing=1.0), r"\[0, 1\), not 1.0"),
        (lambda z, y: losses.guided_complement_entropy(z, y, alpha=-1), r"\[0, 1\], not -1"),
        (
            lambda z, y: losses.guided_complement_entropy(z, y, form="other"),
            "form must be one of exact, published, not 'other'",
        ),
        (lambda z, y: losses.dlr(z[:, :2], y), "at least 3 classes, not 2; use margin_loss"),
        (lambda z, y: losses.guided_complement_entropy(z[:, :2], y), "at least 3 classes"),
        (lambda z, y: losses.complement_entropy(z[:, :2], y), "complement_entropy needs at least"),
        (lambda z, y: losses.correct(z, y * 1.0), "labels is float32; .* integers"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
    "smoothing, weight, p", [(0.0, 1.0, 0.476), (0.0, 0.2, 0.954), (0.2, 0.0, 0.82)]
)
def test_uncertainty_promotion_is_least_at_the_confidence_of_its_closed_form(smoothing, weight, p):
    """Cross-entropy with label smoothing, less weight times the entropy, for ten classes."""
    gaps = np.linspace(0, 15, 15_001)
    logits = jnp.asarray(gaps[:, None] * np.eye(10)[0])
    labels = jnp.zeros(len(gaps), int)
    found = losses.cross_entropy(logits, labels, label_smoothing=smoothing)
    least = int((found - weight * losses.entropy(logits)).argmin())
    assert losses.confidence(logits, labels)[least] == pytest.approx(p, abs=1e-3)
