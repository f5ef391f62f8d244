"""Adversarial weight perturbation (Wu, Xia, Wang 2020, arXiv 2004.05884)."""

from typing import Any

import jax
import jax.numpy as jnp

from robust_jax.attacks.norms import L2
from robust_jax.train.optimizer import is_kernel


def perturbed(params: Any, gradient: Any, gamma: float) -> Any:
    """The parameters with every kernel w moved by γ‖w‖ up the gradient of the loss.

    One step, relative to each layer's norm, as published. Biases and normalisation scales stay.
    """

    def move(is_kernel, w, g):
        return w + gamma * jnp.linalg.norm(w.ravel()) * L2.steepest(g) if is_kernel else w

    return jax.tree.map(move, is_kernel(params), params, gradient)
