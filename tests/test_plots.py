"""What the figures of the measurements show: lines, marks and labels."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from robust_jax import plots
from robust_jax.analysis import calibration
from robust_jax.app.pages import figures
from robust_jax.plots import study as study_plots

ARMS = ("standard", "adversarial")


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_distributions_mark_minimum_and_mean_and_count_what_is_left_out(rng):
    values = {arm: rng.normal(i, 1, 100) for i, arm in enumerate(ARMS)}
    values["adversarial"][:3] = np.inf
    figure = plots.distributions(values, xlabel="ℓ∞ margin, pixels")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "ℓ∞ margin, pixels" and ax.get_ylabel()
    assert ax.get_xscale() == "linear"
    kept = {arm: v[np.isfinite(v)] for arm, v in values.items()}
    marks = [line.get_xdata() for line in ax.lines]
    expected = [m for v in kept.values() for m in ([v.mean()] * 2, [v.min()])]
    for mark, value in zip(marks, expected, strict=True):
        np.testing.assert_allclose(mark, value)
    texts = legend(figure)
    assert [text.split(":")[0] for text in texts] == list(ARMS)
    assert "not finite" not in texts[0] and "(3 of 100 not finite)" in texts[1]
    for patch in ax.patches:  # an outline has two points a bar: take one
        heights = patch.get_xy()[1:-1:2, 1]
        assert heights.sum() == pytest.approx(100)


def test_distributions_of_energies_are_logarithmic(rng):
    energies = {arm: rng.lognormal(i, 2, 200) for i, arm in enumerate(ARMS)}
    energies["standard"][0] = 0.0
    (ax,) = plots.distributions(energies, xlabel="energy, nats²").axes
    assert ax.get_xscale() == "log"
    energies["standard"][0] = -1.0
    (ax,) = plots.distributions(energies, xlabel="energy, nats²").axes
    assert ax.get_xscale() == "linear"


def test_singular_values_have_a_panel_a_layer_and_a_line_an_arm(rng):
    spectra = {
        "wide": {"Conv_0": rng.random(9), "Dense_0": rng.random(8) + 1, "head": [2.0, 3.0]},
        "deep": {"Conv_0": rng.random(5), "Conv_1": [1.0, 1e-9], "head": [2.0, 1.0]},
    }
    figure = plots.singular_values(spectra)
    lines = {ax.get_title(): len(ax.lines) for ax in figure.axes}
    assert lines == {"Conv_0": 2, "Dense_0": 1, "head": 2, "Conv_1": 1}
    assert legend(figure) == ["wide", "deep"]
    head = next(ax for ax in figure.axes if ax.get_title() == "head")
    np.testing.assert_array_equal(head.lines[0].get_ydata(), [3, 2])
    np.testing.assert_array_equal(head.lines[0].get_xdata(), [25, 75])
    assert all(ax.get_xlabel() for ax in figure.axes[-3:])


def test_by_layer_joins_medians_with_the_middle_half(rng):
    changes = {
        title: {arm: {"conv1": rng.random(50) + 1, "logits": 3.0} for arm in ARMS}
        for title in ("random δ", "adversarial δ")
    }
    figure = plots.by_layer(changes, ylabel="feature change")
    assert [ax.get_title() for ax in figure.axes] == list(changes)
    assert figure.axes[0].get_ylabel() == "feature change"
    for ax, arms in zip(figure.axes, changes.values(), strict=True):
        assert [t.get_text() for t in ax.get_xticklabels()] == ["conv1", "logits"]
        for container, layers in zip(ax.containers, arms.values(), strict=True):
            np.testing.assert_allclose(
                container.lines[0].get_ydata(), [np.median(layers["conv1"]), 3]
            )
            (bar, _) = container.lines[2][0].get_segments()
            np.testing.assert_allclose(bar[:, 1], np.quantile(layers["conv1"], [0.25, 0.75]))
    assert legend(figure) == list(ARMS)


def test_a_layer_without_a_finite_number_is_left_out():
    """The relative change of a dead layer is 0/0."""
    changes = {
        "random": {"at": {"conv": [np.nan, np.inf], "logits": [1.0, 2.0]}, "ce": {"conv": []}}
    }
    (ax,) = plots.by_layer(changes, ylabel="").axes
    (line,) = ax.lines[:1]
    np.testing.assert_array_equal(line.get_ydata(), [1.5])


def test_reliability_diagram_says_the_error(rng):
    p = rng.random(500)
    curves = {
        arm: calibration.reliability(p, rng.random(500) < p**i) for i, arm in enumerate(ARMS, 1)
    }
    figure = plots.reliability_diagram(curves)
    top, bottom = figure.axes
    assert top.get_ylabel() and bottom.get_xlabel() and bottom.get_ylabel()
    for arm, text in zip(ARMS, legend(figure)[1:], strict=True):
        error = 100 * calibration.expected_calibration_error(curves[arm])
        assert text == f"{arm}, ECE {error:.1f} %"
    np.testing.assert_allclose(top.lines[1].get_xdata(), 100 * curves["standard"].confidence)
    assert all(patch.get_data().values.sum() == pytest.approx(100) for patch in bottom.patches)


def test_loss_along_has_a_line_an_arm_at_even_steps(rng):
    values = {arm: rng.random((20, 5)) + i for i, arm in enumerate(ARMS)}
    (ax,) = plots.loss_along(values).axes
    for line, of_arm in zip(ax.lines, values.values(), strict=True):
        np.testing.assert_allclose(line.get_xdata(), [0, 25, 50, 75, 100])
        np.testing.assert_allclose(line.get_ydata(), of_arm.mean(0))


def test_latent_scatter_writes_each_class_where_it_lies(rng):
    labels = np.repeat(np.arange(8), 5)
    points = {arm: rng.normal(size=(40, 2)) for arm in ARMS}
    figure = plots.latent_scatter(points, labels)
    for ax, (arm, xy) in zip(figure.axes, points.items(), strict=True):
        assert ax.get_title() == arm and ax.get_xlabel() and ax.get_ylabel()
        assert [text.get_text() for text in ax.texts] == list("01234567")
        np.testing.assert_allclose(ax.texts[3].get_position(), np.median(xy[15:20], axis=0))
        styles = {
            (to_hex(c.get_facecolor()[0]), c.get_paths()[0].vertices.shape, i % 5)
            for i, c in enumerate(ax.collections)
        }
        assert len(styles) == 8


def test_latent_scatter_takes_labels_of_each_arm(rng):
    labels = {arm: np.repeat(np.arange(8), 5 + i) + i for i, arm in enumerate(ARMS)}
    points = {arm: rng.normal(size=(len(of_arm), 2)) for arm, of_arm in labels.items()}
    arrays = {
        arm: {"clusters/projection": points[arm], "clusters/label": labels[arm]} for arm in ARMS
    }
    ((drawn, _),) = figures.of_measurements(arrays).values()
    for figure in (plots.latent_scatter(points, labels), drawn):
        for ax, arm in zip(figure.axes, ARMS, strict=True):
            assert [text.get_text() for text in ax.texts] == sorted(map(str, set(labels[arm])))
            first = points[arm][labels[arm] == labels[arm][0]]
            np.testing.assert_allclose(ax.texts[0].get_position(), np.median(first, axis=0))


def test_loss_surfaces_have_a_scale_each_and_mark_both_points():
    a, b = np.linspace(-0.5, 1.5, 5), np.linspace(-1, 1, 4)
    surfaces = {arm: (i + 1) * (a[:, None] ** 2 + b) for i, arm in enumerate(ARMS)}
    figure = plots.loss_surfaces(surfaces, a, b)
    panels, bars = figure.axes[: len(ARMS)], figure.axes[len(ARMS) :]
    assert [ax.get_title() for ax in panels] == list(ARMS)
    assert [bar.get_ylabel() for bar in bars] == ["loss, nats"] * len(ARMS)
    for ax, values in zip(panels, surfaces.values(), strict=True):
        levels = ax.collections[0].levels
        assert levels[0] <= values.min() and levels[-1] >= values.max()
        assert levels[-2] < values.max()  # no wider than it must be
    for ax in panels:
        assert [tuple(np.ravel(line.get_data())) for line in ax.lines] == [(0, 0), (1, 0)]
        assert "adversarial" in ax.get_xlabel() and ax.get_ylabel()
    assert legend(figure) == ["clean", "adversarial"]
    flat = plots.loss_surfaces({"flat": np.zeros((5, 4))}, a, b)
    assert len(flat.axes) == 2


def test_measures_of_a_study_are_paired_by_seed():
    def row(jacobian, accuracy):
        return {"J": {"values": jacobian}, "PGD": {"values": accuracy}}

    table = {"a": row({0: 3.0, 1: 2.0}, {1: 0.5, 0: 0.4}), "b": row({0: 1.0}, {1: 0.7})}
    figure = study_plots.measures_against_each_other(table, [("J", "PGD")])
    ax = figure.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("J", "PGD")
    points = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert points == {"a": [[3.0, 0.4], [2.0, 0.5]], "b": []}  # b has no seed with both
    assert legend(figure) == ["a", "b"]


def test_numbers_along_training_have_a_line_an_arm_and_its_interval():
    points = [
        {"epoch": 0.5, "mean": 1.0, "low": 0.5, "high": 1.5},
        {"epoch": 1.0, "mean": 2.0, "low": None, "high": None},
    ]
    figure = study_plots.along_training({"minimum_margin": {"ce": points, "at": points[:1]}})
    ax = figure.axes[0]
    assert ax.get_title() == "minimum margin" and ax.get_xlabel() == "epoch"
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0.5, 1], [1, 2]])
    assert ax.collections[0].get_datalim(ax.transData).y1 == 1.5
    assert len(figure.axes) == 1 and ax.get_xscale() == "linear"


def test_an_arm_that_trains_much_longer_does_not_squeeze_the_others():
    def points(epochs):
        return [{"epoch": i * epochs / 30, "mean": i, "low": None, "high": None} for i in range(31)]

    figure = study_plots.along_training({"margin": {"one": points(1.0), "long": points(150.0)}})
    ax = figure.axes[0]
    assert ax.get_xscale() == "symlog" and ax.get_xlim()[0] == 0
    figure.draw_without_rendering()
    assert {"0", "1", "10", "100"} <= {tick.get_text() for tick in ax.get_xticklabels()}
    assert all(30 / line.get_markevery() <= 6 for line in ax.lines)


def test_a_sweep_is_drawn_with_what_it_chose():
    sweep = {"field": "weight", "values": (1.0, 0.1), "by": "acc", "found": [0.6, 0.5]}
    linear = {**sweep, "values": (0.0, 1.0), "by": "conf", "found": [0.9, None]}
    figure = study_plots.sweeps(
        {
            "EntM": {**sweep, "target": None, "chosen": 1.0},
            "LS": {**linear, "target": 0.8, "chosen": None},
        },
        {"acc": "robust accuracy, %", "conf": "confidence"},
    )
    one, other = figure.axes
    np.testing.assert_allclose(one.lines[0].get_xydata(), [[0.1, 50], [1, 60]])
    np.testing.assert_allclose(one.lines[1].get_xydata(), [[1, 60]])
    assert one.get_xscale() == "log" and other.get_xscale() == "linear"
    assert one.get_title() == "EntM" and one.get_xlabel() == "weight"
    np.testing.assert_allclose(other.lines[0].get_xydata(), [[0, 0.9]])
    np.testing.assert_allclose(other.lines[1].get_ydata(), 0.8)


def test_one_radius_is_a_point_and_no_line_to_the_clean_accuracy():
    def points(*radii):
        ends = {e: (0.8 - e, 1 - e) for e in radii} | {0.0: (None, None)}
        return [
            {"eps": e, "mean": 0.9 - e, "low": low, "high": high}
            for e, (low, high) in sorted(ends.items())
        ]

    curves = {"at": {"linf": points(0.1, 0.2), "l2": points(0.5)}}
    figure = study_plots.accuracy_by_arm(curves)
    line, alone = figure.axes
    assert line.lines[0].get_linestyle() == "-" and line.collections
    assert alone.lines[0].get_linestyle() == "None" and alone.lines[0].get_marker() == "o"
    (bars,) = alone.collections
    drawn = [bar for bar in bars.get_segments() if len(bar)]  # no interval, no bar
    np.testing.assert_allclose(drawn, [[[0.5, 30], [0.5, 50]]])
    assert len(figure.legends[0].get_texts()) == 1


def test_arms_without_a_finite_number_are_left_out():
    nowhere = [np.nan, np.nan]
    both = plots.distributions({"a": [1.0, 2.0], "b": nowhere}, xlabel="margin")
    assert len(both.axes[0].patches) == 1
    assert not plots.distributions({"a": nowhere}, xlabel="margin").axes[0].patches
