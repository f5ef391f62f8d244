"""A study's page and its figures, of a study that is in docs/."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from robust_jax.app import stored
from robust_jax.app.studies import report
from robust_jax.plots import networks
from tests.conftest import REPOSITORY


class Written(NamedTuple):
    """What a page was written from, its folder, and what functions of plots were given."""

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
            "features_initial/change_random/head": np.ones(3) + i,  # of networks that differ
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
    page = (written.workdir / "README.md").read_text()
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


def test_published_numbers_stand_in_both_pages(written):
    for page in ("report.html", "README.md"):
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
