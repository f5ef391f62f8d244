"""Average margin (arXiv 1907.11780) on CIFAR-10, the authors' recipe for their CNN with dropout.

    python launch.py --config=configs/cifar10_cnn_average_margin.py --workdir=runs/average_margin

The other arms are as in mnist_cnn_average_margin.py. Hours on an accelerator. Its accuracy has not
been measured yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "tfds:cifar10"
    config.validation_size = 1000
    config.model = {
        "name": "small_cnn",
        "widths": (64, 64, 128, 128),
        "hidden": (256, 256),
        "dropout_rate": 0.5,
    }
    config.normalize = False
    config.threat = {"norm": "l2", "eps": 0.4}

    config.loss_on = "clean"
    config.adversary = None
    config.regularizers.output_margin_ramp.update(weight=0.1, tau=10.0)
    config.regularizers.orthogonality.weight = 2e-3  # the authors' 1e-3, which they add twice

    config.batch_size = 128
    config.duration = "200 epochs"
    config.optimizer = {"name": "sgd", "momentum": 0.9, "nesterov": True}
    config.learning_rate = 0.002
    config.schedule = {"name": "constant"}
    config.weight_decay = 0.0
    config.log_every = "100 steps"
    config.validate_every = "1 epoch"
    config.checkpoint_every = "1 epoch"
    config.validation_attack = {"name": "fgsm", "eps": 0.0}  # best by clean accuracy
    config.track_margins.update(first_order=1000, minimum_norm=50, clever=100)
    config.track_margins.update(num_steps=50, num_samples=64)

    published = {"name": "pgd", "num_steps": 1000, "step_size": 0.01}
    config.attacks = ConfigDict(
        {
            "pgd_l2": published,
            "pgd_margin_l2": {**published, "loss": "margin_loss"},
            "autoattack_l2": {"name": "autoattack", "norm": "l2"},
        }
    )
    for entry in config.attacks.values():
        entry.num_examples = 1000
    return config
