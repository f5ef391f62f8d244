"""PGD adversarial training of the MNIST challenge's CNN, linf 0.3 (arXiv 1706.06083).

    python launch.py --config=configs/mnist_madry_cnn_at.py --workdir=runs/mnist_madry

For an accelerator. Published: clean 98.5 %, PGD-100 92.5 %, AutoAttack 88.5 %.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "tfds:mnist"
    config.validation_size = 1000
    config.model = {"name": "madry_cnn"}
    config.normalize = False
    config.threat.eps = 0.3
    config.adversary.num_steps = 40
    config.adversary.relative_step_size = 1 / 30

    config.duration = "100 epochs"
    config.learning_rate = 1e-4
    config.schedule = {"name": "constant"}
    config.weight_decay = 0.0
    config.log_every = "50 steps"
    config.validate_every = "1 epoch"
    config.checkpoint_every = "1 epoch"

    config.validation_attack.num_steps = 40
    config.attacks = default.attack_grid(
        linf=(0.1, 0.2, 0.3, 0.35), l2=(1.0, 2.0, 3.0), autoattack=("linf",)
    )
    return config
