"""Uncertainty promotion and adversarial training (Jin et al. 2020, arXiv 2011.13538).

    python launch.py --config=configs/studies/entm.py --workdir=runs/entm --config.scale=small

Entropy maximisation (EntM) and label smoothing (LS), alone and with adversarial training (AT), on
Fashion-MNIST with LeNet-5. smoke: digits, seconds. small: 2 epochs, 3 seeds, an hour on 2 CPU
cores. medium: 20 epochs, PGD-10, 5 seeds, hours. full: CIFAR-10, PreActResNet-18, 8/255, an
accelerator.
"""

from ml_collections import ConfigDict

from configs.studies.common import (
    CIFAR10_LINF,
    PUBLISHED_AT,
    SMOKE,
    above,
    attacks,
    base_config,
    below,
)

# Each weight is chosen on held-out images; the confidence of the optimum depends on it.
ENTM = {
    "regularizers": {"entropy": {"weight": 1.0}},
    "sweep": {"field": "regularizers.entropy.weight", "values": (0.1, 0.3, 1.0)},
}
SMOOTHED = {"loss": {"name": "cross_entropy", "label_smoothing": 0.2}}
LS = {**SMOOTHED, "sweep": {"field": "loss.label_smoothing", "values": (0.1, 0.2, 0.4)}}
# After 2 epochs (scale small) each sweep chose its largest value; after 20, a smaller one with AT.
WIDER = {
    arm: {"sweep": {"values": values}}
    for arm, values in {
        "entm": (0.1, 0.3, 1.0, 3.0),
        "at_entm": (0.1, 0.3, 1.0, 3.0),
        "at_ls": (0.1, 0.2, 0.4, 0.6),
        "at_ls_matched": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    }.items()
}
MATCHED = {
    **SMOOTHED,
    "sweep": {
        "field": "loss.label_smoothing",
        "values": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
        "by": "measurements.outputs.mean_confidence",
        "nearest": "at_entm",
    },
}


