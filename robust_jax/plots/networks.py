"""Figures of the measurements, with several networks ("arms") side by side, each by its name."""

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from robust_jax.analysis.calibration import Reliability, expected_calibration_error
from robust_jax.plots.style import (
    ARM_COLORS,
    COLORS,
    MARKERS,
    STYLE,
    VERMILLION,
    WIDTH,
    bins_of,
    finite,
    legend_below,
    num_bins,
    panels_in_rows,
)

_LINES = ("-", "--", "-.", ":")


@rc_context(STYLE)
def distributions(values: Mapping[str, ArrayLike], *, xlabel: str) -> Figure:
    """Histograms of margins or energies, one outline per arm, minimum (▲) and mean (line) marked.

    The axis is logarithmic if the values are not negative and spread far.

    Args:
        values: [N] by arm. Those that are not finite are left out, and the legend says how many.
        xlabel: What they are, with units.

    Returns:
        The figure.

    Raises:
        ValueError: No value of an arm is finite.

    Example:
        >>> from robust_jax import plots
        >>> margins = {"standard": [0.01, 0.02], "adversarial": [0.04, 0.08]}
        >>> figure = plots.distributions(margins, xlabel="ℓ∞ margin, pixel units")
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['standard: minimum 0.01, mean 0.015', 'adversarial: minimum 0.04, mean 0.06']
    """
    shown = {arm: found for arm, v in values.items() if len(found := finite(v))}
    every = np.concatenate([*shown.values(), *([] if shown else [[0.0]])])
    bins, is_log = bins_of(every)
    if is_log and (every < 0).any():
        bins, is_log = np.histogram_bin_edges(every, bins=num_bins(len(every))).tolist(), False
    figure = Figure(figsize=(WIDTH, 3.2 + 0.2 * len(values)))
    ax = figure.subplots()
    for i, (arm, v) in enumerate(shown.items()):
        style = _arm(i)
        label = f"{arm}: minimum {v.min():.3g}, mean {v.mean():.3g}"
        if missing := np.size(values[arm]) - len(v):
            label += f" ({missing} of {np.size(values[arm])} not finite)"
        weights = np.full(len(v), 100 / len(v))
        ax.hist(
            np.clip(v, bins[0], bins[-1]),
            bins=bins,
            weights=weights,
            histtype="step",
            lw=1.6,
            label=label,
            **style,
        )
        ax.axvline(v.mean(), lw=1, alpha=0.8, **style)
        ax.plot(max(v.min(), bins[0]), 0, "^", color=style["color"], ms=8, clip_on=False, zorder=4)
    ax.set(xlabel=xlabel, ylabel="share of the examples, %", xscale="log" if is_log else "linear")
    ax.set_ylim(bottom=0)
    _legend_in_rows(figure, ax, title="▲ minimum, vertical line: mean")
    return figure


