"""The page and the terminal's table of a made-up run whose results follow from its records."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from robust_jax import plots
from robust_jax.analysis.summaries import wilson_interval
from robust_jax.app import cards, stored, wording
from robust_jax.app import results as results_lib
from robust_jax.app.evaluator import AttackGrid
from robust_jax.app.pages import html, report
from robust_jax.app.records import fates, first_to_break
from robust_jax.app.wording import format_eps
from robust_jax.errors import UserError
from tests.conftest import pages_undrawn
from tests.made_up import EFFORTS, EPS, HOSTILE, Page, make_audit, make_records, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(results, page) with an audit, an attack of an earlier evaluation and measurements."""
    workdir = tmp_path_factory.mktemp("run")
    results = make_run(
        workdir,
        dataset=HOSTILE,
        note={HOSTILE: [1, HOSTILE]},
        audit=make_audit(steps="pass", square="fail", noise="warn", transfer="skipped"),
        measurements={"outputs": {}, "energy_0": {"name": "energy", "at": "initialisation"}},
    )
    for attack in results["attacks"]:
        if attack["name"] == "fgsm_linf":
            attack["earlier"] = True
    results["measurements"] = {
        "outputs": {"mean_margin": 1.25, "calibration_error": None},
        "energy_0": {"path": 2.0},
    }
    stored.write_results(workdir, results)
    np.savez(workdir / "measurements.npz", **{"outputs/output_margin": np.linspace(-1, 3, 50)})
    path = report.write(workdir, stored.results(workdir))
    assert path == workdir / "report.html"
    return results, path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory):
    """(results, page) in colour where best is last, with an AutoAttack on the first 40."""
    workdir = tmp_path_factory.mktemp("one_checkpoint")
    results = make_run(workdir, channels=3, best=300)
    results["measurements"] = {"outputs": {"mean_margin": 1.25}}
    tables = stored.load(workdir).records
    attack_of_the_first(40, results, tables)
    for name, table in tables.items():
        table.to_csv(workdir / "records" / f"{name}.csv", index=False)
    with pages_undrawn():
        path = report.write(workdir, results)
    return results, Page(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("rows", "kind"), [(10, "svg+xml"), (10_000, "png")])
def test_a_figure_is_a_picture_of_pixels_only_where_it_is_large(rows, kind):
    figure = Figure()
    figure.subplots().scatter(*np.random.default_rng(0).random((2, rows)))
    source = html.image(figure, "dots")["src"]
    assert source.startswith(f"data:image/{kind};base64,")
    assert len(source) < 250_000


def test_the_page_is_whole_and_loads_nothing(run):
    _, html = run
    page = Page(html)
    sources = [attrs["src"] for attrs in page.all("img")]
    assert len(sources) == 9
    assert all(source.startswith("data:image/") for source in sources)
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert not page.all("script") and not page.all("link") and "http" not in html
    assert len(html) < 2e6
    assert html.startswith("<!DOCTYPE html>")


def test_what_came_from_the_config_is_escaped(run):
    _, html = run
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(
    ("mean", "error", "shown"),
    [
        (4.687, 0.19, "4.7 ± 0.2"),
        (16.7128, 0.016, "16.71 ± 0.02"),
        (1234.4, 4.4, "1,234 ± 4"),
        (1234.4, 44.0, "1,230 ± 40"),
        (6.2345e-5, 2e-7, "6.23e-05 ± 2e-07"),
        (3.14159, 0.0, "3.14 ± 0"),
        (3.14159, None, "3.14"),
    ],
)
def test_a_mean_is_shown_to_the_digit_of_its_error(mean, error, shown):
    assert report._with_error({"mean": mean, "standard_error": error}) == shown


def test_the_page_and_the_table_hold_the_results(run):
    results, html = run
    text, plain = Page(html).text, report.table(results)
    for name in ("best", "last"):
        for share in (
            results[name]["clean"]["accuracy"],
            *(a["robust_accuracy"] for a in results[name]["attacks"]),
        ):
            assert f"{100 * share:.1f}" in text
            assert f"{100 * share:.1f}" in plain
        for norms in results[name]["jacobian"].values():
            for values in norms.values():
                assert report._with_error(values) in text
                assert report._with_error(values) in plain
    assert "step 250" in text and "step 300" in text


