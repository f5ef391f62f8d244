"""benchmarks/scaling.py: the terms of its cost model."""

import argparse
import math

import jax
import pytest

from benchmarks import scaling
from robust_jax import models

LINKS = scaling.Links(bandwidth=1e9, latency=1e-6)
FLAGS = argparse.Namespace(model="mlp", image=(4, 4, 1), classes=3, num_steps=2, dtype="float32")


def test_allreduce_sends_almost_twice_the_array_and_waits_for_a_tree():
    assert scaling.allreduce_seconds(1000, 1, LINKS) == 0
    assert scaling.allreduce_seconds(1000, 2, LINKS) == pytest.approx(4e-6 + 2e-6)
    many = scaling.allreduce_seconds(1000, 1024, LINKS)
    assert many == pytest.approx(8e-6 * 1023 / 1024 + 20e-6)


def test_compute_is_shared_and_all_reduce_is_not():
    work = scaling.Work(flops_per_example=1e6, reduced_values=1000)
    one, two = (scaling.step_seconds(work, n, 64 // n, 1e9, LINKS) for n in (1, 2))
    assert one == (0.064, 0)
    assert two == (0.032, scaling.allreduce_seconds(1000, 2, LINKS))


def test_the_program_reduces_what_the_model_says():
    step, (state, batch, key) = scaling.step_and_inputs(FLAGS, jax.devices()[:4], 8)
    program = jax.jit(step).lower(state, batch, key).compile().as_text()
    sums = jax.eval_shape(step, state, batch, key)[1]
    expected = scaling.reduced_values(state, sums)
    assert expected > models.num_parameters(state.params)
    found = scaling.allreduced_bytes(program) / 4
    assert math.isclose(found, expected, rel_tol=0.01)


def test_bytes_are_read_from_a_program():
    line = "%all-reduce.1 = (f32[3,4]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1"
    assert scaling.allreduced_bytes(f"{line}\n%x = f32[7] add(%a, %b)") == 4 * 13
