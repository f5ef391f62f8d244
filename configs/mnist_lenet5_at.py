"""PGD adversarial training (arXiv 1706.06083) of LeNet-5 on MNIST, linf 0.2: affordable on CPU.

python launch.py --config=configs/mnist_lenet5_at.py --workdir=runs/mnist_at

About half an hour on 2 CPU cores, most of it attacks: 97.5 % clean, 86.7 % worst of the PGD family
at linf 0.2.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "tfds:mnist"
    config.validation_size = 1000
    config.model = {"name": "lenet5"}
    config.threat.eps = 0.2

    config.duration = "4 epochs"
    config.learning_rate = 2e-3
    config.schedule = {"name": "one_cycle"}
    config.log_every = "50 steps"
    config.validate_every = "0.5 epochs"
    config.checkpoint_every = "0.5 epochs"

    config.attacks = default.attack_grid(
        linf=(0.1, 0.2, 0.3), l2=(1.0, 2.0, 3.0), autoattack=("linf",), num_examples=200
    )
    return config
