"""Figures of a study: several arms, means over seeds with 95 % intervals."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from robust_jax.plots.style import (
    ARM_COLORS,
    STYLE,
    WIDTH,
    legend_below,
    norm_symbol,
    panels_in_rows,
)

_MARKERS = "os^DvPX"  # one fewer than colours, so that no two of 56 arms look the same
_MOST_MARKERS = 6  # on a line along training


@rc_context(STYLE)
def accuracy_by_arm(curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Accuracy against ε: a panel for each norm, a line for each arm with its interval.

    curves: by arm and norm the points {eps, mean, low, high}; low and high may be None.
    """
    norms = list(dict.fromkeys(norm for by_norm in curves.values() for norm in by_norm))
    figure = Figure(figsize=(WIDTH, 4.0))
    panels = figure.subplots(1, max(1, len(norms)), sharey=True, squeeze=False)[0]
    for ax, norm in zip(panels, norms, strict=False):
        for (arm, by_norm), color, marker in zip(
            curves.items(), cycle(ARM_COLORS), cycle(_MARKERS), strict=False
        ):
            points = by_norm.get(norm, [])
            style: dict[str, Any] = {"color": color, "marker": marker, "label": arm}
            if len(points) > 2:
                _line_with_band(ax, points, "eps", 100, **style)
            else:  # no line leads from one radius to ε = 0
                _points_with_bars(ax, points, "eps", 100, **style)
        ax.set(title=norm_symbol(norm), xlabel="ε", ylim=(-2, 102))
        ax.set_xlim(left=0)
    panels[0].set_ylabel("accuracy under the worst case, %")
    legend_below(figure, panels)
    return figure


