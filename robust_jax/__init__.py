"""Adversarial robustness in JAX: losses, Jacobian norms and attacks as pure functions."""

__version__ = "0.1.0"
