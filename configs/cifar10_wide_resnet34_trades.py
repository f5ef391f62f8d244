"""TRADES with WRN-34-10 on CIFAR-10, linf 8/255, averaged parameters (arXiv 1901.08573).

    python launch.py --config=configs/cifar10_wide_resnet34_trades.py --workdir=runs/cifar10_trades

For several accelerators. Published, in float32 and without averaging: 84.9 % clean, 53.1 % under
AutoAttack.
"""

from configs import default


def get_config():
    config = default.get_config()
    default.cifar10_linf(config)
    config.model = {"name": "wide_resnet", "depth": 34, "width": 10}
    config.dtype = "bfloat16"
    config.loss_on = "clean"
    config.adversary.relative_step_size = 1 / 4
    config.adversary.loss = "kl"
    config.regularizers.kl.weight = 6.0
    config.optimizer = {"name": "sgd", "momentum": 0.9}
    config.learning_rate = 0.1
    config.duration = "100 epochs"
    config.schedule = {"name": "piecewise", "boundaries": (0.75, 0.9), "factor": 0.1}
    config.weight_decay = 2e-4
    config.ema_decay = 0.995
    return config
