"""What the figures share: width, colours, fonts, bins and legends.

Nothing here touches pyplot, so a figure is shown by returning it from a notebook's cell or saved
with its own savefig.
"""

import re
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

WIDTH = 7.2  # inches; the fonts below are readable when a figure is shown about this wide
# Okabe and Ito's colours, distinct for colour-blind readers too; black is for the worst case.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
ARM_COLORS = (*COLORS, "0.3", "0.6")  # a study may have more arms than there are colours
MARKERS = "os^Dv"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "figure.constrained_layout.use": True,
}


def panels_in_rows(count: int, *, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """count panels in rows of `columns`, each row `height` inches high."""
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(WIDTH, height * rows + 0.6))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.remove()
    return figure, list(axes[:count])


def norm_symbol(name: str) -> str:
    """What figures and tables call a norm.

    Args:
        name: As a `ThreatModel` has it, such as "linf".

    Returns:
        ℓ∞ for "linf", ℓ₂ for "l2" and so on; any other name as it is.

    Example:
        >>> from robust_jax import plots
        >>> plots.norm_symbol("l2"), plots.norm_symbol("visible")
        ('ℓ₂', 'visible')
    """
    match = re.fullmatch(r"l(inf|\d+)", name)
    if match is None:
        return name
    return "ℓ" + match[1].replace("inf", "∞").translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


# How many letters fit in a line under a figure, and how many a legend's handle and gaps take.
_LINE, _HANDLE = 100, 6


def legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, each label once."""
    entries = {
        label: handle
        for ax in panels
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    longest = max(map(len, entries), default=0) + _HANDLE
    columns = max(1, min(len(entries), 5, _LINE // longest))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def legend_above(ax: Axes, *, columns: int = 2) -> None:
    """A legend above the panel, where no line can cross it; none without labels."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            frameon=False,
            borderaxespad=0.2,
            columnspacing=1.2,
            handlelength=1.6,
        )


def two_columns(names: list[str]) -> list[list[str]]:
    """Rows of two; a last odd one is as wide as two."""
    rows = [names[i : i + 2] for i in range(0, len(names), 2)]
    return [row if len(row) == 2 else row * 2 for row in rows]


def bins_of(values: np.ndarray) -> tuple[list[float], bool]:
    """Bin edges, and whether they are logarithmic, for values that spread over a factor of 30."""
    positive = values[values > 0]
    if len(positive) and np.quantile(positive, 0.99) > 30 * np.quantile(positive, 0.01):
        # A saturated softmax has norms down to 1e-30; ten decades are enough to look at.
        low = max(positive.min(), positive.max() * 1e-10)
        return np.geomspace(low, positive.max(), num_bins(len(values)) + 1).tolist(), True
    return np.histogram_bin_edges(values, bins=num_bins(len(values))).tolist(), False


def num_bins(count: int) -> int:
    return int(np.clip(1.5 * np.sqrt(count), 10, 40))


def finite(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, float).ravel()
    return values[np.isfinite(values)]
