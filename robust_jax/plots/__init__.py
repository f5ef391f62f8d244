"""Figures: arrays or DataFrames in, matplotlib Figures out.

`run` draws one run, `networks` any networks, `study` arms and seeds.
"""

from robust_jax.plots.networks import (
    by_layer,
    distributions,
    latent_scatter,
    loss_along,
    loss_surfaces,
    reliability_diagram,
    singular_values,
)
from robust_jax.plots.run import (
    FATE_COLORS,
    JACOBIANS,
    WORST_CASE,
    accuracy_against_eps,
    difference_scale,
    estimate_against_exact,
    fate_histograms,
    image_grid,
    jacobian_by_fate,
    jacobian_histograms,
    training_curves,
)
from robust_jax.plots.study import measures_against_each_other
from robust_jax.plots.style import norm_symbol

__all__ = [
    "FATE_COLORS",
    "JACOBIANS",
    "WORST_CASE",
    "accuracy_against_eps",
    "by_layer",
    "difference_scale",
    "distributions",
    "estimate_against_exact",
    "fate_histograms",
    "image_grid",
    "jacobian_by_fate",
    "jacobian_histograms",
    "latent_scatter",
    "loss_along",
    "loss_surfaces",
    "measures_against_each_other",
    "norm_symbol",
    "reliability_diagram",
    "singular_values",
    "training_curves",
]


def __dir__() -> list[str]:
    return __all__
