"""Oscillation energy of the loss (arXiv 1911.06479, our reading) on digits: both ends by PGD.

python launch.py --config=configs/digits_cnn_energy_oscillation.py --workdir=runs/digits_oscillation

The paper was withdrawn; robust_jax/energy.py names its successor.

Under a minute on 2 CPU cores: 95.4 % clean, 65.0 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.loss_on = "clean"
    config.adversary = None
    config.regularizers.energy_oscillation.update(weight=1.0)
    return config
