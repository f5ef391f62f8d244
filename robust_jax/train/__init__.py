"""Training: state, step, devices, loop, checkpoints and metrics."""
