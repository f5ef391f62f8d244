"""Energy of the loss in a neighbourhood (Zhang, Huang, Xu 2019, arXiv 1911.06479) on MNIST.

    python launch.py --config=configs/studies/energy.py --workdir=runs/energy

Mean-square and oscillation energy against adversarial training in l2 and VAT, supervised and with
100 labels (our reading of the paper). smoke: digits, seconds. small: 1 epoch, 3 seeds, 65
minutes of a CPU core. full: 20 epochs, 5 seeds; the paper's other data sets by
--config.base.dataset=tfds:cifar10 or tfds:svhn_cropped, with --config.base.model.name=…
"""

from ml_collections import ConfigDict

from configs import default
from configs.studies.common import SMOKE, above, attacks, below

EPS = 1.5


def get_config():
    config = ConfigDict()
    config.title = "Energy of the loss in a neighbourhood"
    config.paper = "Zhang, Huang, Xu 2019, arXiv 1911.06479"
    config.question = (
        "Does a loss that hardly changes near each image make a network more robust than "
        "adversarial training in ℓ₂ and VAT, which minimise a lower bound of that change?"
    )
    config.notes = (
        "The energies are our reading of the abstract. That adversarial training's term bounds the "
        "oscillation from below is held by the tests, example by example.",
    )
    config.scale = "small"
    config.seeds = (0, 1, 2)

    base = default.get_config()
    base.dataset = "tfds:mnist"
    base.validation_size = 1000
    base.model = {"name": "lenet5"}
    base.loss_on = "clean"
    base.threat = {"norm": "l2", "eps": EPS}
    base.adversary.num_steps = 5
    base.learning_rate = 2e-3
    base.schedule = {"name": "one_cycle"}
    base.duration = "1 epoch"
    base.log_every = "50 steps"
    base.validate_every = "1 epoch"
    base.checkpoint_every = "0.5 epochs"
    base.evaluation.num_examples = 500
    base.audit.update({"num_examples": 100, "num_queries": 500})
    base.attacks = attacks((0.75, EPS, 2.25), num_examples=100)
    base.measurements = {"energy": {"num_examples": 500}}
    config.base = base

    few = {"num_labeled": 100, "labeled_fraction": 0.25}
    vat = {"vat": {"weight": 1.0, "eps": EPS}}
    free = {"energy_oscillation": {"weight": 1.0, "num_steps": 5, "label_free": True}}
    config.arms = ConfigDict(
        {
            "ce": {},
            "at": {"loss_on": "adversarial"},
            "vat": {"regularizers": vat},
            "mean_square": {
                "regularizers": {"energy_mean_square": {"weight": 1.0, "num_samples": 2}}
            },
            "oscillation": {
                "regularizers": {"energy_oscillation": {"weight": 1.0, "num_steps": 5}}
            },
            "ce_100": few,
            "vat_100": {**few, "regularizers": vat},
            "oscillation_100": {**few, "regularizers": free},
        },
        sort_keys=False,
    )
    config.scales = {
        "smoke": {
            "seeds": (0, 1),
            "base": {
                **SMOKE,
                "attacks": attacks((0.75, EPS, 2.25), 20, smoke=True),
                "measurements": {"energy": {"num_examples": 50}},
            },
        },
        "small": {},
        "full": {
            "seeds": (0, 1, 2, 3, 4),
            "base": {
                "duration": "20 epochs",
                "validate_every": "1 epoch",
                "checkpoint_every": "1 epoch",
                "evaluation": {"num_examples": 0},
                "attacks": attacks((0.75, EPS, 2.25), 1000),
            },
        },
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        ("PGD at 0.75", "pgd@0.75"),
        ("PGD at 1.5", "pgd@1.5"),
        ("AutoAttack at 1.5", "autoattack@1.5"),
        ("mean-square energy", "measurements.energy.mean_square"),
        ("oscillation energy", "measurements.energy.oscillation"),
    )
    config.pairs = (
        ("oscillation energy", "AutoAttack at 1.5"),
        ("mean-square energy", "AutoAttack at 1.5"),
    )
    config.along_training = ()
    config.published = ()
    config.claims = ConfigDict(
        {
            "lower bound": {
                "text": "Adversarial training and VAT, which minimise a lower bound of the energy, "
                "lower the energy.",
                "tests": [
                    below(f"measurements.energy.{form}", arm, "ce")
                    for form in ("oscillation", "mean_square")
                    for arm in ("at", "vat")
                ],
            },
            "a": {
                "text": "Energy regularisation beats VAT and adversarial training in ℓ₂.",
                "tests": [
                    above("autoattack@1.5", "oscillation", "vat"),
                    above("autoattack@1.5", "oscillation", "at"),
                ],
            },
            "a, mean square": {
                "text": "So does the mean-square form.",
                "tests": [
                    above("autoattack@1.5", "mean_square", "vat"),
                    above("autoattack@1.5", "mean_square", "at"),
                ],
            },
            "b": {
                "text": "With few labels, the label-free energy beats VAT and plain training.",
                "tests": [
                    above("autoattack@1.5", "oscillation_100", "vat_100"),
                    above("clean.accuracy", "oscillation_100", "ce_100"),
                ],
            },
        },
        sort_keys=False,
    )
    return config
