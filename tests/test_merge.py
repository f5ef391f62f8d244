"""What an evaluation of a finished run adds to it, and what it refuses to replace."""

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

from configs import default
from robust_jax.app import merge
from robust_jax.errors import UserError


def asked(**fields):
    config = default.get_config()
    config.update(fields)
    return config


def test_attacks_measurements_and_radii_are_added_and_none_is_lost():
    old = default.get_config()
    old.measurements = {"outputs": {"num_examples": 100}}
    new = default.get_config()
    new.attacks = ConfigDict({"pgd_linf": {**old.attacks.pgd_linf, "eps": (0.12,)}})
    new.measurements = {"gaps": {}}
    both = merge.merged(old, new, "evaluate")
    assert set(both.attacks) == set(old.attacks) and set(both.measurements) == {"outputs", "gaps"}
    assert both.attacks.pgd_linf.eps == (0.05, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3)
    assert both.attacks.autoattack_linf.to_dict() == {
        **old.attacks.autoattack_linf.to_dict(),
        "eps": 0.15,
    }
    only_measured = merge.merged(old, new, "measure")
    assert only_measured.attacks == old.attacks
    assert (
        merge.merged(old, asked(audit={**old.audit, "num_examples": 7}), "audit").audit[
            "num_examples"
        ]
        == 7
    )


def test_a_run_that_was_trained_against_another_threat_model_stays_that():
    new = default.get_config()
    new.threat.eps = 0.3
    both = merge.merged(default.get_config(), new, "evaluate")
    assert both.threat.eps == 0.3 and both.adversary.eps == both.validation_attack.eps == 0.15


def test_measurements_of_another_threat_model_keep_the_radius_that_they_had():
    old, new = default.get_config(), default.get_config()
    old.measurements, new.measurements = {"energy": {}}, {"energy_at_03": {"name": "energy"}}
    new.threat.eps = 0.3
    both = merge.merged(old, new, "evaluate").measurements
    assert both.energy.eps == 0.15 and "eps" not in both.energy_at_03
    new.threat.eps = old.threat.eps
    assert "eps" not in merge.merged(old, new, "evaluate").measurements.energy


@pytest.mark.parametrize("mode", ["evaluate", "measure"])
def test_a_label_keeps_its_meaning(mode):
    old, new = default.get_config(), default.get_config()
    old.measurements = {"outputs": {"num_examples": 100}}
    new.measurements = {"outputs": {"num_examples": 20}}
    with pytest.raises(UserError, match="measurements.outputs is not what .* 100 → .*20.*another"):
        merge.merged(old, new, mode)
    new = default.get_config()
    new.attacks.pgd_linf.num_steps = 7
    if mode == "evaluate":
        with pytest.raises(UserError, match="attacks.pgd_linf is not what .*num_steps: 20 → 7"):
            merge.merged(old, new, mode)


def test_more_examples_are_taken_and_fewer_are_not():
    old, new = default.get_config(), default.get_config()
    for was, wanted, taken in ((100, 50, 100), (100, 200, 200), (0, 50, 0), (100, 0, 0)):
        old.evaluation.num_examples, new.evaluation.num_examples = was, wanted
        assert merge.merged(old, new, "evaluate").evaluation.num_examples == taken


def test_records_keep_what_was_found_by_example():
    old = pd.DataFrame(
        {"index": [0, 1], "aa@0.1/held": [True, False], "pgd@0.1/held": [True, True]}
    )
    fresh = pd.DataFrame({"index": [1, 0, 2], "pgd@0.2/held": [False, False, True]})
    kept = merge.with_kept(fresh, old, ["aa"])
    assert list(kept["aa@0.1/held"][:2]) == [False, True] and pd.isna(kept["aa@0.1/held"][2])
    assert "pgd@0.1/held" not in kept
    found = merge.are_kept(old, {"aa": {"eps": (0.1,)}, "pgd": {"eps": (0.1, 0.2)}})
    assert found == {"aa"} and merge.are_kept(None, {"aa": {"eps": 0.1}}) == set()
    before = {"a/x": np.zeros(1), "b/x": np.zeros(1)}
    assert set(merge.arrays(before, {"a/y": np.ones(1)}, ["a"])) == {"a/y", "b/x"}


def test_a_list_is_the_tuple_that_a_folder_gives_back():
    old, new = default.get_config(), default.get_config()
    new.attacks.autoattack_linf.version = ["apgd_ce", "square"]
    old.attacks.autoattack_linf.version = ("apgd_ce", "square")
    assert list(merge.merged(old, new, "evaluate").attacks) == list(old.attacks)