def test_each_accuracy_is_in_its_own_row_and_column(run):
    results, _ = run
    lines = report.table(results).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ℓ∞"))
    assert lines[start].split()[-3:] == ["0.05", "0.1", "0.2"]
    for i, kind in enumerate(("fgsm", "pgd", "worst_case")):
        for j, name in enumerate(("best", "last")):
            expected = [
                f"{100 * a['robust_accuracy']:.1f}"
                for a in results[name]["attacks"]
                if a["name"] == f"{kind}_linf"
            ]
            assert lines[start + 1 + 2 * i + j].split()[-4:] == [name, *expected]


def test_the_headline_is_about_the_trained_radius(run):
    results, html = run
    worst = next(
        a for a in results["attacks"] if a["name"] == "worst_case_linf" and a["eps"] == 0.1
    )
    low, high = wilson_interval(worst["robust_accuracy"], worst["count"])
    sentence = report.headline(results)
    assert (
        f"{100 * worst['robust_accuracy']:.1f} % (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f} %)"
    ) in sentence
    assert sentence in Page(html).text
    assert "ε = 0.1, the size it was trained against" in sentence


def test_the_audit_stands_beside_the_numbers(run):
    results, page = run[0], Page(run[1])
    sentence = report.audit_sentence(results)
    assert sentence.startswith("Audit failed (ℓ∞ ε = 0.1, 100 images): square. Do not trust")
    assert page.text.count(sentence) == 3  # at the top and in the caption of both norms' tables
    assert "advice on square" in page.text and "advice on noise" in page.text
    assert "evidence of steps" in page.text and "advice on steps" not in page.text
    table = " ".join(report.table(results).split())
    assert sentence in table
    said = report.audit_text(results)
    assert " ".join(said.split()).startswith(sentence)
    for line in (
        "pass    steps: evidence of steps",
        "fail    square: evidence of square. Advice on",
    ):
        assert line in said
    for verdicts, start in (
        (
            {"steps": "pass", "transfer": "skipped"},
            "Audit passed (ℓ∞ ε = 0.1, 100 images): 1 checks",
        ),
        ({"steps": "warn"}, "Audit passed with warnings (ℓ∞ ε = 0.1, 100 images): steps."),
    ):
        assert report.audit_sentence({"audit": make_audit(**verdicts)}).startswith(start)
    assert report.audit_sentence({"audit": None}).startswith("Not audited")
    for name, masked in (("batch", False), ("square", True)):
        said = report.audit_sentence({"audit": make_audit(**{name: "fail"})})
        assert "Do not trust" in said and ("gradients are masked" in said) == masked


def test_what_breaks_each_image_first_is_counted_and_sums_to_all(run):
    results, html = run
    records = make_records(0)
    found = first_to_break(records, {"fgsm_linf", "pgd_linf"}, 0.1)
    held = found["by"] == "none"
    assert held.mean() == next(
        a["robust_accuracy"]
        for a in results["attacks"]
        if a["name"] == "worst_case_linf" and a["eps"] == 0.1
    )
    assert (found["by"] == "misclassified").sum() == (~records["correct"]).sum()
    assert np.isinf(found.loc[held, "eps"]).all() and found.loc[held, "distance"].isna().all()
    # PGD needs less than FGSM: it is never second, and FGSM never alone.
    assert set(found["by"]) == {"none", "misclassified", "several attacks", "pgd_linf"}
    counts = [
        int(c.replace(",", ""))
        for c in re.findall(r'<th scope="row">[^<]*</th><td>[^<]*</td><td>([0-9,]+)</td><td>', html)
    ]
    assert counts[-1] == len(records) == sum(counts[:-1])
    radii = [
        float(eps)
        for eps in re.findall(
            r'<th scope="row">(?:pgd_linf|several attacks)</th><td>([0-9.]+)</td>', html
        )
    ]
    assert radii == sorted(radii) and len(radii) == 4


