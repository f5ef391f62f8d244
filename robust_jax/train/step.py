"""One update on one device; parallel.py maps it over all of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from robust_jax import data
from robust_jax.keys import fold_in_each
from robust_jax.objectives import Batch, Objective, Sums
from robust_jax.train import awp
from robust_jax.train.state import Average, TrainState

TrainStep = Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Sums]]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str,
    crop_padding: int = 0,
    flip: bool = False,
    ema_decay: float | None = None,
    weight_perturbation: float = 0.0,
) -> TrainStep:
    """train_step(state, batch, key) -> (state, sums), per device, with collectives over axis_name.

    batch holds this device's rows of image, label and position; key is the run's, the same at
    every step and on every device. sums are already summed over the devices. With
    weight_perturbation above 0 the gradient, the sums and the batch statistics are those at weights
    perturbed by that share (AWP): one more gradient a step, on the same adversarial examples.
    """

    def train_step(state, batch, key):
        key, augment_key = jax.random.split(jax.random.fold_in(key, state.step))
        augment_keys = fold_in_each(augment_key, batch["position"])
        images = data.augment(
            data.to_pixels(batch["image"]), augment_keys, crop_padding=crop_padding, flip=flip
        )
        batch = {**batch, "image": images}
        batch = objective.attack(state.params, state.batch_stats, batch, key)

        def mean_loss(params):
            per_example, (batch_stats, sums) = objective.loss(params, state.batch_stats, batch, key)
            return per_example.mean(), (batch_stats, sums)

        def mean_gradient(params):
            gradient, aux = jax.grad(mean_loss, has_aux=True)(params)
            return jax.lax.pmean(gradient, axis_name), aux

        params = state.params
        if weight_perturbation:
            params = awp.perturbed(params, mean_gradient(params)[0], weight_perturbation)
        gradient, (batch_stats, sums) = mean_gradient(params)
        sums = jax.lax.psum(sums, axis_name)
        one = jnp.ones(())
        sums["gradient_norm"] = (optax.tree.norm(gradient), one)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sums["parameter_norm"] = (optax.tree.norm(params), one)
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=_averaged(state, params, batch_stats, ema_decay),
        )
        return state, sums

    return train_step


def together(train_step: TrainStep) -> Callable:
    """The step of several runs at once: tuples of states, batches and keys, by jax.vmap."""

    def train_steps(states, batches, keys):
        def stacked(trees):
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

        out = jax.vmap(train_step)(stacked(states), stacked(batches), stacked(keys))
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(len(states)))

    return train_steps


def _averaged(
    state: TrainState, params: Any, batch_stats: Any, decay: float | None
) -> Average | None:
    if decay is None or state.average is None:
        return None
    # The early average follows the parameters closely, not their random initial values.
    keep = jnp.minimum(decay, (state.step + 1.0) / (state.step + 10.0))
    return Average(
        *jax.tree.map(
            lambda old, new: keep * old + (1 - keep) * new,
            (state.average.params, state.average.batch_stats),
            (params, batch_stats),
        )
    )
