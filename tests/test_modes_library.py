"""Losses, Jacobians and energies in every dtype of x and in JAX's stricter modes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import energy, jacobian, losses

B, K = 4, 5
SHAPE = (3, 2)  # neither an image nor a row: any rank will do
RNG = np.random.default_rng(0)
X = RNG.integers(20, 44, (B, *SHAPE)) / 64  # which bfloat16 holds, and so a ball of 1/8
WEIGHTS = RNG.normal(size=(6, K))
LABELS = np.arange(B) % K
OTHERS = (np.arange(B) + 1) % K


def network(x):
    """Smooth, and computed in the dtype of x throughout."""
    return jnp.tanh(x.reshape(len(x), -1)) @ jnp.asarray(WEIGHTS, x.dtype)


@contextlib.contextmanager
def strictly():
    """Everything that JAX can be told to refuse."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_key_reuse(True),
    ):
        yield


def of_logits(loss, *labels):
    @jax.jit
    def call(x):
        return loss(network(x), *(jnp.asarray(y[: len(x)], jnp.int32) for y in labels))

    return lambda x, key, count: call(x)


def of_jacobian(fn, **keywords):
    return lambda x, key, count: fn(network, x, **keywords)


def around(fn, labelled):
    def call(x, key, count):
        y = jnp.asarray(LABELS[: len(x)], jnp.int32) if labelled else None
        drawn = fn in (energy.mean_square, energy.total_variation)
        number = {"num_samples" if drawn else "num_steps": count}
        return fn(network, x, y, key, eps=1 / 8, **number)

    return call


CALLS = {
    "cross_entropy": of_logits(losses.cross_entropy, LABELS),
    "label_smoothing": of_logits(
        functools.partial(losses.cross_entropy, label_smoothing=0.1), LABELS
    ),
    "guided_complement_entropy": of_logits(losses.guided_complement_entropy, LABELS),
    "boosted_cross_entropy": of_logits(losses.boosted_cross_entropy, LABELS),
    "margin_loss": of_logits(losses.margin_loss, LABELS),
    "dlr": of_logits(losses.dlr, LABELS),
    "targeted_dlr": of_logits(losses.targeted_dlr, LABELS, OTHERS),
    "targeted_margin": of_logits(losses.targeted_margin, LABELS, OTHERS),
    "kl": of_logits(lambda logits: losses.kl(logits, 2 * logits)),
    "entropy": of_logits(losses.entropy),
    "complement_entropy": of_logits(losses.complement_entropy, LABELS),
    "margin": of_logits(losses.margin, LABELS),
    "confidence": of_logits(losses.confidence, LABELS),
    "correct": of_logits(losses.correct, LABELS),
    "complement": of_logits(losses.complement, LABELS),
    "jacobian": of_jacobian(jacobian.jacobian, chunk_size=2),
    "frobenius_norm": of_jacobian(jacobian.frobenius_norm),
    "frobenius_norm_of_probabilities": lambda x, key, count: jacobian.frobenius_norm(
        jacobian.probabilities(network), x
    ),
    "relative_slope": lambda x, key, count: jacobian.relative_slope(
        network, x, jnp.asarray(LABELS[: len(x)], jnp.int32), chunk_size=2
    ),
    "singular_values": of_jacobian(jacobian.singular_values),
    "spectral_norm": lambda x, key, count: jacobian.spectral_norm(
        network, x, key, num_iterations=count, chunk_size=2
    ),
    "squared_frobenius_samples": lambda x, key, count: jacobian.squared_frobenius_samples(
        network, x, key, num_projections=count
    ).mean(-1),
    "frobenius_norm_estimate": lambda x, key, count: (
        jacobian.frobenius_norm_estimate(network, x, key, num_projections=count).norm
    ),
    "mean_square": around(energy.mean_square, True),
    "oscillation": around(energy.oscillation, True),
    "rise": around(energy.rise, True),
    "mean_square_label_free": around(energy.mean_square, False),
    "oscillation_label_free": around(energy.oscillation, False),
    "total_variation": around(energy.total_variation, True),
    "path": around(energy.path, True),
}
# How far two draws may be apart: of the mean of many, or which end of a ball PGD finds.
MANY = 400
MEANS = {
    "total_variation": 0.1,
    "squared_frobenius_samples": 0.2,
    "frobenius_norm_estimate": 0.1,
    "mean_square": 0.2,
    "mean_square_label_free": 0.4,
}
ENDS = {"oscillation_label_free": 0.7}
# The tolerance for results of each dtype.
PRECISION = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


def result(name, dtype, count, examples=B):
    return CALLS[name](jnp.asarray(X[:examples], dtype), jax.random.key(0), count)


@functools.cache
def reference(name, count):
    """In float64, with JAX's x64 mode on."""
    with strictly(), jax.enable_x64(True):
        return np.asarray(result(name, "float64", count))


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("name", CALLS)
def test_any_dtype_gives_the_same_but_for_rounding_where_jax_is_strict(name, dtype):
    count = MANY if name in MEANS else 20
    with strictly(), jax.enable_x64(dtype == "float64"):
        found = result(name, dtype, count)
    selects = name in ("jacobian", "complement", "correct")
    expected = {"correct": "float32"}.get(name, dtype)
    if not selects and dtype in ("bfloat16", "float16"):
        expected = "float32"
    assert found.dtype == expected
    right = reference(name, count)
    tolerance = PRECISION[dtype] + {**MEANS, **ENDS}.get(name, 0)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), right, rtol=tolerance, atol=tolerance * np.abs(right).max()
    )


MODES = {"x64": lambda: jax.enable_x64(True), "no jit": jax.disable_jit}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_every_mode_gives_the_same(name, mode):
    plain = result(name, "float32", count=2, examples=1)
    with MODES[mode]():
        found = result(name, "float32", count=2, examples=1)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


def test_every_public_function_is_called():
    public = {
        name
        for module in (losses, jacobian, energy)
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
        and not isinstance(value, type)
    }
    assert public - {"probabilities"} <= set(CALLS)
