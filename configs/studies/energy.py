"""Energy of the loss in a neighbourhood (Zhang, Huang, Xu 2019, arXiv 1911.06479) on MNIST.

    python launch.py --config=configs/studies/energy.py --workdir=runs/energy

Four energies against adversarial training in l2, by PGD and by one step, and VAT, supervised and
with few labels (our readings of the paper, which was withdrawn). smoke: digits, seconds. small: one
epoch, 3 seeds, an hour on 2 CPU cores. medium: 5 epochs, 5 seeds, hours. full: 20 epochs, 5 seeds.
cifar10 and svhn: the papers' other data, PreActResNet-18, an accelerator.
"""

from ml_collections import ConfigDict

from configs.studies.common import PREACT_RESNET18, SMOKE, above, attacks, base_config, below

EPS = 1.5
# Those that adversarial training's term bounds from below, for each example.
BOUNDED = ("oscillation", "path")
ENERGIES = ("total_variation", *BOUNDED, "mean_square")
# Those that look at the interior of the ball.
INTERIOR = ("total_variation", "path", "mean_square")
# At scale small, weights at an end of a list were best, and after five epochs others were, so these
# lists are long.
WIDER = {
    arm: {"sweep": {"values": weights}}
    for arm, weights in {
        "vat": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        "vat_few": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        "total_variation": (0.1, 0.3, 1.0, 3.0, 10.0),
        "total_variation_few": (0.003, 0.03, 0.3, 3.0, 10.0, 30.0, 100.0),
        "oscillation": (0.03, 0.1, 0.3, 1.0),
        "oscillation_few": (0.3, 1.0, 3.0, 10.0),
        "path": (0.03, 0.1, 0.3),
        "mean_square": (10.0, 100.0, 1000.0, 10000.0),
    }.items()
}


