"""Guided complement entropy (arXiv 1903.09799) on MNIST, the authors' recipe for LeNet-5.

    python launch.py --config=configs/mnist_lenet5_gce.py --workdir=runs/mnist_gce

Adam 1e-3 with β = (0.9, 0.99), batch 64, 20 epochs, pixels in [0,1] without normalisation, the best
epoch by clean accuracy. --config.loss.form=published takes the constants of the authors' code.
Published at eps 0.2: FGSM 62.74 %, BIM 34.49 %, PGD 9.55 %, MIM 39.81 % (cross-entropy: 38.88,
2.15, 1.58 and 2.29 %), following the training loss. A few minutes of training on 2 CPU cores, and
longer for the attacks on the whole test set.
"""

from ml_collections import ConfigDict

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "tfds:mnist"
    config.validation_size = 1000
    config.model = {"name": "lenet5"}
    config.normalize = False

    config.loss = {"name": "guided_complement_entropy", "alpha": 1 / 3, "form": "exact"}
    config.loss_on = "clean"
    config.adversary = None
    config.threat.eps = 0.2

    config.batch_size = 64
    config.duration = "20 epochs"
    config.optimizer = {"name": "adam", "b1": 0.9, "b2": 0.99}
    config.learning_rate = 1e-3
    config.schedule = {"name": "constant"}
    config.weight_decay = 0.0
    config.validate_every = "1 epoch"
    config.checkpoint_every = "1 epoch"
    config.log_every = "100 steps"
    config.validation_attack = {"name": "fgsm", "eps": 0.0}

    steps = {"num_steps": 40, "step_size": 0.01}
    attacks = {"fgsm": {}, "bim": steps, "pgd": steps, "mim": steps}
    suffixes = {
        "": "cross_entropy",
        "_gce": "guided_complement_entropy",
        "_gce_published": "guided_complement_entropy_published",
    }
    config.attacks = ConfigDict(
        {
            f"{name}{suffix}": {"name": name, "eps": (0.1, 0.2, 0.3), "loss": loss, **keywords}
            for suffix, loss in suffixes.items()
            for name, keywords in attacks.items()
        }
    )
    config.attacks.jsma = {"eps": (196, 392), "num_examples": 1000}  # a quarter and a half
    config.attacks.carlini_wagner = {"eps": 28.0, "num_examples": 1000}  # no bound: the l2 diameter
    config.attacks.autoattack = {"eps": (0.1, 0.2), "num_examples": 1000}
    return config
