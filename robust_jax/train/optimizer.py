"""Optimisers and learning-rate schedules by name: thin wrappers around optax."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

Schedule = Callable[[Any], Any]
# optimizer(schedule, weight_decay, mask, **keywords) -> optax.GradientTransformation


def sgd(
    schedule: Schedule,
    weight_decay: float,
    mask: Callable,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """SGD with momentum; the decay is added to the gradient, as in the AT literature."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov),
    )


def adam(
    schedule: Schedule,
    weight_decay: float,
    mask: Callable,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam; the decay is added to the gradient. For decoupled decay see adamw."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask), optax.adam(schedule, b1=b1, b2=b2, eps=eps)
    )


def adamw(
    schedule: Schedule,
    weight_decay: float,
    mask: Callable,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
}

# schedule(peak, total_steps, **keywords) -> (step -> learning rate)


def constant(peak: float, total_steps: int) -> Schedule:
    """The peak throughout."""
    return optax.constant_schedule(peak)


def piecewise(
    peak: float,
    total_steps: int,
    *,
    boundaries: tuple[float, ...] = (0.5, 0.75),
    factor: float = 0.1,
) -> Schedule:
    """The peak, multiplied by factor at each boundary, a fraction of the run (Rice et al. 2020)."""
    if not all(0 < b < 1 for b in boundaries):
        raise ValueError(f"boundaries must be fractions of the run in (0, 1), not {boundaries!r}")
    steps: dict[int, float] = {}
    for boundary in boundaries:
        # 0.29 of 100 steps is 28.999… in floats; the first step is at the peak.
        step = max(int(boundary * total_steps + 1e-9), 1)
        steps[step] = steps.get(step, 1.0) * factor
    return optax.piecewise_constant_schedule(peak, steps)


def cosine(peak: float, total_steps: int, *, warmup: float = 0.0) -> Schedule:
    """Linear warm-up over a fraction of the run, then half a cosine down to 0."""
    _check_warmup(warmup)
    warmup_steps = int(warmup * total_steps)
    if not warmup_steps:
        return optax.cosine_decay_schedule(peak, total_steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps)


def one_cycle(peak: float, total_steps: int, *, warmup: float = 0.3) -> Schedule:
    """Linear up to peak over a fraction of the run, then linear down to 0 (arXiv 1708.07120)."""
    _check_warmup(warmup)
    warmup_steps = int(warmup * total_steps)
    up = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    down = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
    return optax.join_schedules([up, down], [warmup_steps])


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": constant,
    "piecewise": piecewise,
    "cosine": cosine,
    "one_cycle": one_cycle,
}


def with_clipping(
    optimizer: optax.GradientTransformation, max_norm: float | None
) -> optax.GradientTransformation:
    """The optimiser on gradients clipped to a global norm, before decay is added."""
    if max_norm is None:
        return optimizer
    if max_norm <= 0:
        raise ValueError(f"the norm to clip to must be above 0, not {max_norm!r}")
    return optax.chain(optax.clip_by_global_norm(max_norm), optimizer)


def is_kernel(params: Any) -> Any:
    """Which leaves are kernels, which are decayed; biases and normalisation scales are not."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _check_warmup(warmup: float) -> None:
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a fraction of the run in [0, 1), not {warmup!r}")
