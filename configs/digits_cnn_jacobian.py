"""Jacobian regularisation (arXiv 1908.02729) on digits, without adversaries.

python launch.py --config=configs/digits_cnn_jacobian.py --workdir=runs/digits_jacobian

Two minutes on 2 CPU cores: 97.4 % clean, 52.6 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.loss_on = "clean"
    config.adversary = None
    config.regularizers.jacobian.weight = 0.01
    return config