def get_config():
    config = ConfigDict()
    config.title = "Energy of the loss in a neighbourhood"
    config.paper = (
        "Zhang, Huang, Xu 2019, arXiv 1911.06479; withdrawn, succeeded by Machine Learning "
        "111(7):2489-2513, 2022, doi 10.1007/s10994-022-06186-9"
    )
    config.question = (
        "Does a loss that hardly changes near each image make a network more robust than "
        "adversarial training in ℓ₂ and VAT, which are said to minimise a lower bound of that "
        "change?"
    )
    config.notes = (
        "The paper was withdrawn from arXiv (version 2, June 2020); its successor says that the "
        "energy describes the total variation in a small neighbourhood. We worked from the "
        "abstracts of both, not from their formulas: every energy here is our reading. The rise of "
        "the loss to its worst point bounds the oscillation and the squared variation along the "
        "way (path) from below, example by example, which tests/test_energy.py checks; it does not "
        "bound the mean square, which averages over the ball. Adversarial training minimises the "
        "loss at the worst point, an upper bound of the rise's root. VAT's term bounds the "
        "label-free rise alone, from below where its point is in the box. At scales medium and "
        "full adversarial training takes 10 steps of PGD, and the energies that search take 5.",
        "Every weight is chosen by robust accuracy on held-out images. Few labels are 100 on "
        "MNIST, 4,000 on CIFAR-10 and 1,000 on SVHN; three quarters of a batch then have none.",
        "Label-free energies are of KL(p(x) ‖ p(x+r)), which VAT lowers at one r, not cut to "
        "[0,1]. One-step training is the baseline of Miyato et al. 2018, x + eps·g/‖g‖, "
        "which is cut to [0,1] here, and the loss on both halves.",
    )
    config.labels = {
        "ce": "CE",
        "at": "AT",
        "at_one_step": "AT, one step",
        "vat": "VAT",
        **{energy: f"{energy.replace('_', ' ')} (ours)" for energy in ENERGIES},
        "ce_few": "CE, few labels",
        "vat_few": "VAT, few labels",
        "total_variation_few": "total variation (ours), few labels",
        "oscillation_few": "oscillation (ours), few labels",
    }
    config.scale = "small"
    config.seeds = (0, 1, 2)

    base = base_config()
    base.dataset = "tfds:mnist"
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
    base.attacks = attacks(sizes(EPS), num_examples=100)
    base.measurements = measurements(num_examples=500)
    config.base = base

    config.arms = ConfigDict(
        {
            "ce": {},
            "at": {"loss_on": "adversarial"},
            "at_one_step": {
                "loss_on": "both",
                "adversary": {
                    "name": "pgd",
                    "num_steps": 1,
                    "relative_step_size": 1.0,
                    "random_start": False,
                    "keep_best": False,
                },
            },
            "vat": vat(EPS),
            "total_variation": term("total_variation", (0.01, 0.03, 0.1), num_samples=1),
            "oscillation": term("oscillation", (0.3, 1.0, 3.0), num_steps=5),
            "path": term("path", (0.3, 1.0, 3.0), num_steps=5),
            "mean_square": term("mean_square", (10.0, 100.0, 1000.0), num_samples=2),
            "ce_few": few(100),
            "vat_few": few(100) | vat(EPS),
            "total_variation_few": few(100)
            | term("total_variation", (0.01, 0.03, 0.1), label_free=True, num_samples=1),
            "oscillation_few": few(100)
            | term("oscillation", (0.3, 1.0, 3.0), label_free=True, num_steps=5),
        },
        sort_keys=False,
    )
    config.scales = {
        "smoke": {
            "seeds": (0, 1),
            "radii": radii(EPS),
            "base": {
                **SMOKE,
                "attacks": attacks(sizes(EPS), 20, smoke=True),
                "measurements": measurements(num_examples=50),
            },
        },
        "small": {"radii": radii(EPS)},
        "medium": {
            "seeds": (0, 1, 2, 3, 4),
            "seeds_limit": 10,
            "radii": radii(EPS),
            "base": {
                "adversary": {"num_steps": 10},
                "duration": "5 epochs",
                "evaluation": {"num_examples": 1000},
                "attacks": attacks(sizes(EPS), 1000),
            },
            "arms": WIDER,
        },
        "full": {
            "seeds": (0, 1, 2, 3, 4),
            "radii": radii(EPS),
            "arms": WIDER,
            "base": {
                "adversary": {"num_steps": 10},
                "duration": "20 epochs",
                "checkpoint_every": "1 epoch",
                "evaluation": {"num_examples": 0},
                "attacks": attacks(sizes(EPS), 1000),
                "measurements": measurements(num_examples=1000),
            },
        },
        "cifar10": on_colour_images("tfds:cifar10", few_labels=4000),
        "svhn": on_colour_images("tfds:svhn_cropped", few_labels=1000),
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        *((f"PGD at {{{name}}}", f"pgd@{{{name}}}") for name in radii(EPS)),
        ("AutoAttack at {trained} (ours)", "autoattack@{trained}"),
        *(
            (f"{name.replace('_', ' ')}{words} (ours)", f"measurements.{kind}.{name}")
            for kind, words in (("energy", ""), ("energy_free", ", label-free"))
            for name in (*ENERGIES, "total_variation_squared", "rise")
        ),
        ("loss halfway (ours)", "measurements.interior.loss/50"),
        ("loss at the worst point (ours)", "measurements.interior.loss/100"),
        ("worst inside (ours)", "measurements.interior.worst_inside"),
        ("accuracy gap", "measurements.gaps.accuracy"),
        ("loss gap", "measurements.gaps.cross_entropy"),
    )
    config.pairs = (
        ("oscillation (ours)", "AutoAttack at {trained} (ours)"),
        ("total variation (ours)", "AutoAttack at {trained} (ours)"),
        ("mean square (ours)", "AutoAttack at {trained} (ours)"),
    )
    config.along_training = ("robust_accuracy",)
    robust = "autoattack@{trained}"
    config.claims = ConfigDict(
        {
            "lower bound": {
                "text": "Adversarial training (PGD and one step) and VAT lower the rise of the "
                "loss, and the energies that it bounds: the oscillation and the variation along "
                "the way.",
                "smallest_effect": "10 %",
                "tests": [
                    below(f"measurements.energy.{form}", arm, "ce")
                    for form in ("rise", *BOUNDED)
                    for arm in ("at", "at_one_step", "vat")
                ],
            },
            "lower bound, total variation": {
                "text": "They lower the total variation, the mean norm of the gradient, too, of "
                "which no bound is known.",
                "smallest_effect": "10 %",
                "tests": [
                    below("measurements.energy.total_variation", arm, "ce")
                    for arm in ("at", "at_one_step", "vat")
                ],
            },
            "lower bound, label-free": {
                "text": "VAT lowers the label-free oscillation and variation along the way.",
                "smallest_effect": "10 %",
                "tests": [
                    below(f"measurements.energy_free.{form}", "vat", "ce") for form in BOUNDED
                ],
            },
            "generalisation": {
                "text": "Regularising with an energy narrows the generalisation gap, of accuracy "
                "and of cross-entropy (our reading of a bound that it lowers).",
                "smallest_effect": 0.005,
                "tests": gaps(ENERGIES, "ce"),
            },
            "generalisation, few labels": {
                "text": "With few labels, where there is a gap, a label-free energy narrows it, of "
                "accuracy and of cross-entropy.",
                "smallest_effect": 0.01,
                "tests": gaps(("total_variation_few", "oscillation_few"), "ce_few"),
            },
            **{
                f"a, {name.replace('_', ' ')}": {
                    "text": f"Regularising with the {words} (our reading) beats VAT and "
                    "adversarial training in ℓ₂, by PGD and by one step.",
                    "smallest_effect": 0.02,
                    "tests": [above(robust, name, arm) for arm in ("vat", "at", "at_one_step")],
                }
                for name, words in (
                    ("total_variation", "total variation"),
                    ("oscillation", "oscillation"),
                    ("path", "variation along the way"),
                    ("mean_square", "mean square"),
                )
            },
            "interior": {
                "text": "Adversarial training neglects the interior of the ball: networks trained "
                "with energies that look at it are more robust there under PGD, and have a lower "
                "loss halfway to the worst point.",
                "smallest_effect": 0.01,
                "tests": [
                    *(
                        above(f"pgd@{{{size}}}", arm, "at")
                        for arm in INTERIOR
                        for size in ("quarter", "half", "three_quarters")
                    ),
                    *(below("measurements.interior.loss/50", arm, "at") for arm in INTERIOR),
                ],
            },
            "b": {
                "text": "With few labels, a label-free energy is more robust than VAT, and more "
                "accurate than plain training.",
                "smallest_effect": 0.02,
                "tests": [
                    test
                    for arm in ("total_variation_few", "oscillation_few")
                    for test in (
                        above(robust, arm, "vat_few"),
                        above("clean.accuracy", arm, "ce_few"),
                    )
                ],
            },
        },
        sort_keys=False,
    )
    return config


