"""Losses, Jacobians and energies in every dtype of x and in JAX's stricter modes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import energy, jacobian, losses
from tests.conftest import strictly

B, K = 4, 5
SHAPE = (3, 2)  # neither an image nor a row: any rank will do
RNG = np.random.default_rng(0)
X = RNG.integers(20, 44, (B, *SHAPE)) / 64  # exact in bfloat16, as is a ball of 1/8 around it
WEIGHTS = RNG.normal(size=(6, K))
LABELS = np.arange(B) % K
OTHERS = (np.arange(B) + 1) % K


def network(x):
    """Smooth, and computed in the dtype of x throughout."""
    return jnp.tanh(x.reshape(len(x), -1)) @ jnp.asarray(WEIGHTS, x.dtype)


def of(loss):
    """The loss as a function of logits, labels and other labels."""
    names = [
        p.name
        for p in inspect.signature(loss).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]

    def call(z, y, other):
        given = {"logits": z, "labels": y, "targets": other, "reference": 2 * z}
        return loss(*(given[name] for name in names))

    return call


# All losses are one program.
LOSSES = {n: of(fn) for n in losses.__all__ if inspect.isfunction(fn := getattr(losses, n))}
LOSSES["label_smoothing"] = of(functools.partial(losses.cross_entropy, label_smoothing=0.1))


@jax.jit
def all_losses(x):
    labels, others = (jnp.asarray(y[: len(x)], jnp.int32) for y in (LABELS, OTHERS))
    return {name: loss(network(x), labels, others) for name, loss in LOSSES.items()}


def of_jacobian(fn, **keywords):
    return lambda x, key, count: fn(network, x, **keywords)


def around(fn, labelled):
    def call(x, key, count):
        y = jnp.asarray(LABELS[: len(x)], jnp.int32) if labelled else None
        if labelled and isinstance(x, np.ndarray):
            y = LABELS[: len(x)].tolist()
        drawn = fn in (energy.mean_square, energy.total_variation)
        number = {"num_samples" if drawn else "num_steps": count}
        return fn(network, x, y, key, eps=1 / 8, **number)

    return call


CALLS = {
    "losses": lambda x, key, count: all_losses(x),
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
# How far two draws may differ: in the mean of many, or in the end of a ball that PGD finds.
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


# Default runs test these in bfloat16 too: one of each kind.
IN_BFLOAT16 = ("losses", "jacobian", "singular_values", "spectral_norm", "mean_square", "path")
# test_every_mode_gives_the_same covers float32 where JAX is strict.
CASES = [
    pytest.param(
        *(name, dtype),
        marks=pytest.mark.slow
        if dtype == "float32" or (dtype == "bfloat16" and name not in IN_BFLOAT16)
        else [],
    )
    for name in CALLS
    for dtype in PRECISION
]


def result(name, dtype, count, examples=B, *, outside_jax=False):
    """{name: result}, or {loss: result} if name is "losses".

    outside_jax: passes a NumPy array, labels in a list and a legacy key.
    """
    x = jax.device_put(jnp.asarray(X[:examples], dtype), jax.devices()[0])
    key = jax.random.key(0)
    if outside_jax:
        x, key = np.asarray(x), jax.random.PRNGKey(0)
    found = CALLS[name](x, key, count)
    return found if isinstance(found, dict) else {name: found}


def count_for(name):
    return MANY if name in MEANS else 2 if name in ("path", "rise") else 20


@functools.cache
def reference(name):
    """The result in float64, with JAX's x64 mode on."""
    with strictly(), jax.enable_x64(True):
        return jax.device_get(result(name, "float64", count_for(name)))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_any_dtype_gives_the_same_but_for_rounding_where_jax_is_strict(name, dtype):
    with strictly(), jax.enable_x64(dtype == "float64"):
        found = result(name, dtype, count_for(name))
    for part, right in reference(name).items():
        selects = part in ("jacobian", "complement", "correct")
        expected = {"correct": "float32"}.get(part, dtype)
        if not selects and dtype in ("bfloat16", "float16"):
            expected = "float32"
        assert found[part].dtype == expected, part
        tolerance = PRECISION[dtype] + {**MEANS, **ENDS}.get(part, 0)
        np.testing.assert_allclose(
            np.asarray(found[part], np.float64),
            right,
            rtol=tolerance,
            atol=tolerance * np.abs(right).max(),
            err_msg=part,
        )


MODES = {"x64": lambda: jax.enable_x64(True), "no jit": jax.disable_jit}


# Label-free energies are the same functions, and `rise` is `oscillation` with another end.
LIKE_ANOTHER = ("mean_square_label_free", "oscillation_label_free", "rise")
IN_MODES = [
    pytest.param(
        *(name, mode),
        marks=[pytest.mark.slow] if mode == "no jit" and name in LIKE_ANOTHER else [],
    )
    for name in CALLS
    for mode in MODES
]


@pytest.mark.parametrize(("name", "mode"), IN_MODES)
def test_every_mode_gives_the_same(name, mode):
    with strictly():
        plain = result(name, "float32", count=2)
    with MODES[mode]():  # with two examples, since a legacy key then looks like two keys
        found = result(name, "float32", count=2, examples=2, outside_jax=mode == "no jit")
    for part, values in plain.items():
        assert values.dtype == found[part].dtype == "float32", part
        np.testing.assert_allclose(found[part], values[:2], rtol=1e-5, atol=1e-6, err_msg=part)


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
    assert public - {"probabilities"} <= {*CALLS, *LOSSES}
