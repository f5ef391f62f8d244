"""Average margin (arXiv 1907.11780) on CIFAR-10, the authors' recipe for their CNN with dropout.

    python launch.py --config=configs/cifar10_cnn_average_margin.py --workdir=runs/average_margin

The other arms as in mnist_cnn_average_margin.py. Hours on an accelerator. Its accuracy has not been
measured yet.
"""

from configs import mnist_cnn_average_margin


def get_config():
    config = mnist_cnn_average_margin.get_config()
    config.dataset = "tfds:cifar10"
    config.model = {
        "name": "small_cnn",
        "widths": (64, 64, 128, 128),
        "hidden": (256, 256),
        "dropout_rate": 0.5,
    }
    config.threat.eps = 0.4
    config.regularizers.output_margin_ramp.tau = 10.0
    for entry in config.attacks.values():
        del entry["eps"]  # that of the threat model
    return config
