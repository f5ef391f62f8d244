"""One update on one device; devices/parallel.py maps it over all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from robust_jax import data
from robust_jax.devices.parallel import AXIS
from robust_jax.keys import fold_in_each
from robust_jax.train import awp
from robust_jax.train.objectives import Batch, Objective, Sums
from robust_jax.train.state import Average, TrainState

TrainStep = Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Sums]]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """How a step is taken.

    crop_padding, flip: random augmentation; see `data.augment`.
    ema_decay: the decay of the averaged parameters that are evaluated; None for no averaging.
    weight_perturbation: AWP's γ; 0 for none. Above 0, the gradient, the sums and the batch
        statistics are those at weights perturbed by that share, on the same adversarial examples,
        which costs one more gradient a step.
    num_parts: how many pieces a device takes its rows in, one after another, if their activations
        do not fit in memory. The gradient is that of all rows, but BatchNorm sees one piece.
    """

    crop_padding: int = 0
    flip: bool = False
    ema_decay: float | None = None
    weight_perturbation: float = 0.0
    num_parts: int = 1


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    settings: StepSettings = StepSettings(),
) -> TrainStep:
    """train_step(state, batch, key) -> (state, sums), per device, with collectives over AXIS.

    batch holds this device's rows of image, label and position; key is the run's, the same at
    every step and on every device. sums are already summed over the devices.
    """
    num_parts = settings.num_parts

    def train_step(state, batch, key):
        key, augment_key = jax.random.split(jax.random.fold_in(key, state.step))
        augment_keys = fold_in_each(augment_key, batch["position"])
        images = data.augment(
            data.to_pixels(batch["image"]),
            augment_keys,
            crop_padding=settings.crop_padding,
            flip=settings.flip,
        )
        batch = {**batch, "image": images}
        parts = jax.tree.map(lambda a: a.reshape(num_parts, -1, *a.shape[1:]), batch)
        parts = _mapped(
            lambda part: objective.attack(state.params, state.batch_stats, part, key), parts
        )

        def mean_loss(params, batch_stats, part):
            per_example, aux = objective.loss(params, batch_stats, part, key)
            return per_example.mean(), aux

        def mean_gradient(params):
            def of_part(batch_stats, part):
                gradient, (batch_stats, sums) = jax.grad(mean_loss, has_aux=True)(
                    params, batch_stats, part
                )
                return batch_stats, (gradient, sums)

            batch_stats, (gradient, sums) = _summed(of_part, state.batch_stats, parts)
            gradient = jax.tree.map(lambda g: g / num_parts, gradient)
            return jax.lax.pmean(gradient, AXIS), (batch_stats, sums)

        params = state.params
        if gamma := settings.weight_perturbation:
            params = awp.perturbed(params, mean_gradient(params)[0], gamma)
        gradient, (batch_stats, sums) = mean_gradient(params)
        sums = jax.lax.psum(sums, AXIS)
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
            average=_averaged(state, params, batch_stats, settings.ema_decay),
        )
        return state, sums

    return train_step


def vmap_train_step(train_step: TrainStep) -> Callable:
    """The step of several runs at once, by jax.vmap over tuples of states, batches and keys."""

    def train_steps(states, batches, keys):
        def stacked(trees):
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

        out = jax.vmap(train_step)(stacked(states), stacked(batches), stacked(keys))
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(len(states)))

    return train_steps


def _mapped(fn: Callable, parts: Any) -> Any:
    """fn of each part [P,…] in turn; a single part needs no loop, which would be slower."""
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return jax.tree.map(lambda a: a[None], fn(jax.tree.map(lambda a: a[0], parts)))
    return jax.lax.map(fn, parts)


def _summed(fn: Callable, carry: Any, parts: Any) -> tuple[Any, Any]:
    """The last carry and Σ output of fn(carry, part) -> (carry, output) over the parts [P,…]."""
    first = jax.tree.map(lambda a: a[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return fn(carry, first)

    def add(so_far, part):
        carry, output = fn(so_far[0], part)
        return (carry, jax.tree.map(jnp.add, so_far[1], output)), None

    outputs = jax.eval_shape(fn, carry, first)[1]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), outputs)
    return jax.lax.scan(add, (carry, zeros), parts)[0]


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