@rc_context(STYLE)
def measures_by_arm(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """A panel for each measure, with the mean, the interval and the seeds of each arm.

    table: by arm and measure {values: by seed, mean, low, high}; those never measured are left out.
    """
    arms = list(table)
    measures = [
        name
        for name in dict.fromkeys(m for row in table.values() for m in row)
        if any(table[arm][name]["mean"] is not None for arm in arms)
    ]
    columns = 3
    rows = max(1, -(-len(measures) // columns))
    figure = Figure(figsize=(WIDTH, rows * (0.75 + 0.24 * len(arms)) + 0.3))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in panels.flat[len(measures) :]:
        ax.set_visible(False)
    for ax, name in zip(panels.flat, measures, strict=False):
        for i, (arm, color) in enumerate(zip(arms, cycle(ARM_COLORS), strict=False)):
            entry = table[arm][name]
            seeds = list(entry["values"].values())
            ax.plot(seeds, [i] * len(seeds), ".", color=color, alpha=0.5, ms=5)
            if entry["low"] is not None:
                ax.plot([entry["low"], entry["high"]], [i, i], color=color, lw=1.5)
            if entry["mean"] is not None:
                ax.plot(entry["mean"], i, "|", color=color, ms=11, mew=2)
        values = (v for arm in arms for v in table[arm][name]["values"].values())
        if not name.endswith("%") and _spread_far(values):
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.locator_params(axis="x", nbins=4)
        ax.set_title(fill(name, 24), fontsize="medium")
        ax.set_yticks(range(len(arms)), arms)
        ax.set_ylim(len(arms) - 0.5, -0.5)
    return figure


@rc_context(STYLE)
def measures_against_each_other(
    table: Mapping[str, Mapping[str, Mapping[str, Any]]], pairs: Sequence[Sequence[str]]
) -> Figure:
    """A panel for each pair of measures, with a point for each arm and seed.

    Args:
        table: By arm and measure, {"values": a number by seed}.
        pairs: The measures on the two axes, across and up, which each arm must hold. A seed that
            lacks one of the two is left out.

    Returns:
        The figure.

    Example:
        >>> from robust_jax import plots
        >>> table = {"standard": {"‖J‖": {"values": {0: 3.0, 1: 2.0}},
        ...                       "accuracy, %": {"values": {0: 40.0, 1: 50.0}}}}
        >>> figure = plots.measures_against_each_other(table, [("‖J‖", "accuracy, %")])
        >>> figure.axes[0].lines[0].get_xydata()
        array([[ 3., 40.],
               [ 2., 50.]])
    """
    figure, panels = panels_in_rows(len(pairs), columns=2, height=3.0)
    for ax, (across, up) in zip(panels, pairs, strict=False):
        for (arm, row), color, marker in zip(
            table.items(), cycle(ARM_COLORS), cycle(_MARKERS), strict=False
        ):
            seeds = row[across]["values"].keys() & row[up]["values"].keys()
            points = [(row[across]["values"][s], row[up]["values"][s]) for s in sorted(seeds)]
            ax.plot(
                [x for x, _ in points],
                [y for _, y in points],
                ls="",
                marker=marker,
                color=color,
                ms=5,
                alpha=0.8,
                label=arm,
            )
        if _spread_far(v for row in table.values() for v in row[across]["values"].values()):
            ax.set_xscale("log")
        ax.set(xlabel=across, ylabel=up)
    legend_below(figure, panels)
    return figure


@rc_context(STYLE)
def along_training(history: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """The numbers of the validations against the epoch: a panel for each, a line for each arm.

    history: by number and arm the points {epoch, mean, low, high}; low and high may be None. The
    axis is logarithmic from epoch 1 on if some arms train more than 20 times as long as others.
    """
    figure, panels = panels_in_rows(len(history), columns=2, height=3.0)
    lasts = [points[-1]["epoch"] for of in history.values() for points in of.values() if points]
    for ax, (name, by_arm) in zip(panels, history.items(), strict=False):
        if _spread_far(lasts):
            ax.set_xscale("symlog", linthresh=1)
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.set_xlim(0, 1.1 * max(lasts))
        for (arm, points), color, marker in zip(
            by_arm.items(), cycle(ARM_COLORS), cycle(_MARKERS), strict=False
        ):
            every = -(-len(points) // _MOST_MARKERS) or 1
            style: dict[str, Any] = {"color": color, "marker": marker, "markevery": every}
            _line_with_band(ax, points, "epoch", label=arm, **style)
        ax.set(title=name.replace("_", " "), xlabel="epoch")
    legend_below(figure, panels)
    return figure


@rc_context(STYLE)
def sweeps(found: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """A panel for each arm: the deciding measure against the swept value, the chosen one ringed.

    found: by arm {field, values, by, found, target, chosen}; what was not measured is None, as is
    a missing target. labels: by measure; those in percent end in "%".
    """
    figure, panels = panels_in_rows(len(found), columns=2, height=3.0)
    for ax, (arm, sweep), color in zip(panels, found.items(), cycle(ARM_COLORS), strict=False):
        label = labels[sweep["by"]]
        scale = 100 if label.endswith("%") else 1
        known = {
            value: scale * number
            for value, number in sorted(zip(sweep["values"], sweep["found"], strict=True))
            if number is not None
        }
        ax.plot(list(known), list(known.values()), "o-", color=color, ms=4, lw=1.4)
        if sweep["chosen"] is not None:
            ring = sweep["chosen"], known[sweep["chosen"]]
            ax.plot(*ring, "o", ms=11, mfc="none", mec=color, mew=1.5)
        if sweep["target"] is not None:
            ax.axhline(scale * sweep["target"], color="0.4", lw=1, ls="--")
        if min(sweep["values"]) > 0 and len(sweep["values"]) > 1:
            ax.set_xscale("log")
            ax.set_xticks(sorted(sweep["values"]), [f"{v:g}" for v in sorted(sweep["values"])])
            ax.minorticks_off()
        ax.set(title=arm, xlabel=sweep["field"], ylabel=label)
    return figure


def _spread_far(values: Iterable[float]) -> bool:
    """Whether values above 0 need a logarithmic axis to be told apart."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > 20 * min(known)


def _line_with_band(
    ax: Axes, points: Sequence[Mapping[str, Any]], along: str, scale: float = 1, **style: Any
) -> None:
    """Means along a field of the points, with a band if there is an interval."""
    ax.plot([p[along] for p in points], [scale * p["mean"] for p in points], ms=4, lw=1.4, **style)
    band = [p for p in points if p["low"] is not None]
    ax.fill_between(
        [p[along] for p in band],
        [scale * p["low"] for p in band],
        [scale * p["high"] for p in band],
        color=style["color"],
        alpha=0.15,
        lw=0,
    )


def _points_with_bars(
    ax: Axes, points: Sequence[Mapping[str, Any]], along: str, scale: float = 1, **style: Any
) -> None:
    """Means along a field of the points, with a bar if there is an interval."""
    fields = (along, "mean", "low", "high")
    at, *ends = np.array([[p[field] for field in fields] for p in points], float).reshape(-1, 4).T
    middle, low, high = scale * np.array(ends)
    ax.errorbar(at, middle, yerr=[middle - low, high - middle], ms=4, ls="", **style)
