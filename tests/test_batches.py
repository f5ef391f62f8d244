"""Even batches of a few sizes cover every row once, in order."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from robust_jax.batches import batches, joined, on_one_device


@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 8), st.sampled_from((1, 4, 16)))
def test_every_row_once_in_even_batches_of_few_sizes(count, batch_size, devices, num_sizes):
    options = {"multiple_of": devices, "num_sizes": num_sizes}
    plan = list(batches(count, batch_size, **options))
    np.testing.assert_array_equal(
        np.concatenate([rows[:real] for rows, real in plan]), np.arange(count)
    )
    (size,) = {len(rows) for rows, _ in plan}
    assert size % devices == 0 and size < batch_size + devices
    largest = -(-batch_size // devices) * devices
    assert len(plan) == -(-count // largest)  # no more than by the largest size
    possible = {len(next(batches(n, batch_size, **options))[0]) for n in range(1, 301)}
    assert size in possible and len(possible) <= num_sizes


@given(st.integers(1, 300), st.integers(1, 100))
def test_little_is_made_up(count, batch_size):
    plan = list(batches(count, batch_size))
    made_up = sum(len(rows) for rows, _ in plan) - count
    assert made_up < len(plan) * (-(-batch_size // 16))


def test_few_rows_take_a_small_batch():
    assert [len(rows) for rows, _ in batches(300, 128)] == [104, 104, 104]
    assert [len(rows) for rows, _ in batches(329, 500)] == [352]
    assert [len(rows) for rows, _ in batches(5, 128)] == [8]
    assert [len(rows) for rows, _ in batches(329, 500, num_sizes=4)] == [375]
    assert [len(rows) for rows, _ in batches(5, 128, num_sizes=1)] == [128]


def test_an_accelerator_compiles_two_sizes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sizes = {len(rows) for count in range(1, 501) for rows, _ in batches(count, 500)}
    assert sizes == {250, 500}


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
