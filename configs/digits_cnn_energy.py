"""Mean-square energy of the loss (arXiv 1911.06479, our reading) on digits: random neighbours.

python launch.py --config=configs/digits_cnn_energy.py --workdir=runs/digits_energy

The paper was withdrawn; robust_jax/energy.py names its successor.

Under a minute on 2 CPU cores: 92.0 % clean, 41.6 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.loss_on = "clean"
    config.adversary = None
    config.regularizers.energy_mean_square.update(weight=100.0)
    return config