def attack_of_the_first(count, results, tables):
    """Adds an AutoAttack on the first examples that breaks half of those still held."""
    for name, table in tables.items():
        held = table["pgd_linf@0.1/held"].astype("boolean")
        held[:count] &= np.arange(count) % 2 == 0
        table["autoattack_linf@0.1/held"] = held.where(np.arange(len(table)) < count)
        for what in ("distance", "margin"):
            table[f"autoattack_linf@0.1/{what}"] = 0.1
        worst = float(held[:count].astype(bool).mean())
        shared = {
            "norm": "linf",
            "eps": 0.1,
            "robust_accuracy": worst,
            "count": count,
            "mean_distance": None,
        }
        results[name]["attacks"] = [
            *results[name]["attacks"],
            {"name": "autoattack_linf", "attack": "autoattack", **shared},
            {"name": f"worst_case_linf_first_{count}", "attack": "worst_case_of_first", **shared},
        ]
    results["attacks"] = results["best"]["attacks"]


def test_where_an_attack_saw_the_first_images_all_say_so(one_checkpoint):
    results, page = one_checkpoint
    share = f"{100 * results['attacks'][-1]['robust_accuracy']:.1f}"
    assert f"leaves {share} % of the first 40, all attacks together {share} % of these" in (
        report.headline(results)
    )
    for label in ("autoattack, first 40", "worst case, first 40"):
        assert label in page.text
    assert "only the first N images were attacked" in page.text
    lines = report.table(results).splitlines()
    assert any(line.startswith("autoattack of 40 ") and share in line for line in lines)
    drawn = (
        plots.accuracy_against_eps(report._attack_table(results), {"best": 0.9}, chance=0.1)
        .axes[0]
        .lines
    )
    hollow = {line.get_label() for line in drawn if line.get_markerfacecolor() == "white"}
    assert hollow == {"autoattack, first 40", "worst case, first 40"}


def test_the_worst_case_counts_nobody_whom_no_attack_saw(tmp_path):
    results = make_run(tmp_path, norms=("linf",))
    table = stored.load(tmp_path).records["best"]
    held = table["pgd_linf@0.1/held"].astype("boolean")
    for what in ("held", "distance", "margin"):  # AutoAttack on 20, at a radius of its own
        column = held & (np.arange(len(table)) % 4 == 0) if what == "held" else 0.2
        table[f"few@0.2/{what}"] = column
        table.loc[20:, f"few@0.2/{what}"] = pd.NA
    grids = {
        name: AttackGrid(kind, lambda: None, "linf", eps, count, members)
        for name, kind, eps, count, members in (
            ("pgd_linf", "pgd", (0.1,), None, ()),
            ("few", "fgsm", (0.2,), 20, ()),
        )
    }
    worst = {
        (a["eps"], a["count"]): a["robust_accuracy"]
        for a in results_lib.summarize(table, grids)["attacks"]
        if a["attack"].startswith("worst_case")
    }
    assert set(worst) == {(0.1, len(table)), (0.1, 20), (0.2, 20)}
    assert worst[0.1, len(table)] == held.mean() and worst[0.2, 20] <= worst[0.1, 20]
    alone = results_lib.summarize(table, {"few": grids["few"]})["attacks"]
    assert [(a["attack"], a["count"]) for a in alone] == [("fgsm", 20), ("worst_case", 20)]
    results.update(results_lib.summarize(table, {"few": grids["few"]}), threat=None)
    assert re.search(r"\d+\.\d %.* of the first 20 still under the worst", report.headline(results))
    # The page does not count the others among those that held either.
    assert report._first_to_break(results, table)[-1]["images"] == "20"
    seen, names = report._attacked(results, table, report.reference_radius(results))
    assert len(seen) == 20 and "few" in names
    assert (fates(seen, names, 0.2) == "held").mean() == alone[1]["robust_accuracy"]


def test_a_page_takes_one_image_and_outputs_that_are_no_numbers(tmp_path):
    results = make_run(tmp_path)
    table = stored.load(tmp_path).records["best"]
    for column in ("top_probability", "confidence", "frobenius_logits"):
        if column in table:
            table.loc[0, column] = np.nan
    table.to_csv(tmp_path / "records" / "best.csv", index=False)
    for of_norm in results["best"]["jacobian"].values():
        for found in of_norm.values():
            found["standard_error"] = None  # of one image
    results["best"]["jacobian"]["logits"]["frobenius"]["mean"] = None  # of an infinite norm
    page = Page(report.write(tmp_path, results).read_text(encoding="utf-8"))
    assert "‖J‖ Frobenius, logits–" in page.text.replace("\n", "")


