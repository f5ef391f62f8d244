"""The state of a training run at a step, as one pytree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Int, Key


class Average(struct.PyTreeNode):
    """Exponential moving averages of the parameters and of their batch statistics."""

    params: Any
    batch_stats: Any


class TrainState(struct.PyTreeNode):
    """step counts updates; average is None unless the run keeps one.

    The next batch is number `step` of the data; see data.TrainBatches.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    average: Average | None

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is evaluated with: the averages, if the run keeps them."""
        source = self if self.average is None else self.average
        return {"params": source.params, "batch_stats": source.batch_stats}


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    image_shape: tuple[int, ...],
    *,
    average: bool,
) -> TrainState:
    """The state at step 0, with parameters drawn with key."""
    variables = jax.jit(model.init)(key, jnp.zeros((1, *image_shape)))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    copy = jax.tree.map(jnp.copy, (params, batch_stats)) if average else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        average=Average(*copy) if copy else None,
    )
