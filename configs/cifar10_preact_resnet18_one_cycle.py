"""PGD-10 with AWP in 40 epochs: one cycle, averaged parameters. PreActResNet-18, CIFAR-10.

    python launch.py --config=configs/cifar10_preact_resnet18_one_cycle.py --workdir=runs/one_cycle

For an accelerator: a fifth of the epochs of cifar10_preact_resnet18_at.py, for a robust network in
minutes. Its accuracy has not been measured yet.
"""

from configs import cifar10_preact_resnet18_at


def get_config():
    config = cifar10_preact_resnet18_at.get_config()
    config.duration = "40 epochs"
    config.schedule = {"name": "one_cycle"}
    config.ema_decay = 0.999
    config.weight_perturbation = 0.005
    return config