def test_a_card_is_of_the_threat_model_whatever_the_order_of_its_fields(tmp_path):
    results = make_run(tmp_path)
    entry = {
        "name": "aa", "attack": "autoattack", "norm": "linf", "count": 50,
        "members": {"clean": 0.9, "apgd_ce": 0.5},
    }  # fmt: skip
    results["attacks"] = [
        {**entry, "eps": eps, "robust_accuracy": robust}
        for eps, robust in ((0.05, 0.8), (0.1, 0.5))
    ]
    results["config"]["attacks"] = {"aa": {}}
    for threat in ({"norm": "linf", "eps": 0.1}, {"eps": 0.1, "norm": "linf"}):
        card = cards.card({**results, "threat": threat})
        assert (card["eps"], card["autoattack_acc"]) == ("0.1", "50.00")


def test_what_an_earlier_evaluation_left_is_named(run, one_checkpoint):
    assert "Kept from an earlier evaluation: fgsm_linf." in Page(run[1]).text
    assert "Kept from an earlier evaluation" not in one_checkpoint[1].text


def test_measurements_have_a_table_and_figures_and_lines_in_the_terminal(run):
    results, page = run[0], Page(run[1])
    assert "mean margin" in page.text and "1.25" in page.text
    assert "expected calibration error" in str(page.all("img"))
    lines = report.measurements_text(results["measurements"]).splitlines()
    assert lines[0] == "outputs:" and lines[1].split() == ["mean", "margin", "1.25"]
    assert max(map(len, lines)) <= 80


def test_a_measurement_of_another_checkpoint_says_so(run, one_checkpoint):
    said = "of the best checkpoint except for energy 0: initialisation."
    assert said in Page(run[1]).text
    assert "asked for, of the best checkpoint." in one_checkpoint[1].text


@pytest.mark.parametrize(
    "name, said",
    [
        *((name, name.upper()) for name in ("fgsm", "pgd", "apgd", "jsma", "mlp", "kl", "vat")),
        *((name, name) for name in ("mean", "q5", "path", "rise", "mine")),
        ("boosted_cross_entropy", "boosted cross-entropy"),
    ],
)
def test_only_abbreviations_are_in_capitals(name, said):
    assert wording.words(name) == said


TITLES = {
    "standard training": {"loss_on": "clean"},
    "adversarial training + EntM (λ = 2)": {},
    "adversarial training": {"regularizers": {"entropy": {"weight": 0}}},
    "TRADES (λ = 6)": {
        "loss_on": "clean",
        "regularizers": {"kl": {"weight": 6.0}},
        "adversary": {"name": "pgd", "loss": "kl", "num_steps": 10},
    },
    "MART (λ = 5)": {
        "loss": {"name": "boosted_cross_entropy"},
        "regularizers": {"weighted_kl": {"weight": 5}},
    },
    "adversarial training on both halves + AWP (γ = 0.005)": {
        "loss_on": "both",
        "regularizers": {},
        "weight_perturbation": 0.005,
    },
    "standard training with label smoothing 0.1 + oscillation energy (λ = 1)": {
        "loss_on": "clean",
        "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
        "regularizers": {"mine": {"name": "energy_oscillation", "weight": 1.0}},
    },
    "adversarial training + EntM (λ = 0.5) + EntM (λ = 0.2)": {
        "regularizers": {
            "entropy": {"weight": 0.5},
            "also": {"name": "entropy", "weight": 0.2, "on": "clean"},
        },
    },
    "guided complement entropy on clean images": {
        "loss_on": "clean",
        "loss": {"name": "guided_complement_entropy"},
        "regularizers": {},
    },
}


@pytest.mark.parametrize("name", TITLES)
def test_the_title_has_the_method_and_its_weight(name, tmp_path):
    config = {"regularizers": {}, **TITLES[name]} if "standard" in name else TITLES[name]
    results = make_run(tmp_path, **config)
    assert report.title(results) == f"digits, CNN: {name}, PGD-10 at ℓ∞ ε = 0.1"


