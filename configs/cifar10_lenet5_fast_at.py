"""Fast adversarial training (FGSM from a random start, arXiv 2001.03994) of LeNet-5 on CIFAR-10.

    python launch.py --config=configs/cifar10_lenet5_fast_at.py --workdir=runs/cifar10_fast

A net this small is a baseline that a CPU can afford; see cifar10_preact_resnet18_at.py. Under an
hour on 2 CPU cores: 37.0 % clean, 23.9 % worst of the PGD family at linf 8/255.
"""

from configs import default


def get_config():
    config = default.get_config()
    default.cifar10_linf(config)
    config.model = {"name": "lenet5"}
    config.adversary.num_steps = 1
    config.adversary.relative_step_size = 1.25
    config.duration = "8 epochs"
    config.learning_rate = 2e-3
    config.schedule = {"name": "one_cycle"}
    config.attacks.autoattack_linf.num_examples = 200
    return config
