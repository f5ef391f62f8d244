"""What a run's records say about each image, and how they are read."""

import numpy as np
import pandas as pd

from robust_jax.app.records import (
    as_far_as,
    breaking_eps,
    disagreements,
    fates,
    first_to_break,
    held,
    read,
)


def test_the_smallest_eps_that_breaks_is_that_of_the_attack_that_got_there_first():
    records = pd.DataFrame(
        {
            "correct": [True, True, True, False],
            "pgd@0.1/held": [True, False, True, False],
            "pgd@0.2/held": [False, False, True, False],
            "fgsm@0.1/held": [False, True, True, False],
            "other@0.05/held": [False, False, False, False],
        }
    )
    assert list(breaking_eps(records, ("pgd", "fgsm"))) == [0.1, 0.1, np.inf, 0]
    assert list(breaking_eps(records, ("pgd",))) == [0.2, 0.1, np.inf, 0]


def test_an_image_that_several_attacks_break_at_once_is_credited_to_none_of_them():
    def records_of(names):
        held = dict(zip(names, ([False, False, True], [False, True, True]), strict=True))
        columns = {}
        for name, values in held.items():
            columns[f"{name}@0.1/held"] = values
            columns[f"{name}@0.1/distance"] = np.where(values, np.nan, 0.08)
        return pd.DataFrame({"correct": True, **columns})

    for names in (("a", "z"), ("z", "a")):
        by = list(first_to_break(records_of(names), names, 0.1)["by"])
        assert by == ["several attacks", names[0], "none"]


def test_fates_follow_every_radius_up_to_eps():
    records = pd.DataFrame(
        {
            "correct": [False, True, True, True],
            "pgd_linf@0.0313725/held": [False, False, True, True],
            "pgd_linf@0.1/held": [False, True, False, True],
            "pgd_l2@0.01/held": [False, False, False, False],
        }
    )
    fate = list(fates(records, ["pgd_linf"], 8 / 255))
    assert fate == ["misclassified", "broken", "held", "held"]
    fate = list(fates(records, ["pgd_linf"], 0.1))
    assert fate == ["misclassified", "broken", "broken", "held"]


def test_records_read_as_they_were_written_and_older_ones_too(tmp_path):
    """held has three values: an example that was not attacked neither held nor broke."""
    records = pd.DataFrame(
        {
            "key": ["00000000000012e4", "0000000000000001", "0000000000000002"],
            "correct": [True, True, True],
            "all@0.1/held": pd.array([True, False, True], dtype="boolean"),
            "some@0.1/held": pd.array([True, False, None], dtype="boolean"),
        }
    )
    path = tmp_path / "records.csv"
    records.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read(path), records, check_dtype=False)
    assert read(path)["some@0.1/held"].dtype == "boolean"
    older = records.astype({"some@0.1/held": object}).replace({pd.NA: None})
    older.to_csv(path, index=False)
    pd.testing.assert_series_equal(held(read(path), "some", 0.1), held(records, "some", 0.1))
    assert held(records, "some", 0.1).mean() == 0.5
    assert list(fates(records, ["some"], 0.1)) == ["held", "broken", "held"]
    assert list(breaking_eps(records, ["some"])) == [np.inf, 0.1, np.inf]


def test_what_an_attack_did_to_examples_that_it_did_not_see_before_is_left_out():
    columns = {"correct": [True, True], "a@0.1/held": [True, False], "a@0.1/margin": [1.0, -1.0]}
    attacked = pd.DataFrame({"a@0.1/held": pd.array([True, None], dtype="boolean")})
    untouched = as_far_as(pd.DataFrame(columns), attacked, ["b"])
    pd.testing.assert_frame_equal(untouched, pd.DataFrame(columns))
    found = as_far_as(pd.DataFrame(columns), attacked, ["a"])
    assert found["correct"].all() and found["a@0.1/held"].tolist()[0]
    assert found["a@0.1/held"].isna().tolist() == found["a@0.1/margin"].isna().tolist()
    assert found["a@0.1/margin"].isna().tolist() == [False, True]


def test_another_class_is_a_disagreement_however_many_there_are():
    one = pd.DataFrame(
        {"prediction": [150, 7], "margin": [1.000, 2.0], "pgd@0.1/distance": [0.1, 0]}
    )
    other = one.assign(prediction=[151, 7], margin=[1.005, 2.0])
    assert disagreements(one, other) == {"prediction": 1}
    assert disagreements(one, one.assign(margin=[1.1, 2.0])) == {"margin": 1}
