"""Label-free mean-square energy (arXiv 1911.06479, our reading) on digits, with 100 labels.

python launch.py --config=configs/digits_cnn_energy_mean_square_label_free.py --workdir=runs/digits

The paper was withdrawn; robust_jax/energy.py names its successor.

Under a minute on 2 CPU cores: 89.2 % clean, 26.8 % worst of the PGD family at linf 0.15, 24.2 %
with AutoAttack (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.num_labeled = 100
    config.loss_on = "clean"
    config.adversary = None
    config.regularizers.energy_mean_square.update(weight=100.0, label_free=True)
    return config
