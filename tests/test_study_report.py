"""The page and figures of a study that is in docs/."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from robust_jax.app import stored
from robust_jax.app.studies import intervals, report
from robust_jax.plots import networks
from tests.conftest import REPOSITORY


class Written(NamedTuple):
    """The results that a page shows, its folder, and the arguments of functions of plots."""

    results: dict[str, Any]
    workdir: Path
    given: dict[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir, given = tmp_path_factory.mktemp("study"), {}
    results = stored.results(REPOSITORY / "docs/studies/adversarial_strength")
    results["published"] = {"eps_1": {"clean": 62.74}}
    rng = np.random.default_rng(0)
    arrays = {
        arm: {
            "spectra/singular_values/head": np.array([2.0, 1.0 + i]),
            "spectra_initial/singular_values/head": np.array([5.0, 4.0]),
            "outputs/confidence": np.linspace(0, 1, 9),
            "features_initial/change_random/head": np.ones(3) + i,  # the initial networks differ
            "features_initial/change_adversarial/head": np.ones(3),
            "clusters/projection": rng.normal(size=(40, 2)),
            "clusters/label": np.arange(40) % 10,
        }
        for i, arm in enumerate(results["arms"])
    }

    def note(patch, module, name):
        plot = getattr(module, name)

        def noted(*values):
            given[name] = values
            return plot(*values)

        patch.setattr(module, name, noted)

    with pytest.MonkeyPatch.context() as patch:
        note(patch, networks, "singular_values")
        note(patch, report.plots, "measures_against_each_other")
        report.write(workdir, results, arrays)
    return Written(results, workdir, given)


def test_a_claim_about_most_layers_shows_the_interval_of_each(written):
    page = (written.workdir / "results.md").read_text()
    entries = [
        (name, entry)
        for claim in written.results["claims"].values()
        for test in claim["tests"]
        for name, entry in test.get("entries", {}).items()
    ]
    assert len(entries) > 20
    for name, entry in entries:
        mean, low, high = (f"{entry[of]:+.3g}" for of in ("mean", "low", "high"))
        assert page.count(f"{name} {mean} [{low}, {high}]") == 1
    assert "so: Conv_0 +1.04 [+0.887, +1.19], Dense_1 +0.142 [+0.0923, +0.191]; not so: " in page


def test_the_table_on_the_terminal_has_its_labels_whole(written):
    said = report.text(written.results)
    assert max(map(len, said.splitlines())) <= 80
    table = said[said.index("clean, %") :]
    for label in written.results["measures"]:
        *above, last = textwrap.wrap(label, 29, subsequent_indent="  ")
        assert "\n".join([*above, last]) in table


def test_an_arm_is_headed_by_its_whole_name_and_its_mark():
    arms = ["AT", "total variation, 100 labels", "total variation", "cnn regularised †"]
    lines = report._headings(arms)
    for i, arm in enumerate(arms):
        found = " ".join(line[12 * i : 12 * i + 12].strip() for line in lines)
        assert found.split() == arm.split()
    results = stored.results(REPOSITORY / "docs/studies/average_margin")
    assert "†" in report.text(results).partition("clean, %")[2]  # in the second half


TEST = {
    "measure": "pgd@0.1", "arms": ("a", "b"), "relation": "above", "values": [0.0] * 3,
    "images": 50,
    "from_images": 0.04, "smallest_effect": 0.0, "widest": 0.02, "verdict": "inconclusive",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "PGD at 0.1: A above B"),
        ({"by": -0.02}, "PGD at 0.1: A above B or at most 2 points below it"),
        ({"by": 0.02}, "PGD at 0.1: A above B by more than 2 points"),
        ({"relation": "rises"}, "PGD at 0.1 rises from A to B"),
        ({"relation": "rises", "by": -0.02}, "rises from A to B or falls by at most 2 points"),
        ({"relation": "falls", "by": 0.02}, "falls from A to B by more than 2 points"),
        ({"measure": "measurements.spectra.x/*"}, "most of spectra, x: A above B"),
        ({"measure": "measurements.spectra.x/*", "relation": "falls"}, "most of spectra, x fall"),
    ],
)
def test_a_test_is_described_with_what_it_tolerates(changes, said):
    assert said in report._describe({**TEST, **changes}, {}, {"a": "A", "b": "B"})


def test_a_page_says_what_open_tests_take_and_what_numbers_rest_on():
    few = {**TEST, "mean": 0.0, "low": -0.05, "high": 0.05, "smallest_effect": 0.02}
    least = intervals.least_half_width(50)
    alike = {**few, "low": -least, "high": least, "from_images": least}
    assert report._takes({**few, "from_images": 0.1}) == " (takes 5,000 images or more)"
    assert report._takes(alike) == " (takes 370 images or more)"
    assert intervals.interval(np.zeros((3, 370))).high < 0.01 + 1e-4
    assert report._takes({**few, "verdict": "refuted"}) == ""
    assert report._takes({**few, "smallest_effect": 0.0}) == ""  # a tolerance
    assert report._takes({**few, "low": 0.0, "high": 0.0, "from_images": 0.0}) == ""
    apart = {**few, "from_images": None, "smallest_effect": 0.04}
    known = intervals.interval(values := [0.0, 0.01, 0.02], bounds=(-1, 1))
    ends = dict(zip(("mean", "low", "high"), known, strict=False))
    count = intervals.seeds_needed(0.04, known, len(values))
    assert report._takes({**apart, **ends, "values": values}) == f" (takes about {count} seeds)"
    assert report._takes({**apart, **ends, "smallest_effect": 1e-4}) == " (takes over 1,000 seeds)"
    assert report._counted([3, 3], [500, 500]) == "3 seeds × 500 images"
    assert (
        report._counted([3, 5, 0], [500, None, None]) == "3 or 5 seeds × 500 images, or seeds alone"
    )
    assert report._counted([1], [None]) == "1 seed" and report._counted([0], [None]) == ""


def test_published_numbers_stand_in_both_pages(written):
    for page in ("report.html", "results.md"):
        assert (written.workdir / page).read_text().count("published 62.74") == 1


def test_what_was_measured_at_initialisation_is_one_more_line(written):
    (drawn,) = written.given["singular_values"]
    assert list(drawn) == [*written.results["arms"].values(), "initialisation"]
    np.testing.assert_array_equal(drawn["initialisation"]["head"], [5.0, 4.0])
    sizes = {path.stem: path.stat().st_size for path in (written.workdir / "figures").iterdir()}
    assert {"spectra", "outputs_confidence", "features_initial", "clusters", "pairs"} < set(sizes)
    assert "spectra_initial" not in sizes
    assert all(1000 < size < 500_000 for size in sizes.values())


def test_pairs_are_drawn_in_the_unit_of_the_table(written):
    table, pairs = written.given["measures_against_each_other"]
    assert ["mean margin", "input-space margin (ours)"] in pairs
    assert ["mean confidence", "clean, %"] in pairs
    for arm, name in written.results["arms"].items():
        for label, unit in (("clean", 100), ("mean margin", 1)):
            shown = table[name][label + (", %" if unit == 100 else "")]
            entry = written.results["table"][arm][label]
            assert shown["mean"] == pytest.approx(unit * entry["mean"])
            assert shown["values"] == pytest.approx(
                {seed: unit * value for seed, value in entry["values"].items()}
            )


def test_an_arm_of_which_a_seed_was_not_audited_is_marked():
    names = {"a": "A", "b": "B", "c": "C", "d": "D"}
    audits = {
        "a": {"0": "pass", "1": None}, "b": {"0": "warn", "1": None},
        "c": {"0": "pass", "1": "pass"}, "d": {},
    }  # fmt: skip
    assert report._arms({"arms": names, "audits": audits}) == ["A ‡", "B ⚠", "C", "D"]
