"""Uncertainty promotion and adversarial training (Jin et al. 2020, arXiv 2011.13538).

    python launch.py --config=configs/studies/entm.py --workdir=runs/entm --config.scale=small

Entropy maximisation (EntM) and label smoothing (LS), alone and with adversarial training (AT), on
Fashion-MNIST with LeNet-5. smoke: digits, seconds. small: 2 epochs, 3 seeds, 40 minutes of a
CPU core. full: CIFAR-10, PreActResNet-18, 8/255, an accelerator.
"""

from ml_collections import ConfigDict

from configs import default
from configs.studies.common import PREACT_RESNET18_AT, SMOKE, above, attacks, below

ENTM = {"regularizers": {"entropy": {"weight": 1.0}}}
LS = {"loss": {"name": "cross_entropy", "label_smoothing": 0.2}}
CLEAN = {"loss_on": "clean"}


def get_config():
    config = ConfigDict()
    config.title = "Uncertainty promotion and adversarial training"
    config.paper = "Jin, Fan, Ng, Ju, Yang 2020, arXiv 2011.13538"
    config.question = (
        "Do entropy maximisation and label smoothing make a network robust alone, do they help "
        "adversarial training, and do smaller Jacobians explain it?"
    )
    config.notes = (
        "Robust accuracy is under AutoAttack where it says so; AT is trained at the middle eps. "
        "Transfer: of the points that hold against gradients, the share that adversarials made on "
        "an undefended CNN break. Published, at scale full: Rice, Wong, Kolter 2020, the best "
        "epoch, PGD of 10 steps.",
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
    base.evaluation.num_examples = 500
    base.audit.update({"num_examples": 100, "num_queries": 500})
    base.attacks = attacks((0.02, 0.05, 0.1, 0.15, 0.2), num_examples=100)
    config.base = base

    config.arms = ConfigDict(
        {
            "ce": CLEAN,
            "entm": {**CLEAN, **ENTM},
            "ls": {**CLEAN, **LS},
            "at": {},
            "at_entm": ENTM,
            "at_ls": LS,
        },
        sort_keys=False,
    )
    radii = {"faint": 0.02, "trained": 0.1, "larger": 0.15, "largest": 0.2}
    config.scales = {
        "smoke": {
            "seeds": (0, 1),
            "radii": radii,
            "base": {
                **SMOKE,
                "attacks": attacks((0.02, 0.05, 0.1, 0.15, 0.2), 20, smoke=True),
            },
        },
        "small": {"radii": radii},
        "full": {
            "seeds": (0, 1, 2),
            "radii": {
                name: eps / 255
                for name, eps in {"faint": 2, "trained": 8, "larger": 12, "largest": 16}.items()
            },
            "published": (("at", PREACT_RESNET18_AT),),
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
                "validate_every": "1 epoch",
                "evaluation": {"num_examples": 0},
                "audit": {"num_examples": 500},
                "attacks": attacks(tuple(e / 255 for e in (2, 4, 8, 12, 16)), num_examples=1000),
            },
        },
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        ("PGD at {faint}", "pgd@{faint}"),
        ("PGD at {trained}", "pgd@{trained}"),
        ("PGD at {larger}", "pgd@{larger}"),
        ("AutoAttack at {trained}", "autoattack@{trained}"),
        ("broken by transfer", "audit.checks.transfer.values.an undefended CNN"),
        ("‖J‖ logits", "jacobian.logits.frobenius.mean"),
        ("‖J‖ probabilities", "jacobian.probabilities.frobenius.mean"),
        ("‖J‖₂ logits", "jacobian.logits.spectral.mean"),
        ("‖J‖₂ probabilities", "jacobian.probabilities.spectral.mean"),
    )
    config.pairs = (
        ("‖J‖ logits", "AutoAttack at {trained}"),
        ("‖J‖ probabilities", "AutoAttack at {trained}"),
        ("‖J‖ logits", "PGD at {faint}"),
        ("‖J‖ probabilities", "PGD at {faint}"),
    )
    config.along_training = ()
    config.published = ()

    config.claims = ConfigDict(
        {
            "a": {
                "text": "EntM and LS, each alone, are more robust than CE at a small eps, and by "
                "two points at most under a strong attack at the eps that AT is trained on.",
                "tests": [
                    above("pgd@{faint}", "entm", "ce"),
                    above("pgd@{faint}", "ls", "ce"),
                    below("autoattack@{trained}", "entm", "ce", by=-0.02),
                    below("autoattack@{trained}", "ls", "ce", by=-0.02),
                ],
            },
            "b, clean": {
                "text": "With AT they beat AT on clean examples.",
                "tests": [
                    above("clean.accuracy", "at_entm", "at"),
                    above("clean.accuracy", "at_ls", "at"),
                ],
            },
            "b, attacks": {
                "text": "With AT they beat AT under attack.",
                "tests": [
                    above(measure, arm, "at")
                    for arm in ("at_entm", "at_ls")
                    for measure in ("autoattack@{trained}", "pgd@{larger}", "pgd@{largest}")
                ],
            },
            "b, larger eps": {
                "text": "They do so most of all at eps larger than trained on.",
                "tests": [
                    above(f"pgd@{{{eps}}} - pgd@{{trained}}", arm, "at")
                    for arm in ("at_entm", "at_ls")
                    for eps in ("larger", "largest")
                ],
            },
            **{
                f"c, {outputs}": {
                    "text": f"EntM shrinks the Jacobian of the {outputs}, in the Frobenius and in "
                    "the spectral norm.",
                    "tests": [
                        below(f"jacobian.{outputs}.{norm}.mean", arm, without)
                        for norm in ("frobenius", "spectral")
                        for arm, without in (("entm", "ce"), ("at_entm", "at"))
                    ],
                }
                for outputs in ("logits", "probabilities")
            },
        },
        sort_keys=False,
    )
    return config
