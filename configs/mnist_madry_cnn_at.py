"""PGD adversarial training of the MNIST challenge's CNN, linf 0.3 (arXiv 1706.06083).

    python launch.py --config=configs/mnist_madry_cnn_at.py --workdir=runs/mnist_madry

For an accelerator. Published: clean 98.5 %, PGD-100 92.5 %, AutoAttack 88.5 %.
"""

from configs import default, mnist_lenet5_at


def get_config():
    config = mnist_lenet5_at.get_config()
    config.model = {"name": "madry_cnn"}
    config.normalize = False
    config.adversary = {
        "name": "pgd",
        "norm": "linf",
        "eps": 0.3,
        "num_steps": 40,
        "step_size": 0.01,
        "keep_best": False,
        "loss": "cross_entropy",
    }
    config.batch_size = 128
    config.duration = "100 epochs"
    config.learning_rate = 1e-4
    config.schedule = {"name": "constant"}
    config.weight_decay = 0.0
    config.validate_every = "1 epoch"
    config.checkpoint_every = "1 epoch"
    config.validation_attack = {"name": "pgd", "norm": "linf", "eps": 0.3, "num_steps": 40}
    config.attacks = default.attack_grid(
        linf=(0.1, 0.2, 0.3, 0.35), l2=(1.0, 2.0, 3.0), autoattack={"linf": 0.3}
    )
    config.audit.eps = 0.3
    return config
