"""What adversarial robustness regularises (Wen, Li, Jia, ICML 2020, arXiv 2011.07478).

    python launch.py --config=configs/studies/adversarial_strength.py --workdir=runs/strength

Adversarial training of a LeNet-5 on 3,000 images of Fashion-MNIST, few enough that there is a
generalisation gap, at four strengths. smoke: digits, seconds. small: 30 epochs, 3 seeds, an hour on
2 CPU cores. medium: 5,000 images, 120 epochs, PGD-10, 5 seeds, hours. full: CIFAR-10,
PreActResNet-18, up to 12/255, an accelerator.
"""

from ml_collections import ConfigDict

from configs.studies.common import CIFAR10_LINF, PUBLISHED_AT, SMOKE, attacks, base_config

STRENGTHS = (0.0, 0.5, 1.0, 1.5)  # in units of the eps called trained
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
        "Published: the quantities as the claims name them. Singular values are those of each "
        "layer's linear map with circular padding, the spread their standard deviation. Ours, free "
        "of scale: the deviation over the mean, BatchNorm folded into its layer; feature changes "
        "over the layer's own size; adversarial over random change; and the same at "
        "initialisation. Claims about layers count them one by one, and most is more than half; "
        "the table shows the first and the last. Singular values have the names of the layers' "
        "parameters (Conv_0 … head), changes those of their outputs (conv1 … logits). A change is "
        "by a δ of the eps called trained, in every network, random or by PGD. Margins and "
        "confidence: of test images, and of training images beside them; margins in the input "
        "space are first-order, in the threat model's norm. Gaps are training less test, so that "
        "of the loss is below zero. Falls and rises are those of a line through all strengths, "
        "from the first to the last.",
        "Published, at scale full: Rice, Wong, Kolter 2020, the best epoch, PGD of 10 steps.",
    )
    config.labels = dict(zip(ARMS, ("0", "½ε", "ε", "1½ε"), strict=True))
    config.scale = "small"
    config.seeds = (0, 1, 2)

    base = base_config()
    base.dataset = "tfds:fashion_mnist"
    base.model = {"name": "lenet5"}
    base.threat.eps = 0.1
    base.adversary.num_steps = 7
    base.learning_rate = 2e-3
    base.schedule = {"name": "one_cycle"}
    base.train_size = 3000
    base.duration = "30 epochs"
    base.log_every = "50 steps"
    base.validate_every = "30 epochs"  # once: the network at the end of the schedule
    base.checkpoint_every = "10 epochs"
    base.validation_attack = {"name": "fgsm", "eps": 0.0}
    base.evaluation.num_examples = 1000
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
                "train_size": 500,
                "attacks": attacks((0.05, 0.1, 0.15), 20, smoke=True),
                "measurements": measurements(num_examples=50),
            },
            "arms": arms(0.1),
        },
        "small": {"radii": {"trained": 0.1}, "arms": arms(0.1)},
        "medium": {
            "seeds": (0, 1, 2, 3, 4),
            "seeds_limit": 10,
            "radii": {"trained": 0.1},
            "base": {
                "train_size": 5000,
                "adversary": {"num_steps": 10},
                # Held-out accuracy under PGD has stopped rising by the 80th epoch.
                "duration": "120 epochs",
                "validate_every": "120 epochs",
                "attacks": attacks((0.05, 0.1, 0.15), 1000),
                "measurements": measurements(num_examples=1000),
            },
            "arms": arms(0.1),
        },
        "full": {
            "seeds": (0, 1, 2),
            "radii": {"trained": 8 / 255},
            "published": (("eps_1", PUBLISHED_AT),),
            "base": {
                **CIFAR10_LINF,
                "train_size": 0,
                "validate_every": "40 epochs",
                "attacks": attacks(tuple(e / 255 for e in (4, 8, 12)), 1000),
                "measurements": measurements(num_examples=2000),
            },
            "arms": arms(8 / 255),
        },
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        ("PGD at {trained}", "pgd@{trained}"),
        ("AutoAttack at {trained} (ours)", "autoattack@{trained}"),
        ("spread of the first layer", "measurements.spectra.standard_deviation/Conv_0"),
        ("spread of the head", "measurements.spectra.standard_deviation/head"),
        ("spread / mean, first layer (ours)", "measurements.spectra.relative_spread/Conv_0"),
        (
            "the same at initialisation (ours)",
            "measurements.spectra_initial.relative_spread/Conv_0",
        ),
        ("spread / mean, head (ours)", "measurements.spectra.relative_spread/head"),
        ("head at initialisation (ours)", "measurements.spectra_initial.relative_spread/head"),
        ("change of the logits", "measurements.features.adversarial/logits"),
        ("change / size, logits (ours)", "measurements.features.relative_adversarial/logits"),
        (
            "logits at initialisation (ours)",
            "measurements.features_initial.relative_adversarial/logits",
        ),
        (
            "adversarial / random, logits (ours)",
            "measurements.features.adversarial_over_random/logits",
        ),
        ("input-space margin (ours)", "measurements.margins.mean"),
        ("input-space margin, training set (ours)", "measurements.margins_train.mean"),
        ("mean margin", "measurements.outputs.mean_margin"),
        ("margin spread", "measurements.outputs.std_margin"),
        ("mean confidence", "measurements.outputs.mean_confidence"),
        ("mean margin, training set", "measurements.outputs_train.mean_margin"),
        ("margin spread, training set", "measurements.outputs_train.std_margin"),
        ("mean confidence, training set", "measurements.outputs_train.mean_confidence"),
        ("accuracy gap", "measurements.gaps.accuracy"),
        ("loss gap", "measurements.gaps.cross_entropy"),
    )
    config.pairs = (
        ("spread / mean, head (ours)", "AutoAttack at {trained} (ours)"),
        ("change / size, logits (ours)", "AutoAttack at {trained} (ours)"),
        ("mean margin", "input-space margin (ours)"),
        ("mean confidence", "clean"),
    )

    def falls(measure, relation="falls"):
        return {"measure": measure, "arms": ARMS, "relation": relation, "at": STRENGTHS}

    config.claims = ConfigDict(
        {
            "a": {
                "text": "Singular values of most layers get less spread as eps grows.",
                "smallest_effect": "10 %",
                "tests": [falls("measurements.spectra.standard_deviation/*")],
            },
            "a, scale-free": {
                "text": "So does their standard deviation over their mean (ours).",
                "smallest_effect": "10 %",
                "tests": [falls("measurements.spectra.relative_spread/*")],
            },
            "b": {
                "text": "In most layers the features change less when the image changes.",
                "smallest_effect": "10 %",
                "tests": [
                    falls("measurements.features.random/*"),
                    falls("measurements.features.adversarial/*"),
                ],
            },
            "b, scale-free": {
                "text": "Relative to the layer's own size they change less, too (ours).",
                "smallest_effect": "10 %",
                "tests": [
                    falls("measurements.features.relative_random/*"),
                    falls("measurements.features.relative_adversarial/*"),
                ],
            },
            "b, uniform": {
                "text": "Layers respond more evenly to all directions: in most, the ratio of "
                "adversarial to random change falls (ours).",
                "smallest_effect": "10 %",
                "tests": [falls("measurements.features.adversarial_over_random/*")],
            },
            "c": {
                "text": "Margins concentrate near the decision boundary, and confidence falls.",
                "smallest_effect": "10 %",
                "tests": [
                    falls(f"measurements.{split}.{what}")
                    for split in ("outputs", "outputs_train")
                    for what in ("mean_margin", "std_margin", "mean_confidence")
                ],
            },
            "c, input space": {
                "text": "In the input space margins rise meanwhile (ours).",
                "smallest_effect": "10 %",
                "tests": [
                    falls(f"measurements.{name}.mean", "rises")
                    for name in ("margins", "margins_train")
                ],
            },
            "d": {
                "text": "Standard accuracy falls.",
                "smallest_effect": 0.01,
                "tests": [falls("clean.accuracy")],
            },
            "d, gap": {
                "text": "The generalisation gap falls with it, of accuracy and of cross-entropy.",
                "tests": [
                    {**falls("measurements.gaps.accuracy"), "smallest_effect": 0.01},
                    # Training minus test, so negative if there is a gap.
                    {
                        **falls("measurements.gaps.cross_entropy", "rises"),
                        "smallest_effect": 0.05,  # nats
                    },
                ],
            },
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
        "spectra_initial": {"name": "spectra", "at": "initialisation"},
        "features": {"num_examples": num_examples},
        "features_initial": {
            "name": "features",
            "at": "initialisation",
            "num_examples": num_examples,
        },
        "margins": {"split": "test", "norm": "linf", "num_examples": num_examples},
        "margins_train": {"name": "margins", "norm": "linf", "num_examples": num_examples},
        "outputs": {"num_examples": num_examples},
        "outputs_train": {"name": "outputs", "split": "train", "num_examples": num_examples},
        "gaps": {"num_examples": num_examples},
    }
