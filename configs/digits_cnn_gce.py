"""Guided complement entropy (arXiv 1903.09799) on digits, without adversaries.

python launch.py --config=configs/digits_cnn_gce.py --workdir=runs/digits_gce

Under a minute on 2 CPU cores: 98.8 % clean, 32.0 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.loss_on = "clean"
    config.adversary = None
    config.loss = {"name": "guided_complement_entropy", "alpha": 1 / 3}
    return config
