"""Adversarial weight perturbation: closed forms. On many devices: see test_train.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_jax.devices import parallel
from robust_jax.train import awp
from robust_jax.train.objectives import Adversary, make_objective
from robust_jax.train.state import TrainState
from robust_jax.train.step import StepSettings, make_train_step
from tests.training import Net, training_of

KEY = jax.random.key(0)
GAMMA, RATE = 0.1, 0.5


def test_kernels_move_by_their_share_up_the_gradient(rng):
    params = {
        "kernel": rng.normal(size=(3, 3, 2, 4)),
        "dense": rng.normal(size=(5, 2)),
        "bias": rng.normal(size=4),
    }
    gradient = {name: rng.normal(size=a.shape) for name, a in params.items()}
    moved = awp.perturbed(*(jax.tree.map(jnp.float32, t) for t in (params, gradient)), GAMMA)
    np.testing.assert_array_equal(moved["bias"], jnp.float32(params["bias"]))
    for name in ("kernel", "dense"):
        w, g = params[name], gradient[name]
        expected = w + GAMMA * np.sqrt((w**2).sum() / (g**2).sum()) * g
        np.testing.assert_allclose(moved[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_vanishing_gradients_keep_the_weights_finite(scale):
    w, g = jnp.ones((2, 2)), scale * jnp.ones((2, 2))
    moved = awp.perturbed({"w": w}, {"w": g}, GAMMA)["w"]
    np.testing.assert_allclose(moved, w * (1 + GAMMA * (scale > 0)), rtol=1e-5)


def test_step_of_a_quadratic_is_the_one_by_hand(rng):
    """Logits x'W + b, loss half their squares, x' = x + logits(x)·A, by hand in float64."""
    w, b, a = rng.normal(size=(4, 3)), rng.normal(size=3), 0.1 * rng.normal(size=(3, 4))
    images = rng.integers(0, 256, (8, 2, 2, 1), dtype=np.uint8)
    calls = []

    def apply(params, batch_stats, x, train, keys=None):
        return x.reshape(-1, 4) @ params["w"] + params["b"], batch_stats

    def attack(logits_fn, x, y, keys):
        calls.append(x)
        return x + (logits_fn(x) @ jnp.float32(a)).reshape(x.shape)

    objective = make_objective(
        apply,
        loss=lambda logits, labels: (logits**2).sum(-1) / 2,
        loss_on="adversarial",
        adversary=Adversary(attack),
    )
    tx = optax.sgd(RATE)
    step = make_train_step(objective, tx, StepSettings(weight_perturbation=GAMMA))
    batch = {"image": images, "label": np.zeros(8, np.int32), "position": np.arange(8)}
    params = {"w": jnp.float32(w), "b": jnp.float32(b)}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={},
        opt_state=tx.init(params),
        average=None,
    )
    state, sums = parallel.map_step(step, "pmap", jax.devices()[:1])(state, batch, KEY)
    assert len(calls) == 1  # the examples are made once, at the unperturbed weights

    x = images.reshape(8, 4) / 255
    x = x + (x @ w + b) @ a
    gradient = x.T @ (x @ w + b) / 8
    shifted = w + GAMMA * np.linalg.norm(w) * gradient / np.linalg.norm(gradient)
    logits = x @ shifted + b
    np.testing.assert_allclose(state.params["w"], w - RATE * x.T @ logits / 8, rtol=1e-4)
    np.testing.assert_allclose(state.params["b"], b - RATE * logits.mean(0), rtol=1e-4)
    np.testing.assert_allclose(sums["loss"][0], (logits**2).sum() / 2, rtol=1e-4)


def test_without_perturbation_the_step_is_the_plain_one():
    make_step, init, batch = training_of(Net(), loss_on="adversarial")

    def stepped(**keywords):
        """The state and the sums after two steps."""
        mapped = parallel.map_step(make_step(StepSettings(**keywords)), "pmap", jax.devices()[:1])
        state = init()
        for _ in range(2):
            state, sums = mapped(state, batch, KEY)
        return jax.device_get((state, sums))

    plain, sums = stepped()
    hardly, _ = stepped(weight_perturbation=1e-9)
    chex.assert_trees_all_close(hardly, plain, rtol=1e-4, atol=1e-6)
    assert stepped(weight_perturbation=0.05)[1]["loss"][0] > sums["loss"][0]
