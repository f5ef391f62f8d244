"""Fast-AT (FGSM from a random start, arXiv 2001.03994) on digits.

python launch.py --config=configs/digits_cnn_fast_at.py --workdir=runs/digits_fast_at

Under a minute on 2 CPU cores: 98.4 % clean, 62.2 % worst of the PGD family at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.adversary.num_steps = 1
    config.adversary.relative_step_size = 1.25
    return config
