"""Batches of a few sizes cover every row once, in order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from robust_jax.batches import batches, joined, on_one_device


@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 8))
def test_every_row_once_in_batches_of_at_most_three_sizes(count, batch_size, devices):
    plan = list(batches(count, batch_size, multiple_of=devices))
    np.testing.assert_array_equal(
        np.concatenate([rows[:real] for rows, real in plan]), np.arange(count)
    )
    sizes = {len(rows) for rows, _ in plan}
    assert all(size % devices == 0 and size < batch_size + devices for size in sizes)
    assert all(len(rows) == max(sizes) for rows, _ in plan[:-1])
    possible = {len(next(batches(n, batch_size, multiple_of=devices))[0]) for n in range(1, 301)}
    assert sizes <= possible and len(possible) <= 3


def test_few_rows_take_a_small_batch():
    assert [len(rows) for rows, _ in batches(300, 128)] == [128, 128, 128]
    assert [len(rows) for rows, _ in batches(270, 128)] == [128, 128, 32]
    assert [len(rows) for rows, _ in batches(5, 128)] == [8]


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
    assert seen == [(16, 2), (8, 2)] or seen == [(16, 2)]  # traced once for each size
    assert joined([{"a": np.ones(3)}, {"a": np.zeros(3)}], [3, 1])["a"].tolist() == [1, 1, 1, 0]
