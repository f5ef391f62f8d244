"""Figures of what measurements left to draw, arms or networks side by side."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from robust_jax.plots import measures

Arrays = Mapping[str, Mapping[str, np.ndarray]]
# What of a measurement's arrays, one number an example, is drawn as histograms, and its axis.
_DISTRIBUTIONS = {
    "output_margin": "output margin, in logits",
    "confidence": "probability of the label",
    "input_margin": "margin in the input space, pixel units",
}

_DRAWN = 400  # points of a scatter plot


def of_measurements(arrays: Arrays) -> dict[str, tuple[Figure, str]]:
    """Figures of the arrays that all the arms have."""
    figures: dict[str, tuple[Figure, str]] = {}
    names = set.intersection(*map(set, arrays.values())) if arrays else set()

    def of(name):
        return {arm: found[name] for arm, found in arrays.items()}

    def by_layer(prefix):
        return {
            arm: {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
            for arm, found in arrays.items()
        }

    for measurement, array in sorted({tuple(name.split("/")[:2]) for name in names}):
        here = f"{measurement}/{array}"
        if array in _DISTRIBUTIONS:
            figures[f"{measurement}_{array}"] = (
                measures.distributions(of(here), xlabel=_DISTRIBUTIONS[array]),
                f"{measurement}, {_DISTRIBUTIONS[array]}.",
            )
        elif array == "projection":
            label = next(iter(of(f"{measurement}/label").values()))
            figures[measurement] = (
                measures.latent_scatter(
                    {arm: points[:_DRAWN] for arm, points in of(here).items()}, label[:_DRAWN]
                ),
                "The last layer's input on its principal axes, a colour for each class.",
            )
        elif array == "singular_values":
            figures[measurement] = (
                measures.singular_values(by_layer(f"{here}/")),
                "Singular values of each layer.",
            )
        elif array == "change_random":
            changes = {
                f"{kind} δ": by_layer(f"{measurement}/change_{kind}/")
                for kind in ("random", "adversarial")
            }
            figures[measurement] = (
                measures.by_layer(changes, ylabel="‖h(x+δ) - h(x)‖ / ‖δ‖"),
                "The change in each layer over that of the image, median and middle half of the "
                "examples.",
            )
    return figures
