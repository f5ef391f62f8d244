"""What the studies share: the base, the smoke scale, attacks, and the tests of a claim."""

from configs import default

# PreActResNet-18, PGD-10 on CIFAR-10 at linf 8/255 (Rice, Wong, Kolter 2020), in percent.
PUBLISHED_AT = {"clean": 82.92, "PGD at {trained}": 53.49}

# The network for colour images and its recipe, at an accelerator's scales.
PREACT_RESNET18 = {
    "model": {"name": "preact_resnet", "depth": 18},
    "adversary": {"num_steps": 10},
    "optimizer": {"name": "sgd", "momentum": 0.9},
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "duration": "40 epochs",
    "evaluation": {"num_examples": 0},
    "audit": {"num_examples": 500},
}
CIFAR10_LINF = {
    **PREACT_RESNET18,
    "dataset": "tfds:cifar10",
    "augmentation": {"crop_padding": 4, "flip": True},
    "threat": {"eps": 8 / 255},
}

# Only shows that it runs.
QUICK = {
    "version": ("apgd_ce", "square"),
    "overrides": {"apgd_ce": {"num_steps": 4}, "square": {"num_queries": 20}},
}
SMOKE = {
    "dataset": "digits",
    "validation_size": 197,
    "normalize": True,
    "model": {"name": "cnn", "widths": (4, 4), "hidden": 8},
    "duration": "2 epochs",
    "log_every": "10 steps",
    "validate_every": "1 epoch",
    "checkpoint_every": "1 epoch",
    "evaluation": {"num_examples": 100, "num_images": 4, "spectral_iterations": 3},
    "audit": {"num_examples": 0},
}


def base_config():
    """The defaults, changed to evaluate and audit only a study's best networks."""
    config = default.get_config()
    config.validation_size = 1000
    config.evaluation.last = False  # claims are about the best
    config.audit.update({"num_examples": 100, "num_queries": 500})
    return config


def attacks(eps, num_examples, *, autoattack=None, smoke=False):
    """FGSM and PGD over the radii, AutoAttack on the first num_examples.

    autoattack: its radii; None is the threat model's.
    """
    return {
        "fgsm": {"eps": eps},
        "pgd": {"eps": eps, "num_steps": 4 if smoke else 20},
        "autoattack": {
            **({} if autoattack is None else {"eps": autoattack}),
            "num_examples": num_examples,
            **(QUICK if smoke else {}),
        },
    }


def above(measure, one, other=None, **keywords):
    """The test that a measure of one arm is above that of another, or above a `level`."""
    arms = (one,) if other is None else (one, other)
    return {"measure": measure, "arms": arms, "relation": "above", **keywords}


def below(measure, one, other=None, **keywords):
    """The test that a measure of one arm is below that of another, or below a `level`."""
    return {**above(measure, one, other, **keywords), "relation": "below"}
