"""What the figures of a run show: lines, marks and labels."""

import numpy as np
import pandas as pd
import pytest

from robust_jax import plots
from robust_jax.app.records import fates
from tests.made_up import EFFORTS, EPS, make_images, make_metrics, make_records


def check_labels(figure, num_panels: int) -> list:
    assert len(figure.axes) == num_panels
    assert all(ax.get_ylabel() for ax in figure.axes if ax.get_subplotspec().is_first_col())
    return figure.axes


def test_accuracy_against_eps_draws_each_attack_from_the_clean_accuracy():
    table = pd.DataFrame(
        [
            (c, n, a, e, 0.9 - e / 4)
            for c in ("best", "last")
            for n in EPS
            for a in (*EFFORTS, plots.WORST_CASE)
            for e in EPS[n]
        ],
        columns=["checkpoint", "norm", "attack", "eps", "accuracy"],
    )
    figure = plots.accuracy_against_eps(
        table, {"best": 0.95, "last": 0.9}, chance=0.1, trained=("linf", 0.1)
    )
    linf, l2 = check_labels(figure, 2)
    assert linf.get_xlabel() == l2.get_xlabel() == "ε"
    # worst case of best and of last, two attacks, chance; and the trained ε
    assert (len(linf.lines), len(l2.lines)) == (6, 5)
    assert list(linf.lines[0].get_ydata()) == pytest.approx([95, 88.75, 87.5, 85])
    colors = [{line.get_label(): line.get_color() for line in ax.lines} for ax in (linf, l2)]
    assert colors[0]["pgd"] == colors[1]["pgd"] != colors[0]["fgsm"]
    one = table[table["eps"] == EPS["linf"][0]]
    (ax,) = check_labels(
        plots.accuracy_against_eps(one, {"best": 0.95, "last": 0.9}, chance=0.1), 1
    )
    assert all(line.get_marker() != "None" for line in ax.lines if line.get_label() != "chance")


def test_training_curves_draw_what_there_is():
    metrics = pd.DataFrame(make_metrics(300, 250)).astype(float)
    axes = check_labels(plots.training_curves(metrics, best_step=250), 5)
    assert [len(ax.lines) for ax in axes] == [4, 4, 2, 2, 2]
    assert all(ax.get_xlabel() == "step" for ax in axes)
    few = metrics[["step", "train/loss", "validation/robust_accuracy"]].iloc[:7]
    assert [len(ax.lines) for ax in check_labels(plots.training_curves(few), 2)] == [1, 1]


def test_a_mean_over_the_rest_of_the_steps_is_not_drawn():
    steps = [10.0, 20.0, 30.0, 40.0, 43.0]
    rows = pd.DataFrame({"step": steps, "train/loss": [5.0, 4.0, 3.0, 2.0, 9.0]})
    (ax,) = check_labels(plots.training_curves(rows), 1)
    assert list(ax.lines[0].get_xdata()) == steps[:-1]
    (ax,) = check_labels(plots.training_curves(rows.iloc[:-1]), 1)
    assert list(ax.lines[0].get_xdata()) == steps[:-1]


def test_jacobian_histograms_leave_out_what_has_no_finite_number():
    tables = {name: make_records(0) for name in ("best", "last")}
    tables["last"]["frobenius_logits"] = np.nan
    legend = plots.jacobian_histograms(tables).axes[0].get_legend().get_texts()
    assert [text.get_text().partition(",")[0] for text in legend] == ["best"]


def test_jacobian_histograms_count_every_example_and_mark_medians():
    records = {"best": make_records(0), "last": make_records(1)}
    records["best"].loc[:3, "frobenius_probabilities"] = 0.0
    axes = check_labels(plots.jacobian_histograms(records), 4)
    assert all(ax.get_xlabel() and len(ax.lines) == 2 for ax in axes)
    assert [ax.get_xscale() for ax in axes] == ["linear", "linear", "log", "log"]
    for ax in axes:
        bars = [p.get_height() for p in ax.patches if hasattr(p, "get_height")]
        assert sum(bars) == len(records["best"])


def test_estimate_against_exact_has_the_diagonal():
    records = make_records(0)
    columns = ("frobenius_logits", "frobenius_estimate_logits", "frobenius_estimate_error_logits")
    (ax,) = check_labels(plots.estimate_against_exact(*(records[c] for c in columns)), 1)
    assert ax.get_xlabel()
    assert len(ax.lines) == 2
    assert np.array_equal(*ax.lines[1].get_data())


def test_fates_are_drawn_and_counted():
    records = make_records(0)
    fate = fates(records, ["pgd_linf", "fgsm_linf"], 0.1)
    figure = plots.fate_histograms(records, fate)
    axes = check_labels(figure, 2)
    assert all(ax.get_xlabel() for ax in axes)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"{name} ({(fate == name).sum()})" for name in plots.FATE_COLORS]
    boxes = check_labels(plots.jacobian_by_fate(records, fate), 4)
    assert all(ax.get_title() and len(ax.patches) == 3 for ax in boxes)
    median = records.loc[fate == "held", "frobenius_logits"].median()
    assert boxes[0].get_xticklabels()[0].get_text() == f"held\nmedian {median:.3g}"


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_says_what_is_seen(channels):
    images = make_images(channels, num=7)
    figure = plots.image_grid(
        images["clean"],
        images["adversarial"],
        images["label"],
        images["clean_prediction"],
        images["adversarial_prediction"],
        columns=4,
    )
    shown = [ax for ax in figure.axes if ax.images]
    assert len(figure.axes) == 24
    assert len(shown) == 21
    says = [ax.get_title() for ax in figure.axes[:4]]
    assert says == [f"label {y}: says {y}" for y in images["label"][:4]]
    assert plots.difference_scale(images["clean"], images["adversarial"]) == pytest.approx(0.1)
    assert plots.difference_scale(images["clean"], images["clean"]) == 1.0