@rc_context(STYLE)
def singular_values(spectra: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Singular values of each layer, largest first: a panel for each layer, a line for each arm.

    They are drawn against the share of a layer's values, so that wide and narrow arms can be
    compared.

    Args:
        spectra: By arm and layer, [n].

    Returns:
        The figure.

    Example:
        >>> from robust_jax import plots
        >>> figure = plots.singular_values({"standard": {"conv": [3.0, 1.0], "dense": [2.0]}})
        >>> [ax.get_title() for ax in figure.axes]
        ['conv', 'dense']
    """
    names = list(dict.fromkeys(name for layers in spectra.values() for name in layers))
    columns = min(len(names), 3)
    figure, panels = panels_in_rows(len(names), columns=columns, height=2.1)
    for ax, name in zip(panels, names, strict=True):
        for i, (arm, layers) in enumerate(spectra.items()):
            if name in layers:
                values = np.sort(finite(layers[name]))[::-1]
                share = 100 * (np.arange(len(values)) + 0.5) / len(values)
                ax.plot(share, values, label=arm, lw=1.5, **_arm(i))
        ax.set(title=name, xlim=(0, 100))
        ax.set_ylim(bottom=0)
    for ax in panels[::columns]:
        ax.set_ylabel("singular value")
    for ax in panels[-columns:]:
        ax.set_xlabel("share of the values, %")
    legend_below(figure, panels)
    return figure


@rc_context(STYLE)
def by_layer(values: Mapping[str, Mapping[str, Mapping[str, ArrayLike]]], *, ylabel: str) -> Figure:
    """Values of each layer, such as feature changes: a panel for each title, a line for each arm.

    The line joins the medians, and bars hold the middle half of the examples. The axis is
    logarithmic if the values spread far.

    Args:
        values: By title, arm and layer, [N] or a number.
        ylabel: What they are, with units.

    Returns:
        The figure.

    Example:
        >>> from robust_jax import plots
        >>> changes = {"random δ": {"standard": {"conv": [1.0, 2.0], "logits": [3.0, 5.0]}}}
        >>> figure = plots.by_layer(changes, ylabel="feature change per pixel unit")
        >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
        ['conv', 'logits']
    """
    figure = Figure(figsize=(WIDTH, 3.7))
    is_log = bins_of(
        np.concatenate(
            [
                finite(v)
                for arms in values.values()
                for layers in arms.values()
                for v in layers.values()
            ]
        )
    )[1]
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for ax, (title, arms) in zip(panels, values.items(), strict=True):
        names = list(dict.fromkeys(name for layers in arms.values() for name in layers))
        for i, (arm, layers) in enumerate(arms.items()):
            here = [name for name in names if len(finite(layers.get(name, ())))]
            if not here:
                continue
            low, middle, high = np.array(
                [np.quantile(finite(layers[name]), (0.25, 0.5, 0.75)) for name in here]
            ).T
            # Side by side, so that no bar hides another.
            apart = min(0.12, 0.8 / len(arms))
            at = np.array([names.index(name) for name in here]) + apart * (i - (len(arms) - 1) / 2)
            ax.errorbar(
                at,
                middle,
                yerr=[middle - low, high - middle],
                label=arm,
                capsize=2,
                marker=MARKERS[i % len(MARKERS)],
                ms=5,
                lw=1.3,
                elinewidth=1,
                **_arm(i),
            )
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_title(title)
    if is_log:
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    else:
        panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel(ylabel)
    legend_below(figure, panels)
    return figure


@rc_context(STYLE)
def reliability_diagram(curves: Mapping[str, Reliability]) -> Figure:
    """Accuracy against top probability, one line per arm with its ECE, above the examples' shares.

    On the diagonal a network is right as often as it says; below, it is overconfident.

    Args:
        curves: By arm, as `calibration.reliability` returns them.

    Returns:
        The figure, in percent.

    Example:
        >>> from robust_jax import plots
        >>> from robust_jax.analysis import calibration
        >>> curve = calibration.reliability([0.9, 0.9], [True, False])
        >>> figure = plots.reliability_diagram({"standard": curve})
        >>> figure.legends[0].get_texts()[1].get_text()
        'standard, ECE 40.0 %'
    """
    figure = Figure(figsize=(0.75 * WIDTH, 0.8 * WIDTH + 0.2 * len(curves)))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 100], [0, 100], color="0.4", ls=":", label="as sure as right")
    for i, (arm, curve) in enumerate(curves.items()):
        error = 100 * expected_calibration_error(curve)
        filled = curve.examples > 0
        top.plot(
            100 * curve.confidence[filled],
            100 * curve.accuracy[filled],
            lw=1.5,
            ms=4,
            marker=MARKERS[i % len(MARKERS)],
            label=f"{arm}, ECE {error:.1f} %",
            **_arm(i),
        )
        bottom.stairs(
            100 * curve.examples / curve.examples.sum(), 100 * curve.edges, lw=1.5, **_arm(i)
        )
    top.set(ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 102))
    # Logarithmic, to show the bins of a few examples, which make the line above jump.
    bottom.set(xlabel="top probability, %", ylabel="examples, %", yscale="log")
    _legend_in_rows(figure, top)
    return figure


@rc_context(STYLE)
def latent_scatter(
    points: Mapping[str, ArrayLike],
    labels: ArrayLike | Mapping[str, ArrayLike],
    *,
    axes: tuple[str, str] = ("first component", "second component"),
) -> Figure:
    """Projected latents, a panel for each arm, coloured by label, each class's label at its median.

    Args:
        points: By arm, [N,2], such as the points of `latent.projection`. Anything to be read
            with a panel, such as a silhouette, goes into the arm's name.
        labels: [N], or by arm where they differ.
        axes: What the two axes are called.

    Returns:
        The figure.

    Example:
        >>> from robust_jax import plots
        >>> points = {"standard": [[0.0, 0.0], [0.0, 1.0], [3.0, 0.0]]}
        >>> figure = plots.latent_scatter(points, [7, 7, 9])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['7', '9']
    """
    of_arms = {
        arm: np.asarray(labels[arm] if isinstance(labels, Mapping) else labels) for arm in points
    }
    classes = np.unique(np.concatenate([*of_arms.values()]))
    figure, panels = panels_in_rows(len(points), columns=min(len(points), 2), height=3.2)
    outline = [patheffects.withStroke(linewidth=3, foreground="white")]
    for ax, (arm, xy) in zip(panels, points.items(), strict=True):
        xy = np.asarray(xy, float)
        for i, c in enumerate(classes):
            here = xy[of_arms[arm] == c]
            if not len(here):
                continue
            ax.scatter(
                here[:, 0],
                here[:, 1],
                s=9,
                alpha=0.6,
                color=COLORS[i % len(COLORS)],
                linewidths=0,
                marker=MARKERS[i % len(MARKERS)],
                zorder=1,
            )
            at_x, at_y = np.median(here, axis=0)
            ax.text(
                at_x,
                at_y,
                str(c),
                weight="bold",
                ha="center",
                va="center",
                fontsize=11,
                path_effects=outline,
            )
        ax.set(title=_wrapped(arm, 38), xlabel=axes[0], ylabel=axes[1])
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_rasterization_zorder(1.1)  # all points of a panel as one picture
    return figure


@rc_context(STYLE)
def loss_along(losses: Mapping[str, ArrayLike]) -> Figure:
    """The loss on the way to the worst point: its mean by arm, and the middle half of the examples.

    Args:
        losses: By arm, [N,n] in nats, at n even steps from x to the worst point, as
            `surface.loss_along` returns them.

    Returns:
        The figure.

    Example:
        >>> from robust_jax import plots
        >>> (ax,) = plots.loss_along({"standard": [[0.1, 0.4, 0.9], [0.3, 0.4, 0.7]]}).axes
        >>> ax.lines[0].get_ydata()
        array([0.2, 0.4, 0.8])
    """
    figure = Figure(figsize=(WIDTH, 3.4))
    ax = figure.subplots()
    for i, (arm, values) in enumerate(losses.items()):
        values = np.asarray(values, float)
        share = np.linspace(0, 100, values.shape[1])
        low, high = np.quantile(values, (0.25, 0.75), axis=0)
        ax.plot(share, values.mean(0), label=arm, marker=MARKERS[i % len(MARKERS)], ms=4, **_arm(i))
        ax.fill_between(share, low, high, color=_arm(i)["color"], alpha=0.12, lw=0)
    ax.set(xlabel="share of the way to the worst point, %", ylabel="cross-entropy, nats")
    legend_below(figure, [ax])
    return figure


@rc_context(STYLE)
def loss_surfaces(
    losses: Mapping[str, ArrayLike],
    along_adversarial: ArrayLike,
    along_direction: ArrayLike,
    *,
    label: str = "loss, nats",
) -> Figure:
    """Contours of `surface.loss_surface`, a panel for each arm.

    Each panel has its own colour scale, or the steepest would flatten the others. The clean
    point is a white disc, the adversarial one a red diamond.

    Args:
        losses: By arm, [n,m], of one example or a mean of many.
        along_adversarial: Where the rows are, [n]; the clean point is at 0, the adversarial at 1.
        along_direction: Where the columns are along the other direction, [m].
        label: What is drawn, with units.

    Returns:
        The figure.

    Example:
        >>> import numpy as np
        >>> from robust_jax import plots
        >>> steps = np.linspace(0, 1, 3)
        >>> figure = plots.loss_surfaces({"standard": steps[:, None] + steps}, steps, steps)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['clean', 'adversarial']
    """
    a, b = np.asarray(along_adversarial, float), np.asarray(along_direction, float)
    surfaces = {arm: np.asarray(values, float) for arm, values in losses.items()}
    figure, panels = panels_in_rows(len(surfaces), columns=min(len(surfaces), 2), height=3.2)
    for ax, (arm, values) in zip(panels, surfaces.items(), strict=True):
        highest = max(values.max(), values.min() + 1e-6)
        levels = MaxNLocator(10).tick_values(values.min(), highest)
        filled = ax.contourf(a, b, values.T, levels=levels, cmap="cividis")
        ax.contour(a, b, values.T, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        style: dict[str, Any] = dict(ls="", marker="o", ms=8, mec="black", clip_on=False, zorder=3)
        ax.plot(0, 0, mfc="white", label="clean", **style)
        ax.plot(1, 0, mfc=VERMILLION, label="adversarial", **style | dict(marker="D"))
        ax.set(
            title=_wrapped(arm, 32),
            xlabel="along the adversarial direction",
            ylabel="along the random one",
        )
        figure.colorbar(filled, ax=ax, label=label)
    legend_below(figure, panels)
    return figure


def _arm(i: int) -> dict[str, Any]:
    """A colour, as in a study's other figures, and a line style; the first 32 all differ."""
    rounds, color = divmod(i, len(ARM_COLORS))
    return {"color": ARM_COLORS[color], "ls": _LINES[(i + rounds) % len(_LINES)]}


def _wrapped(title: str, width: int) -> str:
    """The title wrapped to width characters, with its own line breaks kept."""
    return "\n".join(fill(line, width) for line in title.splitlines())


def _legend_in_rows(figure: Figure, ax: Axes, title: str | None = None) -> None:
    """A row for each label, since labels with numbers are too long to stand side by side."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", title=title)
