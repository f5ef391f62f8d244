"""PGD-10 with AWP in 40 epochs: one cycle, averaged parameters. PreActResNet-18, CIFAR-10.

    python launch.py --config=configs/cifar10_preact_resnet18_one_cycle.py --workdir=runs/one_cycle

For an accelerator: a fifth of the epochs of cifar10_preact_resnet18_at.py, for a robust network in
minutes. Its accuracy has not been measured yet.
"""

from configs import default


def get_config():
    config = default.get_config()
    default.cifar10_linf(config)
    config.model = {"name": "preact_resnet", "depth": 18}
    config.dtype = "bfloat16"
    config.adversary.relative_step_size = 1 / 4
    config.optimizer = {"name": "sgd", "momentum": 0.9}
    config.learning_rate = 0.1
    config.weight_decay = 5e-4
    config.duration = "40 epochs"
    config.schedule = {"name": "one_cycle"}
    config.ema_decay = 0.999
    config.weight_perturbation = 0.005
    return config
