"""Batches of one size cover every row once, in order."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_jax.batches import joined, on_one_device, rows_of_batches


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@given(st.integers(1, 100), st.integers(0, 300), st.integers(1, 40), st.integers(1, 8))
def test_every_row_once_in_batches_of_few_sizes(backend, count, more, batch_size, devices):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        options = {"most": count + more, "multiple_of": devices}
        plan = list(rows_of_batches(count, batch_size, **options))
        possible = {
            len(next(rows_of_batches(n, batch_size, **options))[0]) for n in range(1, count + 1)
        }
    np.testing.assert_array_equal(
        np.concatenate([rows[:real] for rows, real in plan]), np.arange(count)
    )
    (size,) = {len(rows) for rows, _ in plan}
    assert size % devices == 0 and size < batch_size + devices
    assert size in possible and len(possible) <= {"cpu": 1, "gpu": 2}[backend]


def test_little_is_made_up():
    for most in range(1, 2000):
        made_up = sum(len(rows) for rows, _ in rows_of_batches(most, 500)) - most
        assert made_up < len(list(rows_of_batches(most, 500)))  # fewer rows than batches
    assert [len(rows) for rows, _ in rows_of_batches(5, 128)] == [5]
    assert [len(rows) for rows, _ in rows_of_batches(5, 128, most=200)] == [16]
    assert [len(rows) for rows, _ in rows_of_batches(130, 128, most=200)] == [16] * 9
    assert [len(rows) for rows, _ in rows_of_batches(130, 128, most=2000)] == [63] * 3


def test_an_accelerator_takes_them_all_at_once_or_half(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [len(rows) for rows, _ in rows_of_batches(450, 500, most=1000)] == [500]
    assert [len(rows) for rows, _ in rows_of_batches(250, 500, most=1000)] == [250]
    assert [len(rows) for rows, _ in rows_of_batches(600, 500, most=600)] == [300, 300]


def test_results_come_in_the_order_of_the_rows_and_padding_counts_for_nothing():
    seen = []

    def double(x):
        seen.append(x.shape)
        return 2 * x

    run = on_one_device(double, 16)(
        lambda fn, rows, shift: {"out": fn(rows["x"]) + shift, "row": rows["x"][:, 0]}
    )
    x = np.arange(42.0, dtype=np.float32).reshape(21, 2)
    for shift in (0.0, 1.0):
        result = run({"x": x}, shift)
        np.testing.assert_array_equal(result["out"], 2 * x + shift)
        np.testing.assert_array_equal(result["row"], x[:, 0])
    assert seen == [(11, 2)]  # traced once
    assert joined([{"a": np.ones(3)}, {"a": np.zeros(3)}], [3, 1])["a"].tolist() == [1, 1, 1, 0]
