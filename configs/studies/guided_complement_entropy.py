"""Guided complement entropy (Chen et al. ICCV 2019, arXiv 1903.09799) on MNIST, LeNet-5.

    python launch.py --config=configs/studies/guided_complement_entropy.py --workdir=runs/gce \
        --config.scale=small

The authors' table at eps 0.2 arm for arm, attacked with cross-entropy and with the training loss,
and AutoAttack, which nobody has published. smoke: digits, seconds. small: the authors' 20 epochs
(adversarial arms: 3, of twice the batch), 3 seeds, 100 minutes of a CPU core. full: 20 epochs of
every arm, 5 seeds, the whole test set.
"""

from ml_collections import ConfigDict

from configs import default
from configs.studies.common import QUICK, SMOKE, above, below

GCE = {"name": "guided_complement_entropy", "alpha": 1 / 3}


def get_config():
    config = ConfigDict()
    config.title = "Guided complement entropy"
    config.paper = "Chen et al. ICCV 2019, arXiv 1903.09799"
    config.question = (
        "Does a loss that flattens the wrong classes make LeNet-5 robust on MNIST without "
        "adversarial training, and does what it gains survive AutoAttack?"
    )
    config.notes = (
        "The published attacks follow the loss that a network was trained with, GCE's on GCE: "
        "its numbers stand in the columns of attacks on that loss. Published: the paper's table "
        "at eps 0.2, in percent.",
    )
    config.scale = "small"
    config.seeds = (0, 1, 2)

    base = default.get_config()
    base.dataset = "tfds:mnist"
    base.validation_size = 1000
    base.model = {"name": "lenet5"}
    base.normalize = False  # the authors' inputs are in [0,1]
    base.loss_on = "clean"
    base.threat.eps = 0.2
    base.optimizer = {"name": "adam", "b2": 0.99}
    base.learning_rate = 1e-3
    base.schedule = {"name": "constant"}
    base.weight_decay = 0.0
    base.batch_size = 64
    base.duration = "20 epochs"
    base.log_every = "100 steps"
    base.validate_every = "1 epoch"
    base.checkpoint_every = "1 epoch"
    base.validation_attack = {"name": "fgsm", "eps": 0.0}  # best by clean accuracy, as published
    base.evaluation.num_examples = 1000
    base.audit.update({"num_examples": 100, "num_queries": 500})
    base.attacks = attacks(eps=0.2, num_examples=200)
    base.measurements = {"clusters": {"num_examples": 1000}}
    config.base = base

    # On adversarials alone cross-entropy leaves the uniform guess only after several epochs.
    adversarial = {
        "loss_on": "both",
        "batch_size": 128,
        "duration": "3 epochs",
        "learning_rate": 2e-3,
    }
    config.arms = ConfigDict(
        {
            "ce": {"loss": {"name": "cross_entropy"}},
            "cot": {
                "loss": {"name": "cross_entropy"},
                "regularizers": {"complement_entropy": {"weight": 0.1}},
            },
            "gce": {"loss": GCE},
            "at": {"loss": {"name": "cross_entropy"}, **adversarial},
            "gce_at": {"loss": GCE, **adversarial},
        },
        sort_keys=False,
    )
    config.scales = {
        "smoke": {
            "seeds": (0, 1),
            "base": {
                **SMOKE,
                "attacks": attacks(eps=0.2, num_examples=20, smoke=True),
            },
            "arms": {arm: {"duration": "2 epochs"} for arm in ("at", "gce_at")},
        },
        "small": {},
        "full": {
            "seeds": (0, 1, 2, 3, 4),
            "base": {
                "evaluation": {"num_examples": 0},
                "audit": {"num_examples": 500},
                "attacks": attacks(eps=0.2, num_examples=1000),
            },
            "arms": {arm: {"duration": "20 epochs"} for arm in ("at", "gce_at")},
        },
    }
    config.measures = (
        ("clean", "clean.accuracy"),
        ("FGSM", "fgsm@0.2"),
        ("MIM", "mim@0.2"),
        ("PGD", "pgd@0.2"),
        ("FGSM on GCE", "fgsm_gce@0.2"),
        ("MIM on GCE", "mim_gce@0.2"),
        ("PGD on GCE", "pgd_gce@0.2"),
        ("AutoAttack", "autoattack@0.2"),
        ("silhouette", "measurements.clusters.silhouette"),
        ("intra/inter", "measurements.clusters.distance_ratio"),
    )
    config.pairs = (("silhouette", "FGSM"), ("silhouette", "AutoAttack"))
    config.along_training = ()
    config.published = (
        ("ce", {"FGSM": 38.88, "MIM": 2.29, "PGD": 1.58}),
        ("gce", {"FGSM on GCE": 62.74, "MIM on GCE": 39.81, "PGD on GCE": 9.55}),
    )

    config.claims = ConfigDict(
        {
            "a": {
                "text": "GCE is more robust than cross-entropy under FGSM, MIM and PGD at eps 0.2, "
                "whichever of the two losses they follow.",
                "tests": [
                    above(f"{attack}{loss}@0.2", "gce", "ce")
                    for loss in ("", "_gce")
                    for attack in ("fgsm", "mim", "pgd")
                ],
            },
            "b": {
                "text": "Its latent classes form tighter, better separated clusters.",
                "tests": [
                    above("measurements.clusters.silhouette", "gce", "ce"),
                    below("measurements.clusters.distance_ratio", "gce", "ce"),
                ],
            },
            "c": {
                "text": "Its clean accuracy is not below cross-entropy's (by half a point at "
                "most).",
                "tests": [above("clean.accuracy", "gce", "ce", by=-0.005)],
            },
            "d": {
                "text": "The gain survives AutoAttack: GCE keeps more than 5 % at eps 0.2.",
                "tests": [above("autoattack@0.2", "gce", level=0.05)],
            },
            "e": {
                "text": "In adversarial training it beats cross-entropy under AutoAttack.",
                "tests": [above("autoattack@0.2", "gce_at", "at")],
            },
        },
        sort_keys=False,
    )
    return config


def attacks(eps, num_examples, smoke=False):
    """The authors' attacks, with either loss, and AutoAttack on the first num_examples."""
    steps = {"num_steps": 4} if smoke else {"num_steps": 40, "step_size": 0.01}
    gce = {"eps": eps, "loss": "guided_complement_entropy"}
    return {
        "fgsm": {"name": "fgsm", "eps": eps},
        "mim": {"name": "mim", "eps": eps, **steps},
        "pgd": {"name": "pgd", "eps": (eps / 2, eps, 1.5 * eps), **steps},
        "fgsm_gce": {"name": "fgsm", **gce},
        "mim_gce": {"name": "mim", **gce, **steps},
        "pgd_gce": {"name": "pgd", **gce, **steps},
        "autoattack": {
            "name": "autoattack",
            "eps": eps,
            "num_examples": num_examples,
            **(QUICK if smoke else {}),
        },
    }
