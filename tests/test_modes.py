"""Every attack, margin and analysis in any dtype, shape and mode of JAX."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.linear import POINTWISE, WITH_NORMS

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
    "multi_targeted": {"num_steps": 2, "num_targets": 2},
    "pgd": {"num_steps": 2, "num_restarts": 2},
    "square": {"num_queries": 3, "num_restarts": 2},
    "uniform_noise": {"num_samples": 2},
}
RADII = {"linf": 0.1, "l2": 0.3, "l1": 1.0, "l0": 4.0}
# Square is for images alone.
CASES = [
    (name, norm, shape)
    for name, norm in WITH_NORMS
    for shape in (IMAGES, ROWS)
    if name != "square" or shape == IMAGES
]
# Of each attack the first of its norms.
ONE_NORM = dict(reversed(WITH_NORMS))


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


def problem(shape, dtype):
    """A linear network that computes in the dtype of its input, four examples and their labels."""
    weights = np.random.default_rng(0).normal(size=(np.prod(shape), NUM_CLASSES))

    def logits_fn(x):
        return jnp.reshape(x, (len(x), -1)) @ jnp.asarray(weights, x.dtype)

    x = jnp.asarray(np.random.default_rng(1).uniform(size=(4, *shape)), dtype)
    return logits_fn, x, jnp.argmax(logits_fn(x), -1).astype(jnp.int32).at[0].set(0)


def called(name, norm, shape, dtype):
    """attack(x, y, key, eps=…), and its arguments."""
    logits_fn, x, y = problem(shape, dtype)

    def attack(x, y, key, *, eps):
        return POINTWISE[name](logits_fn, x, y, key, eps=eps, norm=norm, **QUICK.get(name, {}))

    return attack, x, y, jax.random.key(2)


def attacked(name, norm, shape, dtype):
    attack, x, y, key = called(name, norm, shape, dtype)
    return x, jax.jit(attack)(x, y, key, eps=RADII[norm])


def assert_inside(x, x_adv, norm):
    assert x_adv.dtype == x.dtype and x_adv.shape == x.shape
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    order = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    delta = (np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1)
    sizes = np.linalg.norm(delta, order, axis=-1)
    radius = float(jnp.asarray(RADII[norm], x.dtype))
    assert (sizes <= radius * (1 + max(4 * float(jnp.finfo(x.dtype).eps), 1e-6))).all()


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("name", "norm", "shape"), CASES)
def test_attacks_keep_the_dtype_of_x(name, norm, shape, dtype):
    """Traced: what a loop carries and what is promoted is known without a compilation."""
    # A number, or an array of another dtype, as a compiled program takes it.
    eps = RADII[norm] if shape == ROWS else jnp.float32(RADII[norm])
    with strictly(), jax.enable_x64(dtype in (jnp.float64, jnp.float32)):
        attack, *arguments = called(name, norm, shape, dtype)
        assert jax.eval_shape(lambda *a: attack(*a, eps=eps), *arguments).dtype == dtype


@pytest.mark.parametrize(("name", "norm"), WITH_NORMS)
def test_attacks_work_in_half_precision_where_jax_is_strict(name, norm):
    with strictly():
        x, x_adv = attacked(name, norm, IMAGES, jnp.float16)
    assert_inside(x, x_adv, norm)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize(("name", "norm"), ONE_NORM.items())
def test_attacks_work_in_other_precisions(name, norm, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x, x_adv = attacked(name, norm, IMAGES, dtype)
        assert_inside(x, x_adv, norm)


@pytest.mark.parametrize(("name", "norm"), [*ONE_NORM.items(), ("bim", "l1")])
def test_attacks_work_on_rows_and_without_jit(name, norm):
    shape = IMAGES if name == "square" else ROWS
    with strictly(), jax.disable_jit():
        x, x_adv = attacked(name, norm, shape, jnp.float32)
    assert_inside(x, x_adv, norm)
    np.testing.assert_allclose(x_adv, attacked(name, norm, shape, jnp.float32)[1], atol=1e-5)
