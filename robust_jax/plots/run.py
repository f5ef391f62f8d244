"""Figures of a finished run: arrays or DataFrames in, matplotlib Figures out.

Accuracies come in [0, 1] and are drawn in percent.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from robust_jax.plots.style import (
    BLUE,
    COLORS,
    GREEN,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    WIDTH,
    bins_of,
    finite,
    legend_above,
    legend_below,
    norm_symbol,
    num_bins,
    two_columns,
)

FATE_COLORS = {"held": BLUE, "broken": ORANGE, "misclassified": PURPLE}
WORST_CASE = "worst case"
JACOBIANS = {
    "frobenius_logits": "Frobenius norm, logits",
    "spectral_logits": "spectral norm, logits",
    "frobenius_probabilities": "Frobenius norm, probabilities",
    "spectral_probabilities": "spectral norm, probabilities",
}


@rc_context(STYLE)
def accuracy_against_eps(
    attacks: pd.DataFrame,
    clean: Mapping[str, float],
    *,
    chance: float,
    trained: tuple[str, float] | None = None,
) -> Figure:
    """Accuracy against ε: a panel for each norm, a line for each attack on the best checkpoint.

    The attack named WORST_CASE is bold, and dashed for the last checkpoint. A name that ends in
    ", first N" has hollow markers, as only the first N examples were attacked.

    Args:
        attacks: One row per ε, with the columns checkpoint ("best", "last"), norm, attack, eps in
            pixel units and accuracy in [0,1].
        clean: By checkpoint, the accuracy at ε = 0.
        chance: The accuracy of a guess.
        trained: The (norm, ε) trained against, if any.

    Returns:
        The figure, in percent.

    Example:
        >>> import pandas as pd
        >>> from robust_jax import plots
        >>> attacks = pd.DataFrame({
        ...     "checkpoint": "best", "norm": "linf", "attack": plots.WORST_CASE,
        ...     "eps": [0.1, 0.2], "accuracy": [0.75, 0.5],
        ... })
        >>> figure = plots.accuracy_against_eps(attacks, {"best": 0.9}, chance=0.1)
        >>> figure.axes[0].lines[0].get_ydata()
        array([90., 75., 50.])
    """
    norms = list(dict.fromkeys(attacks["norm"]))
    names = [n for n in dict.fromkeys(attacks["attack"]) if not n.startswith(WORST_CASE)]
    of_first = [n for n in dict.fromkeys(attacks["attack"]) if n.startswith(f"{WORST_CASE}, ")]
    figure = Figure(figsize=(WIDTH, 3.7))
    panels = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    for ax, norm in zip(panels, norms, strict=True):
        here = attacks[attacks["norm"] == norm]

        def draw(checkpoint, attack, label, ax=ax, here=here, **style):
            rows = here[(here["checkpoint"] == checkpoint) & (here["attack"] == attack)]
            if len(rows):
                rows = rows.sort_values("eps")
                sizes, accuracy = list(rows["eps"]), list(rows["accuracy"])
                is_part = ", first " in attack
                if is_part:
                    style |= dict(mfc="white", ls=":")
                elif len(rows) > 1:
                    sizes, accuracy = [0, *sizes], [clean[checkpoint], *accuracy]
                else:  # one radius is a point, without a line to ε = 0
                    style = {"marker": "D", "ms": 9, "mfc": "none", "mew": 2.5} | style
                ax.plot(sizes, 100 * np.array(accuracy), label=label, **style)

        # The worst case is drawn under the attacks' thin lines, which often coincide with it.
        draw("best", WORST_CASE, "worst case", color="black", lw=4, zorder=2)
        draw("last", WORST_CASE, "worst case, last", color="0.45", lw=2.5, ls="--", zorder=2)
        for name in of_first:
            draw("best", name, name, color="black", marker="p", ms=6, lw=1.3, zorder=3)
        for i, name in enumerate(names):
            color = COLORS[i % len(COLORS)]
            marker = MARKERS[i % len(MARKERS)]
            draw("best", name, name, color=color, marker=marker, ms=5, lw=1.3, zorder=3)
        ax.axhline(100 * chance, color="0.4", ls=":", label="chance")
        if trained is not None and trained[0] == norm:
            ax.axvline(trained[1], color="0.4", ls="-.", lw=1, label="trained ε")
        ax.set(title=norm_symbol(norm), xlabel="ε", ylim=(-2, 102))
        ax.set_xlim(left=0)
    panels[0].set_ylabel("accuracy, %")
    legend_below(figure, panels)
    return figure


@rc_context(STYLE)
def training_curves(metrics: pd.DataFrame, *, best_step: int | None = None) -> Figure:
    """Losses, accuracies, regularisers, learning rate and gradient norm against the step.

    Args:
        metrics: One row per step, with the column step and any of those in metrics.jsonl. A panel
            without any is left out.
        best_step: The step of the best checkpoint, which a line marks, if any.

    Returns:
        The figure, accuracies in percent.

    Example:
        >>> import pandas as pd
        >>> from robust_jax import plots
        >>> metrics = pd.DataFrame({"step": [10, 20], "train/loss": [2.3, 1.9]})
        >>> [ax.get_ylabel() for ax in plots.training_curves(metrics).axes]
        ['loss']
    """
    terms = [c for c in metrics.columns if c.startswith("train/regularizers/")]
    # Without terms the supervised loss equals the total.
    supervised = {"train/supervised_loss": ("train, supervised", dict(color=GREEN))}
    # By panel and column: a label and a style.
    panels: dict[str, dict[str, tuple[str | None, dict[str, Any]]]] = {
        "loss": {
            "train/loss": ("train, total", dict(color=BLUE)),
            **(supervised if terms else {}),
            "validation/cross_entropy": (
                "validation, cross-entropy",
                _VALIDATION | dict(color=PURPLE),
            ),
        },
        "accuracy, %": {
            "train/clean_accuracy": ("train, clean", dict(color=SKY)),
            "train/adversarial_accuracy": ("train, adversarial", dict(color=ORANGE)),
            "validation/clean_accuracy": ("validation, clean", _VALIDATION | dict(color=BLUE)),
            "validation/robust_accuracy": (
                "validation, robust",
                _VALIDATION | dict(color=VERMILLION),
            ),
        },
        "regulariser": {
            c: (c.removeprefix("train/regularizers/"), dict(color=color))
            for c, color in zip(terms, cycle(COLORS), strict=False)
        },
        "learning rate": {"train/learning_rate": (None, dict(color=BLUE))},
        "gradient norm": {"train/gradient_norm": (None, dict(color=BLUE))},
    }
    panels = {title: lines for title, lines in panels.items() if set(lines) & set(metrics.columns)}
    figure = Figure(figsize=(WIDTH, 2.6 * ((len(panels) + 1) // 2)))
    axes: dict[str, Axes] = figure.subplot_mosaic(two_columns(list(panels)))
    for title, lines in panels.items():
        ax = axes[title]
        for column, (label, style) in lines.items():
            if column in metrics:
                rows = metrics[["step", column]].dropna()
                if column.startswith("train/"):
                    rows = _without_rest(rows)
                scale = 100 if title.startswith("accuracy") else 1
                ax.plot(rows["step"], scale * rows[column], label=label, **style)
        if best_step is not None:
            label = "best step" if title == "loss" else None
            ax.axvline(best_step, color="0.4", ls="-.", lw=1, label=label)
        ax.set(xlabel="step", ylabel=title, xlim=(0, 1.03 * metrics["step"].max()))
        legend_above(ax)
    return figure


def _without_rest(rows: pd.DataFrame) -> pd.DataFrame:
    """The means over steps without the last if that covers fewer steps, since it would jump."""
    gaps = rows["step"].diff().dropna()
    is_rest = len(gaps) > 1 and gaps.iloc[-1] < gaps.iloc[:-1].median()
    return rows.iloc[:-1] if is_rest else rows


_VALIDATION = {"ls": "--", "marker": "o", "ms": 4}


@rc_context(STYLE)
def jacobian_histograms(records: Mapping[str, pd.DataFrame]) -> Figure:
    """Histograms of each example's Jacobian norms, medians marked, one panel for each norm.

    Args:
        records: By checkpoint, one row per example, with any of the columns that JACOBIANS names.
            The first checkpoint is filled, the others are outlines.

    Returns:
        The figure.

    Example:
        >>> import pandas as pd
        >>> from robust_jax import plots
        >>> records = {"best": pd.DataFrame({"frobenius_logits": [1.0, 2.0, 4.0]})}
        >>> [ax.get_xlabel() for ax in plots.jacobian_histograms(records).axes]
        ['Frobenius norm, logits']
    """
    first = next(iter(records.values()))
    columns = [c for c in JACOBIANS if c in first]
    figure = Figure(figsize=(WIDTH, 2.5 * ((len(columns) + 1) // 2)))
    axes: dict[str, Axes] = figure.subplot_mosaic(two_columns(columns))
    for column in columns:
        ax = axes[column]
        values = {name: finite(table[column]) for name, table in records.items()}
        bins, is_log = bins_of(np.concatenate(list(values.values())))
        for i, (name, v) in enumerate(values.items()):
            if not len(v):
                continue
            style = dict(color=SKY, alpha=0.7) if i == 0 else dict(histtype="step", color="black")
            label = f"{name}, median {np.median(v):.3g}"
            ax.hist(np.clip(v, bins[0], bins[-1]), bins=bins, label=label, **style)
            ax.axvline(np.median(v), color=BLUE if i == 0 else "black", ls="-" if i == 0 else "--")
        ax.set(xlabel=JACOBIANS[column], ylabel="examples", xscale="log" if is_log else "linear")
        legend_above(ax, columns=1)
    return figure


@rc_context(STYLE)
def estimate_against_exact(exact: ArrayLike, estimate: ArrayLike, error: ArrayLike) -> Figure:
    """Estimated against exact Frobenius norm, one point per example with ±1 standard error.

    Args:
        exact: [N], as `jacobian.frobenius_norm` returns it, in logits per pixel unit.
        estimate: [N], as `jacobian.frobenius_norm_estimate` returns it.
        error: Its standard error [N].

    Returns:
        The figure.

    Example:
        >>> from robust_jax import plots
        >>> (ax,) = plots.estimate_against_exact([1.0, 2.0], [1.1, 1.9], [0.1, 0.2]).axes
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('exact Frobenius norm, logits', 'estimate')
    """
    exact = np.asarray(exact, float)
    figure = Figure(figsize=(0.62 * WIDTH, 0.55 * WIDTH))
    ax = figure.subplots()
    ax.errorbar(
        exact,
        estimate,
        yerr=error,
        fmt="o",
        ms=3,
        color=BLUE,
        ecolor=SKY,
        elinewidth=0.6,
        alpha=float(np.clip(200 / len(exact), 0.15, 0.8)),
        rasterized=True,
        label="examples, ±1 standard error",
    )
    ends = [exact.min(), exact.max()]
    ax.plot(ends, ends, color="black", lw=1, label="estimate = exact", zorder=3)
    ax.set(xlabel="exact Frobenius norm, logits", ylabel="estimate")
    legend_above(ax)
    return figure


@rc_context(STYLE)
def fate_histograms(records: pd.DataFrame, fate: pd.Series) -> Figure:
    """Histograms of margin and confidence, split by fate; each fate sums to 100 %.

    Args:
        records: One row per example, with the columns margin, in units of the logits, and
            confidence, in [0,1].
        fate: "held", "broken" or "misclassified" for each row, as `app.records.fates` returns it.

    Returns:
        The figure.

    Example:
        >>> import pandas as pd
        >>> from robust_jax import plots
        >>> records = pd.DataFrame({"margin": [2.0, 1.0, -1.0], "confidence": [0.9, 0.7, 0.3]})
        >>> figure = plots.fate_histograms(records, pd.Series(["held", "held", "misclassified"]))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['held (2)', 'misclassified (1)']
    """
    figure = Figure(figsize=(WIDTH, 3.2))
    panels = figure.subplots(1, 2)
    labels = {"margin": "margin (true logit − largest other)", "confidence": "confidence"}
    for ax, (column, label) in zip(panels, labels.items(), strict=True):
        values = finite(records[column])
        bins = np.histogram_bin_edges(values, bins=num_bins(len(values)))
        for name, color in FATE_COLORS.items():
            values = finite(records.loc[fate == name, column])
            if len(values):
                weights = np.full(len(values), 100 / len(values))
                style = dict(bins=bins, weights=weights, color=color, histtype="stepfilled")
                ax.hist(values, alpha=0.3, **style)
                ax.hist(
                    values, label=f"{name} ({len(values)})", **style | dict(histtype="step", lw=1.6)
                )
        ax.set(xlabel=label, ylabel="share of the group, %")
    legend_below(figure, panels)
    return figure


@rc_context(STYLE)
def jacobian_by_fate(records: pd.DataFrame, fate: pd.Series) -> Figure:
    """Box plots of the Jacobian norms, split by fate, with each group's median written.

    The box holds the middle half of a group and the whiskers its middle 90 %.

    Args:
        records: One row per example, with any of the columns that JACOBIANS names.
        fate: As in `fate_histograms`.

    Returns:
        The figure.

    Example:
        >>> import pandas as pd
        >>> from robust_jax import plots
        >>> records = pd.DataFrame({"frobenius_logits": [1.0, 3.0, 7.0]})
        >>> figure = plots.jacobian_by_fate(records, pd.Series(["held", "held", "broken"]))
        >>> [" ".join(tick.get_text().split()) for tick in figure.axes[0].get_xticklabels()]
        ['held median 2', 'broken median 7']
    """
    columns = [c for c in JACOBIANS if c in records]
    names = [name for name in FATE_COLORS if (fate == name).any()]
    figure = Figure(figsize=(WIDTH, 2.7 * ((len(columns) + 1) // 2)))
    axes: dict[str, Axes] = figure.subplot_mosaic(two_columns(columns))
    for column in columns:
        ax = axes[column]
        groups = [finite(records.loc[fate == name, column]) for name in names]
        boxes = ax.boxplot(
            groups,
            whis=(5, 95),
            showfliers=False,
            widths=0.55,
            patch_artist=True,
            medianprops=dict(color="black", lw=1.5),
        )
        for box, name in zip(boxes["boxes"], names, strict=True):
            box.set(facecolor=FATE_COLORS[name], alpha=0.6)
        ticks = [f"{n}\nmedian {np.median(g):.3g}" for n, g in zip(names, groups, strict=True)]
        ax.set_xticks(range(1, len(names) + 1), ticks)
        ax.grid(axis="x", visible=False)
        ax.set(title=JACOBIANS[column], ylabel="norm")
        if bins_of(np.concatenate(groups))[1]:
            ax.set_yscale("log")
    return figure


@rc_context(STYLE)
def image_grid(
    clean: np.ndarray,
    adversarial: np.ndarray,
    labels: np.ndarray,
    clean_predictions: np.ndarray,
    adversarial_predictions: np.ndarray,
    *,
    columns: int = 5,
) -> Figure:
    """Clean and adversarial images and their difference, with label and predictions.

    The difference is drawn from -s to s, s the largest change of any pixel (`difference_scale`).

    Args:
        clean: [N,H,W,C], C 1 or 3, pixels in [0,1].
        adversarial: The same after the attack.
        labels: [N].
        clean_predictions: The network's classes for the clean images, [N].
        adversarial_predictions: Those for the adversarial images, [N].
        columns: How many images are side by side.

    Returns:
        The figure.

    Example:
        >>> import numpy as np
        >>> from robust_jax import plots
        >>> clean, label, other = np.full((1, 2, 2, 1), 0.5), np.array([3]), np.array([8])
        >>> figure = plots.image_grid(clean, clean + 0.1, label, label, other, columns=1)
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['label 3: says 3', 'says 8']
    """
    scale = difference_scale(clean, adversarial)
    bands = -(-len(clean) // columns)
    figure = Figure(figsize=(WIDTH, 4.7 * bands))
    subfigures = figure.subfigures(bands, 1, squeeze=False, hspace=0.06)[:, 0]
    grid = np.concatenate([part.subplots(3, columns, squeeze=False) for part in subfigures])
    for ax in grid.flat:
        ax.set_axis_off()
    for i in range(len(clean)):
        row, column = 3 * (i // columns), i % columns
        said = (clean_predictions[i], adversarial_predictions[i])
        for offset, (image, prediction) in enumerate(
            zip((clean[i], adversarial[i]), said, strict=True)
        ):
            ax = grid[row + offset, column]
            _show(ax, image, cmap="gray", vmin=0, vmax=1)
            wrong = prediction != labels[i]
            start = f"label {labels[i]}: " if offset == 0 else ""
            ax.set_title(
                f"{start}says {prediction}", fontsize=9, color=VERMILLION if wrong else "black"
            )
        difference = adversarial[i] - clean[i]
        if difference.shape[-1] == 3:
            difference = 0.5 + difference / (2 * scale)
        _show(grid[row + 2, column], difference, cmap="RdBu_r", vmin=-scale, vmax=scale)
    for row, name in enumerate(["clean", "adversarial", f"difference\n±{scale:.3g}"] * bands):
        # The axes are off, and matplotlib does not draw their labels then.
        grid[row, 0].text(
            -0.08,
            0.5,
            name,
            transform=grid[row, 0].transAxes,
            rotation=90,
            ha="right",
            va="center",
            fontsize=9,
        )
    return figure


def difference_scale(clean: np.ndarray, adversarial: np.ndarray) -> float:
    """The largest change of any pixel, which `image_grid` scales differences by.

    Args:
        clean: Pixels in [0,1], of any shape.
        adversarial: As many, after the attack.

    Returns:
        In pixel units; 1 where nothing changed.

    Example:
        >>> import numpy as np
        >>> from robust_jax import plots
        >>> plots.difference_scale(np.array([0.2, 0.6]), np.array([0.3, 0.3]))
        0.3
    """
    return float(np.abs(adversarial - clean).max()) or 1.0


def _show(ax: Axes, image: np.ndarray, **style) -> None:
    ax.imshow(
        np.clip(image, 0, 1) if image.shape[-1] == 3 else image[..., 0],
        interpolation="nearest",
        **style,
    )
