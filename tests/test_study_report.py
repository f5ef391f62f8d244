"""The figures of a study's page, of one that is in docs/."""

import numpy as np
import pytest

from robust_jax.app import stored
from robust_jax.app.studies import report
from robust_jax.plots import networks
from tests.conftest import REPOSITORY


def test_a_claim_about_most_layers_shows_the_interval_of_each(tmp_path):
    results = stored.results(REPOSITORY / "docs/studies/adversarial_strength")
    report.write(tmp_path, results, {})
    page = (tmp_path / "README.md").read_text()
    entries = [
        (name, entry)
        for claim in results["claims"].values()
        for test in claim["tests"]
        for name, entry in test.get("entries", {}).items()
    ]
    assert len(entries) > 20
    for name, entry in entries:
        mean, low, high = (f"{entry[of]:+.3g}" for of in ("mean", "low", "high"))
        assert page.count(f"{name} {mean} [{low}, {high}]") == 1
    assert "so: Dense_0 +0.105 [+0.0465, +0.163], Dense_1 +0.112" in page


def test_what_was_measured_at_initialisation_is_one_more_line(tmp_path, monkeypatch):
    drawn = {}
    plot = networks.singular_values

    def noted(spectra):
        drawn.update(spectra)
        return plot(spectra)

    monkeypatch.setattr(networks, "singular_values", noted)
    results = stored.results(REPOSITORY / "docs/studies/adversarial_strength")
    arrays = {
        arm: {
            "spectra/singular_values/head": np.array([2.0, 1.0 + i]),
            "spectra_initial/singular_values/head": np.array([5.0, 4.0]),
            "outputs/confidence": np.linspace(0, 1, 9),
            "features_initial/change_random/head": np.ones(3) + i,  # of networks that differ
            "features_initial/change_adversarial/head": np.ones(3),
        }
        for i, arm in enumerate(results["arms"])
    }
    report.write(tmp_path, results, arrays)
    assert list(drawn) == [*results["arms"].values(), "initialisation"]
    np.testing.assert_array_equal(drawn["initialisation"]["head"], [5.0, 4.0])
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"spectra", "outputs_confidence", "features_initial"} < figures
    assert "spectra_initial" not in figures


def test_pairs_are_drawn_in_the_unit_of_the_table(tmp_path, monkeypatch):
    drawn = {}
    plot = report.plots.measures_against_each_other

    def noted(table, pairs):
        drawn.update(table=table, pairs=pairs)
        return plot(table, pairs)

    monkeypatch.setattr(report.plots, "measures_against_each_other", noted)
    results = stored.results(REPOSITORY / "docs/studies/adversarial_strength")
    report.write(tmp_path, results, {})
    assert ["mean margin", "input-space margin"] in drawn["pairs"]
    assert ["mean confidence", "clean, %"] in drawn["pairs"]
    for arm, name in results["arms"].items():
        for label, unit in (("clean", 100), ("mean margin", 1)):
            shown = drawn["table"][name][label + (", %" if unit == 100 else "")]
            entry = results["table"][arm][label]
            assert shown["mean"] == pytest.approx(unit * entry["mean"])
            assert shown["values"] == pytest.approx(
                {seed: unit * value for seed, value in entry["values"].items()}
            )
