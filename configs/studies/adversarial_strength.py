"""What adversarial robustness regularises (Wen, Li, Jia, ICML 2020, arXiv 2011.07478).

    python launch.py --config=configs/studies/adversarial_strength.py --workdir=runs/strength

Adversarial training of a LeNet-5 on Fashion-MNIST at four strengths. smoke: digits, seconds.
small: 2 epochs, 3 seeds, 35 minutes of a CPU core. full: CIFAR-10, PreActResNet-18, up to
16/255, an accelerator.
"""

from ml_collections import ConfigDict

from configs import default
from configs.studies.common import PREACT_RESNET18_AT, SMOKE, attacks

STRENGTHS = (0.0, 0.5, 1.0, 1.5)  # of the eps called trained
ARMS = ("eps_0", "eps_half", "eps_1", "eps_1_half")


def get_config():
    config = ConfigDict()
    config.title = "What adversarial robustness regularises"
    config.paper = "Wen, Li, Jia, ICML 2020, arXiv 2011.07478"
    config.question = (
        "As adversarial training gets stronger, do singular values, feature changes, margins and "
        "accuracy shrink, as the paper says?"
    )
    config.notes = (
        "Singular values are those of each layer's linear map with circular padding; the spread is "
        "their standard deviation, in the table its mean over layers. Feature changes are the mean "
        "over layers. Margins and confidence: of test images, and of training images beside them. "
        "Published, at scale full: Rice, Wong, Kolter 2020, the best epoch, PGD of 10 steps.",
    )
    config.scale = "small"
    config.seeds = (0, 1, 2)

    base = default.get_config()
    base.dataset = "tfds:fashion_mnist"
    base.validation_size = 1000
    base.model = {"name": "lenet5"}
    base.threat.eps = 0.1
    base.adversary.num_steps = 7
    base.learning_rate = 2e-3
    base.schedule = {"name": "one_cycle"}
    base.duration = "2 epochs"
    base.log_every = "50 steps"
    base.validate_every = "2 epochs"  # once: the network at the end of the schedule
    base.checkpoint_every = "1 epoch"
    base.validation_attack = {"name": "fgsm", "eps": 0.0}
    base.evaluation.num_examples = 1000
    base.audit.update({"num_examples": 100, "num_queries": 500})
    base.attacks = attacks((0.05, 0.1, 0.15), num_examples=100)
    base.measurements = measurements(num_examples=500)
    config.base = base

    config.arms = ConfigDict(
        {name: {} for name in ARMS}, sort_keys=False
    )  # their eps depends on the scale
    config.scales = {
        "smoke": {
            "seeds": (0, 1),
            "radii": {"trained": 0.1},
            "base": {
                **SMOKE,
                "attacks": attacks((0.05, 0.1, 0.15), 20, smoke=True),
                "measurements": measurements(num_examples=50),
            },
            "arms": arms(0.1),
        },
        "small": {"radii": {"trained": 0.1}, "arms": arms(0.1)},
        "full": {
            "seeds": (0, 1, 2),
            "radii": {"trained": 8 / 255},
            "published": (("eps_1", PREACT_RESNET18_AT),),
            "base": {
                "dataset": "tfds:cifar10",
                "augmentation": {"crop_padding": 4, "flip": True},
                "model": {"name": "preact_resnet", "depth": 18},
                "threat": {"eps": 8 / 255},
                "adversary": {"num_steps": 10},
                "optimizer": {"name": "sgd", "momentum": 0.9},
                "learning_rate": 0.1,
                "weight_decay": 5e-4,
                "duration": "40 epochs",
                "validate_every": "40 epochs",
                "evaluation": {"num_examples": 0},
                "audit": {"num_examples": 500},
                "attacks": attacks(tuple(e / 255 for e in (4, 8, 12)), 1000),
                "measurements": measurements(num_examples=2000),
            },
            "arms": arms(8 / 255),
        },
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        ("PGD at {trained}", "pgd@{trained}"),
        ("AutoAttack at {trained}", "autoattack@{trained}"),
        ("singular value spread", "measurements.spectra.mean_standard_deviation"),
        ("feature change, random", "measurements.features.mean_random"),
        ("feature change, adversarial", "measurements.features.mean_adversarial"),
        ("mean margin", "measurements.outputs.mean_margin"),
        ("margin spread", "measurements.outputs.std_margin"),
        ("mean confidence", "measurements.outputs.mean_confidence"),
        ("mean margin, training set", "measurements.outputs_train.mean_margin"),
        ("mean confidence, training set", "measurements.outputs_train.mean_confidence"),
        ("accuracy gap", "measurements.gaps.accuracy"),
        ("loss gap", "measurements.gaps.cross_entropy"),
    )
    config.pairs = (
        ("singular value spread", "AutoAttack at {trained}"),
        ("feature change, adversarial", "AutoAttack at {trained}"),
        ("mean margin", "clean"),
        ("mean confidence", "clean"),
    )
    config.along_training = ()
    config.published = ()

    def falls(measure):
        return {"measure": measure, "arms": ARMS, "relation": "falls", "at": STRENGTHS}

    config.claims = ConfigDict(
        {
            "a": {
                "text": "Singular values of most layers get less spread as eps grows.",
                "tests": [falls("measurements.spectra.standard_deviation/*")],
            },
            "b": {
                "text": "The change that a change of the image makes in feature space gets "
                "smaller.",
                "tests": [
                    falls("measurements.features.mean_random"),
                    falls("measurements.features.mean_adversarial"),
                ],
            },
            "c": {
                "text": "Margins concentrate near the decision boundary, and confidence falls.",
                "tests": [
                    falls(f"measurements.{split}.{what}")
                    for split in ("outputs", "outputs_train")
                    for what in ("mean_margin", "std_margin", "mean_confidence")
                ],
            },
            "d": {"text": "Standard accuracy falls.", "tests": [falls("clean.accuracy")]},
        },
        sort_keys=False,
    )
    return config


def arms(trained):
    """Adversarial training at each strength; eps 0 is standard training."""
    return {
        name: {
            "adversary": {"eps": share * trained},
            "loss_on": "adversarial" if share else "clean",
        }
        for name, share in zip(ARMS, STRENGTHS, strict=True)
    }


def measurements(num_examples):
    return {
        "spectra": {},
        "features": {"num_examples": num_examples},
        "outputs": {"num_examples": num_examples},
        "outputs_train": {"name": "outputs", "split": "train", "num_examples": num_examples},
        "gaps": {"num_examples": num_examples},
    }
