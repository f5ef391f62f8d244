"""benchmarks/timing.py and growth.py time a step and no compilation."""

import jax
import numpy as np
import pytest

from benchmarks import growth, timing


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_step_compiles_once_and_trains(num_seeds, caplog):
    step = timing.TrainingStep(
        growth.cnn, (8, 8, 1), batch_size=8, num_steps=1, num_seeds=num_seeds
    )
    assert step.flops() > 0
    step()
    with jax.log_compiles():
        results = step()
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    sums = results[1] if num_seeds == 1 else results[0][1]
    assert float(sums["gradient_norm"][0]) > 0
    assert int((results[0] if num_seeds == 1 else results[0][0]).step) == 2


def test_turns_have_a_row_for_each_repeat():
    calls = []
    seconds = timing.turns({name: lambda n=name: calls.append(n) for name in "ab"}, repeats=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]  # the first of each compiles, untimed
    assert seconds.shape == (2, 2) and (seconds >= 0).all() and np.isfinite(seconds).all()
