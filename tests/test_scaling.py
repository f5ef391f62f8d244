"""benchmarks/scaling.py: the terms of its cost model."""

import argparse
import math

import jax
import pytest
from jax.sharding import SingleDeviceSharding

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
    line = "%all-reduce.1 = (f32[3,4]{1,0}, f32[], bf16[5]) all-reduce(%a, %b, %c), channel_id=1"
    assert scaling.allreduced_bytes(f"{line}\n%x = f32[7] add(%a, %b)") == 4 * 13 + 2 * 5


@pytest.mark.slow
def test_a_tpu_s_compiler_takes_the_step(capsys):
    pytest.importorskip("libtpu", reason="of the tpu extra")
    flags = {**vars(FLAGS), "model": "lenet5", "image": (28, 28, 1), "dtype": "bfloat16"}
    scaling.compiled_for_tpu(argparse.Namespace(**flags, tpu="v5e:2x2", batch_per_device=2))
    printed = capsys.readouterr().out
    assert "lenet5 on 4 × TPU v5 lite (v5e:2x2), 8 images" in printed
    assert "to bf16" in printed and "to f32" not in printed


@pytest.mark.slow
def test_a_tpu_s_compiler_takes_the_attacks_and_asks_the_host_for_nothing(capsys, monkeypatch):
    pytest.importorskip("libtpu", reason="of the tpu extra")
    few = {name: scaling.ATTACKS[name] for name in ("apgd_ce", "frobenius_norm")}
    monkeypatch.setattr(scaling, "ATTACKS", few)
    scaling.attacks_compiled_for_tpu(
        argparse.Namespace(**vars(FLAGS), tpu="v5e:2x2", batch_per_device=2)
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mlp on 4 × TPU v5 lite, 8 images"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [row[0] for row in rows] == list(few) and {row[-1] for row in rows} == {"0"}
    x = jax.ShapeDtypeStruct(
        (8,), float, sharding=SingleDeviceSharding(scaling.chips_of("v5e:2x2")[0])
    )
    told = jax.jit(lambda x: jax.debug.callback(print, x)).lower(x).compile().as_text()
    assert scaling.host_crossings(told) > 0


def test_exchanges_with_the_host_are_counted():
    lines = (
        "%a = (f32[3], u32[]) send(%x, %t), channel_id=1, is_host_transfer=true",
        "%o = token[] outfeed(%x, %t)",
        "%b = f32[3] add(%x, %x)",
    )
    assert [scaling.host_crossings(line) for line in lines] == [1, 1, 0]


def test_a_topology_that_nothing_compiles_for_is_told_in_one_line():
    flags = argparse.Namespace(**vars(FLAGS), tpu="v0:9x9", batch_per_device=2)
    with pytest.raises(SystemExit, match="error: --tpu=v0:9x9: [^\n]+$"):
        scaling.compiled_for_tpu(flags)