def get_config():
    config = ConfigDict()
    config.title = "Uncertainty promotion and adversarial training"
    config.paper = "Jin, Fan, Ng, Ju, Yang 2020, arXiv 2011.13538"
    config.question = (
        "Do entropy maximisation and label smoothing make a network robust alone, do they help "
        "adversarial training, and do smaller Jacobians explain it?"
    )
    config.notes = (
        "Published: the methods and the claims. The paper's tables and weights were not available. "
        "AutoAttack runs at every eps that a claim names; AT is trained at 0.1 (8/255 at scale "
        "full). Ours: the Jacobian free of the logits' scale, for a constant factor on the logits "
        "changes ‖J‖ and no decision. logits / T are divided by the temperature that minimises "
        "held-out cross-entropy; the relative slope is the largest ‖∇(z_y - z_j)‖ / |z_y - z_j|, "
        "in ℓ₂, the inverse of the first-order margin where the image is classified correctly. "
        "Its median is over all images.",
        "λ and γ are chosen by robust accuracy on held-out images, at 0.1 with AT and at 0.02 "
        "alone, which is also what is drawn along training; at_ls_matched has the γ whose "
        "confidence on them is nearest to that of at_entm.",
        "Transfer: PGD-20 on an undefended CNN, trained on the same images by a recipe of its own. "
        "Broken by transfer: of the points that hold against gradients, the share that such "
        "adversarials break. Published, at scale full: Rice, Wong, Kolter 2020, the best epoch, "
        "PGD of 10 steps.",
    )
    config.labels = {
        "ce": "CE",
        "entm": "EntM",
        "ls": "LS",
        "at": "AT",
        "at_entm": "AT + EntM",
        "at_ls": "AT + LS",
        "at_ls_matched": "AT + LS, matched (ours)",
    }
    config.scale = "small"
    config.seeds = (0, 1, 2)

    base = base_config()
    base.dataset = "tfds:fashion_mnist"
    base.model = {"name": "lenet5"}
    base.threat.eps = 0.1
    base.adversary.num_steps = 7
    base.learning_rate = 2e-3
    base.schedule = {"name": "one_cycle"}
    base.duration = "2 epochs"
    base.log_every = "50 steps"
    base.validate_every = "2 epochs"  # once: the network at the end of the schedule
    base.checkpoint_every = "1 epoch"
    base.evaluation.num_examples = 500
    radii = {"faint": 0.02, "trained": 0.1, "larger": 0.15, "largest": 0.2}
    sizes = tuple(radii.values())
    base.attacks = _attacks(sizes, 100)
    base.measurements = {"outputs": {"num_examples": 500}}
    config.base = base

    # Networks trained on clean images alone have no accuracy left at adversarial training's eps.
    clean = {"loss_on": "clean", "validation_attack": {"eps": radii["faint"]}}
    alone = {"ce": clean, "entm": {**clean, **ENTM}, "ls": {**clean, **LS}}
    config.arms = ConfigDict(
        {
            **alone,
            "at": {},
            "at_entm": ENTM,
            "at_ls": LS,
            "at_ls_matched": MATCHED,
        },
        sort_keys=False,
    )
    config.sweep = {
        "base": {"measurements": {"outputs": {"split": "validation", "num_examples": 1000}}}
    }
    levels = tuple(eps / 255 for eps in (2, 8, 12, 16))
    config.scales = {
        "smoke": {
            "seeds": (0, 1),
            "radii": radii,
            "base": {
                **SMOKE,
                "attacks": _attacks(sizes, 20, smoke=True),
            },
        },
        "small": {"radii": radii},
        "medium": {
            "seeds": (0, 1, 2, 3, 4),
            "seeds_limit": 10,
            "radii": radii,
            "arms": WIDER,
            "base": {
                "adversary": {"num_steps": 10},
                "duration": "20 epochs",
                "validate_every": "1 epoch",
                "evaluation": {"num_examples": 1000},
                "attacks": _attacks(sizes, 1000),
                "measurements": {"outputs": {"num_examples": 1000}},
            },
        },
        "full": {
            "seeds": (0, 1, 2),
            "radii": dict(zip(radii, levels, strict=True)),
            "arms": {
                arm: {
                    **WIDER.get(arm, {}),
                    **({"validation_attack": {"eps": levels[0]}} if arm in alone else {}),
                }
                for arm in {**WIDER, **alone}
            },
            "published": (("at", PUBLISHED_AT),),
            "base": {
                **CIFAR10_LINF,
                "validate_every": "1 epoch",
                "attacks": _attacks(levels, 1000),
            },
        },
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        *(
            (f"{words} at {{{size}}}{ours}", f"{attack}@{{{size}}}")
            for attack, words, ours in (
                ("fgsm", "FGSM", ""),
                ("pgd", "PGD", ""),
                ("autoattack", "AutoAttack", " (ours)"),
                ("transfer", "transfer", " (ours)"),
            )
            for size in ("faint", "trained", "larger", "largest")
        ),
        ("broken by transfer (ours)", "audit.checks.transfer.values.an undefended CNN"),
        ("‖J‖ logits", "jacobian.logits.frobenius.mean"),
        ("‖J‖ probabilities", "jacobian.probabilities.frobenius.mean"),
        ("‖J‖₂ logits", "jacobian.logits.spectral.mean"),
        ("‖J‖₂ probabilities", "jacobian.probabilities.spectral.mean"),
        ("‖J‖ logits / T (ours)", "jacobian.matched.frobenius.mean"),
        ("‖J‖₂ logits / T (ours)", "jacobian.matched.spectral.mean"),
        ("relative slope (ours)", "relative_slope.median"),
        ("temperature (ours)", "temperature"),
        ("mean confidence", "measurements.outputs.mean_confidence"),
        ("mean margin, logits", "measurements.outputs.mean_margin"),
    )
    config.pairs = (
        ("‖J‖ logits", "AutoAttack at {trained} (ours)"),
        ("‖J‖ logits / T (ours)", "AutoAttack at {trained} (ours)"),
        ("relative slope (ours)", "AutoAttack at {trained} (ours)"),
        ("‖J‖ logits", "PGD at {faint}"),
        ("‖J‖ probabilities", "PGD at {faint}"),
        ("‖J‖ logits", "PGD at {largest}"),
        ("‖J‖ logits", "AutoAttack at {largest} (ours)"),
    )
    config.along_training = ("robust_accuracy",)

    beyond = ("trained", "larger", "largest")
    config.claims = ConfigDict(
        {
            "a": {
                "text": "EntM and LS, each alone, are more robust than CE at a small eps, under "
                "PGD.",
                "smallest_effect": 0.02,
                "tests": [above("pgd@{faint}", arm, "ce") for arm in ("entm", "ls")],
            },
            "a, only": {
                "text": "At the eps that AT is trained on they are not: under PGD their accuracy "
                "is at most two points above CE's.",
                "tests": [below("pgd@{trained}", arm, "ce", by=-0.02) for arm in ("entm", "ls")],
            },
            "a, strong attacks": {
                "text": "The gain at a small eps is lost under strong attacks: under AutoAttack "
                "their accuracy is at most two points above CE's, at the small eps and at the one "
                "that AT is trained on.",
                "tests": [
                    below(f"autoattack@{{{eps}}}", arm, "ce", by=-0.02)
                    for eps in ("faint", "trained")
                    for arm in ("entm", "ls")
                ],
            },
            "b, clean": {
                "text": "With AT they beat AT on clean examples.",
                "smallest_effect": 0.01,
                "tests": [
                    above("clean.accuracy", "at_entm", "at"),
                    above("clean.accuracy", "at_ls", "at"),
                ],
            },
            "b, attacks": {
                "text": "With AT they beat AT under attack.",
                "smallest_effect": 0.02,
                "tests": [
                    above(measure, arm, "at")
                    for arm in ("at_entm", "at_ls")
                    for attack in ("fgsm", "pgd", "transfer", "autoattack")
                    for measure in (f"{attack}@{{{eps}}}" for eps in beyond)
                ],
            },
            "b, larger eps": {
                "text": "They do so most of all at eps larger than trained on.",
                "smallest_effect": 0.02,
                "tests": [
                    above(f"{attack}@{{{eps}}} - {attack}@{{trained}}", arm, "at")
                    for arm in ("at_entm", "at_ls")
                    for attack in ("pgd", "autoattack")
                    for eps in ("larger", "largest")
                ],
            },
            "b, matched": {
                "text": "At equal confidence on held-out images AT + EntM and AT + LS are as "
                "robust: neither is better by two points (ours).",
                "tests": [
                    test
                    for eps in beyond
                    for test in (
                        above(f"autoattack@{{{eps}}}", "at_entm", "at_ls_matched", by=-0.02),
                        above(f"autoattack@{{{eps}}}", "at_ls_matched", "at_entm", by=-0.02),
                    )
                ],
            },
            "c, relative slope": {
                "text": "EntM shrinks the Jacobian, free of the logits' scale: the relative slope "
                "(ours).",
                "smallest_effect": "10 %",
                "tests": [
                    below("relative_slope.median", arm, without)
                    for arm, without in (("entm", "ce"), ("at_entm", "at"))
                ],
            },
            **{
                f"c, {outputs}": {
                    "text": f"EntM shrinks the Jacobian of the {words}, in the Frobenius and in "
                    "the spectral norm.",
                    "smallest_effect": "10 %",
                    "tests": [
                        below(f"jacobian.{outputs}.{norm}.mean", arm, without)
                        for norm in ("frobenius", "spectral")
                        for arm, without in (("entm", "ce"), ("at_entm", "at"))
                    ],
                }
                for outputs, words in (
                    ("logits", "logits"),
                    ("probabilities", "probabilities"),
                    ("matched", "logits at the temperature of held-out images (ours)"),
                )
            },
        },
        sort_keys=False,
    )
    return config


def _attacks(eps, num_examples, smoke=False):
    """FGSM and PGD, AutoAttack on the first num_examples, and PGD transferred, at every eps.

    smoke: PGD then attacks the network itself, since a surrogate trains longer than all the rest.
    """
    how = {"num_steps": 4} if smoke else {"num_steps": 20, "surrogate": "train"}
    return {
        **attacks(eps, num_examples, autoattack=eps, smoke=smoke),
        "transfer": {"name": "pgd", "eps": eps, **how},
    }
