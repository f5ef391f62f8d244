"""Adversarial robustness in JAX: losses, Jacobian norms and attacks as pure functions."""