def gaps(arms, plain):
    """Tests that training minus test accuracy is below the plain arm's, cross-entropy's above."""
    return [
        test
        for arm in arms
        for test in (
            above("measurements.gaps.cross_entropy", arm, plain),
            below("measurements.gaps.accuracy", arm, plain),
        )
    ]


def few(num_labeled):
    """A subset of labels, balanced by class; the others enter label-free terms only."""
    return {"num_labeled": num_labeled, "labeled_fraction": 0.25}


def vat(eps):
    return _swept("vat", (0.3, 1.0, 3.0), eps=eps)


def term(name, weights, **keywords):
    return _swept(f"energy_{name}", weights, **keywords)


def _swept(name, weights, **keywords):
    """A regulariser whose weight is chosen on held-out images."""
    return {
        "regularizers": {name: {"weight": weights[1], **keywords}},
        "sweep": {"field": f"regularizers.{name}.weight", "values": weights},
    }


def radii(eps):
    """The trained radius, a larger one, and some inside the ball."""
    shares = {"quarter": 0.25, "half": 0.5, "three_quarters": 0.75, "trained": 1.0, "larger": 1.5}
    return {name: share * eps for name, share in shares.items()}


def sizes(eps):
    return tuple(radii(eps).values())


def measurements(num_examples):
    return {
        "energy": {"num_examples": num_examples},
        "energy_free": {"name": "energy", "label_free": True, "num_examples": num_examples},
        "interior": {"num_examples": num_examples},
        "gaps": {"num_examples": num_examples},
    }


def on_colour_images(dataset, few_labels):
    """CIFAR-10 or SVHN at l2 0.5, for an accelerator."""
    eps = 0.5
    return {
        "seeds": (0, 1, 2),
        "radii": radii(eps),
        "base": {
            **PREACT_RESNET18,
            "dataset": dataset,
            "augmentation": {"crop_padding": 4, "flip": dataset == "tfds:cifar10"},
            "threat": {"eps": eps},
            "checkpoint_every": "1 epoch",
            "attacks": attacks(sizes(eps), 1000),
            "measurements": measurements(num_examples=1000),
        },
        "arms": {
            "vat": vat(eps),
            "ce_few": few(few_labels),
            "vat_few": few(few_labels) | vat(eps),
            "total_variation_few": few(few_labels),
            "oscillation_few": few(few_labels),
        },
    }
