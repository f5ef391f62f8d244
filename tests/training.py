"""Training of a small model, for tests of the step."""

import functools

import jax
import numpy as np
import optax

from robust_jax import losses
from robust_jax.app.training import apply_fn
from robust_jax.attacks import pgd
from robust_jax.train import optimizer
from robust_jax.train.objectives import Adversary, make_objective
from robust_jax.train.state import init_state
from robust_jax.train.step import make_train_step


def training_of(model, *, loss_on, learning_rate=0.1):
    """(make_step, init, batch) of SGD against l2 PGD, on 16 random 8x8 images of 10 classes.

    make_step(settings) is `make_train_step`, init(average=…) is `init_state`.
    """
    # Smooth all along: a sign or a kink would turn a rounding difference into a large one.
    adversary = Adversary(lambda f, x, y, k: pgd(f, x, y, k, eps=0.5, norm="l2", num_steps=2))
    objective = make_objective(
        apply_fn(model), loss=losses.cross_entropy, loss_on=loss_on, adversary=adversary
    )
    tx = optimizer.sgd(optax.constant_schedule(learning_rate), 1e-3, optimizer.decayed)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8),
        "label": rng.integers(0, 10, 16).astype(np.int32),
        "position": np.arange(16),
    }
    return (
        functools.partial(make_train_step, objective, tx),
        functools.partial(init_state, model, tx, jax.random.key(0), (8, 8, 1), average=False),
        batch,
    )
