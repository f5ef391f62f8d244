"""Counts of operations against closed forms, the table of chips, a profile, memory, seconds."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import _convolution, models
from robust_jax.app.experiment import build
from robust_jax.devices import parallel, speed
from robust_jax.train import loop
from tests.test_train import small_config


def array(*shape):
    return jnp.zeros(shape)


def plan_with(**fields):
    """A few steps of a small CNN."""
    config = small_config()
    config.model = {"name": "cnn", "widths": (4, 4), "hidden": 8}
    for name, value in fields.items():
        config[name] = value
    return build(config).plan


def test_a_product_counts_two_for_each_multiply_add():
    assert speed.flops(lambda a, b: a @ b, array(3, 4), array(4, 5)) == 2 * 3 * 4 * 5
    batched = jax.vmap(jnp.matmul)
    assert speed.flops(batched, array(7, 3, 4), array(7, 4, 5)) == 7 * 2 * 3 * 4 * 5
    assert speed.flops(lambda a: jnp.exp(a).sum(), array(3, 4)) == 0


@pytest.mark.parametrize("implementation", _convolution.IMPLEMENTATIONS)
def test_a_convolution_and_its_gradients_count_the_same(implementation):
    x, k = array(2, 9, 8, 3), array(5, 3, 3, 6)

    def conv(x, k):
        return _convolution.conv2d(x, k, padding="VALID", implementation=implementation)

    once = 2 * (2 * 5 * 6 * 6) * (5 * 3 * 3)
    assert speed.flops(conv, x, k) == once
    value = jax.value_and_grad(lambda x, k: jnp.sin(conv(x, k)).sum(), argnums=(0, 1))
    if implementation == "auto":
        assert speed.flops(value, x, k) == 3 * once
    else:  # lax's gradients also slide over the zeros of padding and strides
        assert speed.flops(value, x, k) >= 3 * once


def test_loops_count_each_turn_and_branches_the_longest():
    w = array(4, 4)
    once = speed.flops(lambda x: w @ x, array(4))
    scanned = lambda x: jax.lax.scan(lambda c, _: (w @ c, None), x, length=10)[0]  # noqa: E731
    assert speed.flops(scanned, array(4)) == 10 * once
    branched = lambda x: jax.lax.cond(x[0] > 0, lambda x: w @ (w @ x), lambda x: w @ x, x)  # noqa: E731
    assert speed.flops(branched, array(4)) == 2 * once


@pytest.mark.parametrize("method", parallel.METHODS)
def test_a_training_step_counts_what_all_devices_do(method):
    plan = plan_with(parallel=method)
    state = jax.eval_shape(plan.init)
    step = speed.flops(plan.train_step, state, plan.batches[0], plan.key)
    model = models.CNN(num_classes=10, widths=(4, 4), hidden=8)
    forward = speed.flops(
        model.apply, model.init(jax.random.key(0), array(1, 8, 8, 1)), array(64, 8, 8, 1)
    )
    # Two PGD steps, each forward and back to the image, and the parameters' gradient.
    assert 6 * forward < step < 12 * forward


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L99", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_the_longest_name(kind, expected):
    assert speed.peak(kind) == expected


def test_training_says_how_fast_it_was_and_leaves_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "PEAKS", {jax.devices()[0].device_kind: 1e12})
    plain = jax.profiler.ProfileOptions

    def without_programs():  # other tests of this process left many
        options = plain()
        options.enable_hlo_proto = False
        return options

    monkeypatch.setattr(jax.profiler, "ProfileOptions", without_programs)
    # The trace holds every operation of ten steps; without an adversary there are few.
    mlp = {"name": "mlp", "hidden": (8,)}
    plan = plan_with(duration="14 steps", loss_on="clean", adversary=None, model=mlp)
    timings = loop.train(plan, tmp_path, tmp_path / "profile").timings
    np.testing.assert_allclose(
        timings["examples_per_second"] * timings["step_milliseconds"] / 1000, plan.batch_size
    )
    work = speed.flops(plan.train_step, plan.init(), plan.batches[0], plan.key)
    per_second = work / timings["step_milliseconds"] * 1000
    np.testing.assert_allclose(timings["share_of_peak"], per_second / 1e12 / jax.device_count())
    # Elsewhere the share is still that of the machine that trained, and no step is traced.
    monkeypatch.setattr(speed, "PEAKS", {jax.devices()[0].device_kind: 1e6})
    elsewhere = dataclasses.replace(plan, train_step=lambda *_: 1 / 0)
    assert loop.restore(elsewhere, tmp_path).timings == timings
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"PjRt" in trace.read_bytes() and b"$loop.py" not in trace.read_bytes()
    assert speed.memory_high_water() > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel resets it")
def test_the_memory_of_what_came_before_is_forgotten():
    x = np.ones(2**27, np.uint8)
    with_it = speed.memory_high_water()
    del x
    assert speed.memory_high_water() > with_it - 2**22  # the kernel's count is approximate
    speed.forget_memory_high_water()
    assert speed.memory_high_water() < with_it - 2**26


FAULTS = """
import resource, jax, jax.numpy as jnp
from robust_jax.devices import speed
step = jax.jit(lambda x: x + 1)
x = jnp.ones(10_000_000)  # 40 MB, and as much for the sum

def pages():
    for i in range(100):
        if i == 40:  # the heap has grown to what it needs
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = pages()
speed.keep_freed_memory()
print(given_back, pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="buffers of XLA's CPU backend")
def test_freed_memory_is_used_again_without_the_kernel():
    # All threads share one heap, as it is chance which of them take part in a call.
    found = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    given_back, kept = map(int, found.split())
    assert kept < given_back / 10
