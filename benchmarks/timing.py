"""What the benchmarks of our own speed share: a training step, images, and taking turns."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np
import optax

from robust_jax import attacks, losses
from robust_jax.app.training import apply_fn
from robust_jax.devices import parallel, speed
from robust_jax.train.objectives import Adversary, make_objective
from robust_jax.train.state import init_state
from robust_jax.train.step import make_train_step, vmap_train_step

EPS, STEP_SIZE, LEARNING_RATE, MOMENTUM = 0.1, 0.025, 0.01, 0.9

Sides = Mapping[str, Callable[[], object]]


def images(shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images in [0,1] and labels of ten classes."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(count, *shape)).astype(np.float32)
    return x, rng.integers(10, size=count).astype(np.int32)


class TrainingStep:
    """Adversarial training by PGD (linf) with SGD and momentum; a call takes a step and waits.

    It trains num_seeds networks in one program, as a study does. weights are the first network's at
    initialisation.
    """

    def __init__(
        self,
        make_model: Callable,
        shape: tuple[int, ...],
        *,
        batch_size: int,
        num_steps: int,
        num_seeds: int = 1,
    ):
        model = make_model(num_classes=10, axis_name=parallel.AXIS)
        x, y = images(shape, batch_size)
        self.pixels = (x * 255).astype(np.uint8)
        pgd = partial(
            attacks.pgd, keep_best=False, eps=EPS, step_size=STEP_SIZE, num_steps=num_steps
        )
        objective = make_objective(
            apply_fn(model),
            loss=losses.cross_entropy,
            loss_on="adversarial",
            adversary=Adversary(pgd),
        )
        tx = optax.sgd(LEARNING_RATE, MOMENTUM)
        step = make_train_step(objective, tx)
        self._step = parallel.map_step(step if num_seeds == 1 else vmap_train_step(step), "pmap")
        states = tuple(
            # Placed as the step returns it, or its program would be compiled again.
            jax.device_put(
                init_state(model, tx, jax.random.key(i), shape, average=False),
                parallel.replicated(),
            )
            for i in range(num_seeds)
        )
        batch = {"image": self.pixels, "label": y, "position": np.arange(len(y))}
        key = jax.random.key(0)
        self.weights = jax.device_get(states[0].variables)
        self._alone = num_seeds == 1
        if self._alone:
            self._state, self._inputs = states[0], (batch, key)
        else:
            self._state, self._inputs = states, ((batch,) * num_seeds, (key,) * num_seeds)

    def flops(self) -> float:
        """The floating-point operations of a step's products and convolutions."""
        return speed.flops(self._step, self._state, *self._inputs)

    def __call__(self) -> object:
        results = self._step(self._state, *self._inputs)
        self._state = results[0] if self._alone else tuple(state for state, _ in results)
        return jax.block_until_ready(results)


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a large matrix product on the first device, to measure a step against."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)  # constants are multiplied faster
    product = jax.jit(lambda a: a @ a)
    seconds = turns({"product": lambda: jax.block_until_ready(product(a))}, repeats=10)
    return 2 * size**3 / float(np.median(seconds))


def heading(columns: str) -> str:
    """The first two lines of a markdown table; columns has bars between the names."""
    return f"| {columns} |\n|{' --- |' * (1 + columns.count('|'))}"


def compared(sides: Sides, seconds: np.ndarray, digits: int) -> str:
    """Cells of a table: ours in ms, theirs, the median and range of ratios to their fastest."""
    ours, *others = np.median(seconds, axis=0)
    ratios = seconds[:, 0] / seconds[:, 1 + np.argmin(others)]
    theirs = ", ".join(
        f"{name} {1e3 * s:.{digits}f}" for name, s in zip(list(sides)[1:], others, strict=True)
    )
    spread = f"{np.median(ratios):.2f} | {ratios.min():.2f} to {ratios.max():.2f}"
    return f"{1e3 * ours:.{digits}f} | {theirs} | {spread}"


def turns(sides: Sides, repeats: int) -> np.ndarray:
    """Seconds [repeats, sides]; the sides take turns in each repeat, after all have compiled."""
    for side in sides.values():
        side()
    seconds = np.zeros((repeats, len(sides)))
    for turn in range(repeats):
        for i, side in enumerate(sides.values()):
            start = time.perf_counter()
            side()
            seconds[turn, i] = time.perf_counter() - start
    return seconds
