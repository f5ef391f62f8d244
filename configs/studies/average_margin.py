"""Minimum and average margin (Wu, Yu 2019, arXiv 1907.11780) on MNIST, LeNet-5.

    python launch.py --config=configs/studies/average_margin.py --workdir=runs/margin

Margins in the input space along training, and a regulariser that promotes their average (our
reading of the paper). smoke: digits, seconds. small: 3 epochs, 3 seeds, 100 minutes of a CPU
core. full: 20 epochs, 5 seeds.
"""

from ml_collections import ConfigDict

from configs import default
from configs.studies.common import SMOKE, above, attacks, below


def get_config():
    config = ConfigDict()
    config.title = "Minimum and average margin"
    config.paper = "Wu, Yu 2019, arXiv 1907.11780"
    config.question = (
        "Does the minimum margin rise in training while the average margin falls, and does "
        "promoting the average make a network more robust?"
    )
    config.notes = (
        "Margins are in ℓ₂ on training images, negative where misclassified: first-order "
        "estimates, and beside them an upper bound by a minimum-norm attack (FAB, fewer images) "
        "and the lower bound that the layers' norms guarantee. "
        "Claim (c) of the paper, that the regularised objective stays Fisher-consistent, is held "
        "by the tests.",
    )
    config.scale = "small"
    config.seeds = (0, 1, 2)

    base = default.get_config()
    base.dataset = "tfds:mnist"
    base.validation_size = 1000
    base.model = {"name": "lenet5"}
    base.loss_on = "clean"
    base.threat.eps = 0.1
    base.adversary.num_steps = 7
    base.learning_rate = 1e-3
    base.schedule = {"name": "constant"}
    base.duration = "3 epochs"
    base.log_every = "100 steps"
    base.validate_every = "0.5 epochs"
    base.checkpoint_every = "1 epoch"
    base.validation_attack = {"name": "fgsm", "eps": 0.0}
    base.track_margins = 500
    base.evaluation.num_examples = 1000
    base.audit.update({"num_examples": 100, "num_queries": 500})
    base.attacks = attacks((0.05, 0.1, 0.2), num_examples=100)
    base.measurements = measurements(num_examples=500, num_attacked=100)
    config.base = base

    margin = {"regularizers": {"input_margin": {"weight": 1.0}}}
    config.arms = ConfigDict(
        {
            "ce": {},
            "average_margin": margin,
            "at": {"loss_on": "adversarial"},
            "at_average_margin": {"loss_on": "adversarial", **margin},
        },
        sort_keys=False,
    )
    config.scales = {
        "smoke": {
            "seeds": (0, 1),
            "base": {
                **SMOKE,
                "track_margins": 50,
                "attacks": attacks((0.05, 0.1, 0.2), 20, smoke=True),
                "measurements": measurements(num_examples=50, num_attacked=10),
            },
        },
        "small": {},
        "full": {
            "seeds": (0, 1, 2, 3, 4),
            "base": {
                "duration": "20 epochs",
                "validate_every": "1 epoch",
                "evaluation": {"num_examples": 0},
                "attacks": attacks((0.05, 0.1, 0.2), 1000),
            },
        },
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        ("PGD at 0.05", "pgd@0.05"),
        ("PGD at 0.1", "pgd@0.1"),
        ("AutoAttack at 0.1", "autoattack@0.1"),
        ("minimum margin", "measurements.margins.minimum"),
        ("average margin", "measurements.margins.mean"),
        ("average, attack", "measurements.margins_attack.mean"),
        ("average, guaranteed", "measurements.margins_guaranteed.mean"),
        ("minimum, change", MINIMUM),
        ("average, change", AVERAGE),
    )
    config.pairs = (("average margin", "PGD at 0.1"), ("minimum margin", "PGD at 0.1"))
    config.along_training = ("minimum_margin", "average_margin")
    config.published = ()
    config.claims = ConfigDict(
        {
            "a, minimum": {
                "text": "In training the minimum margin rises, from the first validation to "
                "the last.",
                "tests": [above(MINIMUM, "ce", level=0.0)],
            },
            "a, average": {
                "text": "In training the average margin falls, from the first validation to "
                "the last.",
                "tests": [below(AVERAGE, "ce", level=0.0)],
            },
            "b": {
                "text": "A regulariser that promotes the average margin gives better robustness.",
                "tests": [
                    above("autoattack@0.1", "average_margin", "ce"),
                    above("pgd@0.05", "average_margin", "ce"),
                    above("autoattack@0.1", "at_average_margin", "at"),
                ],
            },
        },
        sort_keys=False,
    )
    return config


def measurements(num_examples, num_attacked):
    """The three estimates of margins."""
    return {
        "margins": {"num_examples": num_examples},
        "margins_attack": {
            "name": "margins",
            "estimate": "minimum_norm",
            "num_examples": num_attacked,
            "num_steps": 50,
        },
        "margins_guaranteed": {
            "name": "margins",
            "estimate": "lipschitz",
            "num_examples": num_examples,
        },
    }


MINIMUM = "training.last.minimum_margin - training.first.minimum_margin"
AVERAGE = "training.last.average_margin - training.first.average_margin"