def test_no_adversary_no_metrics_and_no_images(tmp_path, undrawn):
    results = make_run(tmp_path, adversary=False, norms=("linf",), regularizers={})
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "examples.npz").unlink()
    page = Page(report.write(tmp_path, stored.results(tmp_path)).read_text(encoding="utf-8"))
    assert "not a size it was trained against" in page.text
    assert report.title(results) == "digits, CNN: standard training"
    assert len(page.all("img")) == 6
    sizes = [line.split()[-1] for line in report.table(results).splitlines() if "at ε" in line]
    assert sizes == ["0.2"]
    largest = max(
        a["eps"]
        for a in results["attacks"]
        if a["attack"] == "worst_case" and a["robust_accuracy"] > 0.1
    )
    assert report.reference_radius(results) == ("linf", largest, False)


def test_best_is_last_in_colour(one_checkpoint):
    results, page = one_checkpoint
    assert "is the last one too (step 300)" in page.text
    assert "grey where nothing changed" in page.text
    assert " last " not in report.table(results)


def test_no_attack_at_all(tmp_path, undrawn):
    results = make_run(tmp_path, norms=())
    (tmp_path / "examples.npz").unlink()
    page = Page(report.write(tmp_path, stored.results(tmp_path)).read_text(encoding="utf-8"))
    assert "No attack was evaluated." in page.text
    assert len(page.all("img")) == 4
    assert "clean accuracy" in report.table(results)


def test_the_table_fits_eighty_columns(tmp_path, monkeypatch):
    monkeypatch.setitem(EPS, "linf", tuple(i / 255 for i in range(1, 10)))
    monkeypatch.setitem(EFFORTS, "a_name_too_long_for_any_table", 1.1)
    plain = report.table(make_run(tmp_path))
    assert max(map(len, plain.splitlines())) <= 80
    assert "9/255" in plain


def test_attacks_that_differ_in_the_norm_they_are_named_after_only_stay_apart(run):
    results, _ = run
    clash = [
        {**a, "name": "pgd", "robust_accuracy": 0.123}
        for a in results["attacks"]
        if a["name"] == "pgd_linf"
    ]
    entry = {**results["best"], "attacks": [*clash, *results["attacks"]]}
    plain = report.table({**results, **entry, "best": entry})
    assert re.search(r"^pgd +best +12\.3 +12\.3 +12\.3$", plain, re.MULTILINE)
    assert re.search(r"^pgd_linf +best", plain, re.MULTILINE)


def test_wilson_interval_against_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (0.1, "0.1"),
        (8 / 255, "8/255"),
        (0.0313725, "8/255"),
        (1.0, "1"),
        (0.2, "0.2"),
        (0.0314, "0.0314"),
    ],
)
def test_format_eps(eps, text):
    assert format_eps(eps) == text


def test_results_of_another_schema_are_read_or_refused_in_one_line(tmp_path):
    make_run(tmp_path)
    before = stored.results(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.pop("schema") == before.pop("schema") == stored.SCHEMA
    (tmp_path / "results.json").write_text(json.dumps(found))  # as before results had a schema
    assert stored.results(tmp_path) == before
    report.table(before)
    (tmp_path / "results.json").write_text(json.dumps({**found, "schema": stored.SCHEMA + 1}))
    with pytest.raises(
        UserError, match=r"has the schema \d, and this robust_jax reads up to \d; take"
    ):
        stored.results(tmp_path)


@pytest.mark.parametrize("end", [1e-4, 1e4 * (1 - 1e-12)])
def test_a_temperature_at_the_end_of_its_range_matches_nothing(end):
    """Logits that are right everywhere, or worse than chance, have no best temperature."""
    records = make_records(0)
    found = results_lib.summarize(records, {}, temperature=end)
    assert found["temperature"] == end
    assert found["jacobian"]["matched"]["frobenius"]["mean"] is None
    inside = results_lib.summarize(records, {}, temperature=2.0)
    expected = records["frobenius_logits"].mean() / 2
    assert inside["jacobian"]["matched"]["frobenius"]["mean"] == pytest.approx(expected)


def test_the_best_validation_is_never_the_untrained_network_s(tmp_path):
    """Tracked margins add a step 0; ties near 0 occur in plain training under PGD."""
    lines = [
        {
            "step": step,
            "validation/robust_accuracy": robust,
            "validation/cross_entropy": float(step),
        }
        for step, robust in ((0, 0.1), (5, 0.0), (10, 0.02), (15, 0.02))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = results_lib.validations(tmp_path)
    assert {when: v["cross_entropy"] for when, v in found.items()} == {
        "first": 0,
        "best": 10,
        "last": 15,
    }
