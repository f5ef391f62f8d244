"""Training of a small model, for tests of the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from robust_jax import losses
from robust_jax.app.training import apply_fn
from robust_jax.attacks import pgd
from robust_jax.devices import parallel
from robust_jax.train import optimizer
from robust_jax.train.objectives import Adversary, make_objective
from robust_jax.train.state import init_state
from robust_jax.train.step import make_train_step


class Net(nn.Module):
    """Smooth, with synchronised BatchNorm: its statistics and gradients cross the devices."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        axis = parallel.AXIS if train else None
        x = nn.BatchNorm(use_running_average=not train, axis_name=axis)(x)
        return nn.Dense(10)(jnp.tanh(x))


def training_of(model, *, loss_on, learning_rate=0.1):
    """(make_step, init, batch) of SGD against l2 PGD, on 16 random 8x8 images of 10 classes.

    make_step(settings) is `make_train_step`, init(average=…) is `init_state`.
    """
    # Everything is smooth: a sign or a kink would turn a rounding difference into a large one.
    attack = functools.partial(pgd, eps=0.5, norm="l2", num_steps=2, keep_best=False)
    adversary = Adversary(attack)
    objective = make_objective(
        apply_fn(model), loss=losses.cross_entropy, loss_on=loss_on, adversary=adversary
    )
    tx = optimizer.sgd(optax.constant_schedule(learning_rate), 1e-3, optimizer.is_kernel)
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
