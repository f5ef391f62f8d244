"""PGD-10 adversarial training of PreActResNet-18 on CIFAR-10, linf 8/255 (Rice et al. 2020).

    python launch.py --config=configs/cifar10_preact_resnet18_at.py --workdir=runs/cifar10_at

For an accelerator. The authors (arXiv 2002.11569 and its logs) reach 82.9 % clean and 53.5 % under
PGD-10 at the best epoch. At the last of 200 epochs they have 84.9 % and 45.6 %, which is robust
overfitting.
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
    config.duration = "200 epochs"
    config.schedule = {"name": "piecewise", "boundaries": (0.5, 0.75), "factor": 0.1}
    config.weight_decay = 5e-4
    return config
