"""AT with adversarial weight perturbation (arXiv 2004.05884) on digits.

python launch.py --config=configs/digits_cnn_awp.py --workdir=runs/digits_awp

Under a minute on 2 CPU cores: 97.8 % clean, 66.4 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.weight_perturbation = 0.005
    return config
