"""Label-free oscillation (arXiv 1911.06479, our reading) on digits, with 100 labels.

python launch.py --config=configs/digits_cnn_energy_label_free.py --workdir=runs/digits_label_free

The paper was withdrawn; robust_jax/energy.py names its successor.

Under a minute on 2 CPU cores: 95.0 % clean, 64.0 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.num_labeled = 100
    config.loss_on = "clean"
    config.adversary = None
    config.regularizers.energy_oscillation.update(weight=10.0, label_free=True)
    return config
