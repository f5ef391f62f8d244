"""Figures of the measurements' arrays, with arms or networks side by side."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from robust_jax.plots import networks

Arrays = Mapping[str, Mapping[str, np.ndarray]]
# Arrays of one number an example that are drawn as histograms, and the label of the axis.
_DISTRIBUTIONS = {
    "output_margin": "output margin, in logits",
    "gap": "logit of the label less the mean of the others",
    "confidence": "probability of the label",
    "input_margin": "margin in the input space, pixel units",
}

# Names of the axes of arrays that are points in a plane, and how the points were found.
_PLANES = {
    "projection": (("first component", "second component"), "on its principal axes"),
    "tsne": (("", ""), "by t-SNE, whose distances mean nothing beyond the neighbours"),
}
_DRAWN = 320  # points of a scatter plot


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
                networks.distributions(of(here), xlabel=_DISTRIBUTIONS[array]),
                f"{measurement}, {_DISTRIBUTIONS[array]}.",
            )
        elif array in _PLANES:
            labels = of(f"{measurement}/label")
            axes, said = _PLANES[array]
            figures[measurement if array == "projection" else f"{measurement}_{array}"] = (
                networks.latent_scatter(
                    {arm: points[:_DRAWN] for arm, points in of(here).items()},
                    {arm: label[:_DRAWN] for arm, label in labels.items()},
                    axes=axes,
                ),
                f"The last layer's input {said}, a colour for each class.",
            )
        elif array == "loss_along":
            figures[measurement] = (
                networks.loss_along(of(here)),
                "Mean loss on the way from the images to the worst points found, with the middle "
                "half of the examples.",
            )
        elif array == "singular_values":
            figures[measurement] = (
                networks.singular_values(by_layer(f"{here}/")),
                "Singular values of each layer.",
            )
        elif array in ("change_random", "relative_change_random"):
            prefix = array.removesuffix("change_random")
            changes = {
                f"{kind} δ": by_layer(f"{measurement}/{prefix}change_{kind}/")
                for kind in ("random", "adversarial")
            }
            over = "(‖h(x)‖ ‖δ‖)" if prefix else "‖δ‖"
            figures[f"{prefix}{measurement}"] = (
                networks.by_layer(changes, ylabel=f"‖h(x+δ) - h(x)‖ / {over}"),
                "The change in each layer over that of the image"
                + (" and over the layer's own size" if prefix else "")
                + ", median and middle half of the examples.",
            )
    return figures
