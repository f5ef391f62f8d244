"""PGD adversarial training of LeNet-5 on Fashion-MNIST, linf 0.1: affordable on CPU.

python launch.py --config=configs/fashion_mnist_lenet5_at.py --workdir=runs/fashion_at

About half an hour on 2 CPU cores: 77.8 % clean, 64.5 % worst of the PGD family at linf 0.1.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "tfds:fashion_mnist"
    config.validation_size = 1000
    config.augmentation.flip = True
    config.model = {"name": "lenet5"}
    config.threat.eps = 0.1

    config.duration = "4 epochs"
    config.learning_rate = 2e-3
    config.schedule = {"name": "one_cycle"}
    config.log_every = "50 steps"
    config.validate_every = "0.5 epochs"
    config.checkpoint_every = "0.5 epochs"

    config.attacks = default.attack_grid(
        linf=(0.05, 0.1, 0.15), l2=(0.5, 1.0, 1.5), autoattack=("linf",), num_examples=200
    )
    return config
