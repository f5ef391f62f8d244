"""PGD adversarial training of a small CNN on scikit-learn's digits; holds every field of a config.

    python launch.py --config=configs/default.py --workdir=runs/demo

A minute and a half on 2 CPU cores with nothing compiled yet: 98 % clean, 63 % under AutoAttack at
linf 0.15.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field with its default; the other configs are small deltas of this one."""
    config = ConfigDict()
    config.seed = 0

    # Data. digits (embedded, no download) | tfds:<name> | npz:<path> with x_train, y_train, x_test
    # and y_test. Outside the model pixels are in [0,1], and every eps is in those units.
    config.dataset = "digits"
    config.data_dir = ""  # for TFDS; "" is its own default
    config.test_split = "test"  # for TFDS: the split that is measured
    config.image_size = 0  # for TFDS: the side images are scaled and cropped to; 0: as they are
    config.streaming = False  # for TFDS: read while training, by Grain; else held in memory
    config.validation_size = 197  # examples split off the training set, drawn by seed
    config.train_size = 0  # how many of the others are trained on, drawn by seed; 0: all
    config.num_labeled = 0  # 0: all. Else a class-balanced subset keeps its labels
    config.labeled_fraction = 0.5  # of each batch, if only num_labeled examples have labels
    config.augmentation = ConfigDict({"crop_padding": 0, "flip": False})  # on the device

    # Model: a name in robust_jax.models.MODELS and its keywords.
    config.model = ConfigDict({"name": "cnn"})
    config.normalize = True  # by the training pixels' mean and deviation, inside the model
    config.dtype = "float32"  # or "bfloat16", for the computation; parameters are float32

    # The threat model: one norm and one radius in pixel units (0.03 or "8/255"). The adversary,
    # validation_attack, the audit, attacks, regularisers and measurements use them unless they set
    # their own; margins are measured in l2 by default. In an attack, relative_step_size is its
    # step_size in units of its radius.
    config.threat = ConfigDict({"norm": "linf", "eps": 0.15}, type_safe=False)

    # Objective: a loss on the clean half of the batch, the adversarial half or both, plus weighted
    # regularisers. A name in robust_jax.losses.LOSSES and its keywords.
    config.loss = ConfigDict({"name": "cross_entropy"})
    config.loss_on = "adversarial"  # clean | adversarial | both
    # The attack that makes the adversarial half, once per step. May be None if nothing uses that
    # half. Its loss may also be "kl": away from the clean logits, as in TRADES.
    config.adversary = ConfigDict(
        {
            "name": "pgd",
            "num_steps": 10,
            "keep_best": False,
            "loss": "cross_entropy",
        }
    )
    # Terms of robust_jax.train.regularizers; weight 0 leaves one out. The key is a label, and also
    # the name unless "name" is given, so that a regulariser can be used twice. "on" is a half, by
    # default the one in loss_on; kl and weighted_kl compare the halves, and orthogonality is a term
    # of the weights.
    config.regularizers = ConfigDict(
        {
            "entropy": {"weight": 0.0},  # EntM
            "complement_entropy": {"weight": 0.0},  # COT
            "kl": {"weight": 0.0},  # TRADES
            "weighted_kl": {"weight": 0.0},  # MART
            "vat": {"weight": 0.0, "eps": 0.5, "num_iterations": 1},
            "jacobian": {"weight": 0.0, "num_projections": 1},
            "input_gradient": {"weight": 0.0},
            "output_margin_ramp": {"weight": 0.0, "tau": 5.0},  # average margin, with the next
            "orthogonality": {"weight": 0.0},
            "input_margin": {"weight": 0.0, "tau": 0.1},
            "energy_mean_square": {"weight": 0.0, "num_samples": 1, "label_free": False},
            "energy_oscillation": {"weight": 0.0, "num_steps": 10, "label_free": False},
            "energy_total_variation": {
                "weight": 0.0,
                "num_samples": 1,
                "squared": False,
                "label_free": False,
            },
            "energy_path": {"weight": 0.0, "num_steps": 10, "num_pieces": 4, "label_free": False},
        }
    )

    # Optimisation. Durations are "20 epochs", "500 steps" or "1e6 examples".
    config.batch_size = 128  # over all devices
    # Splits each device's share of the batch into this many pieces, for one that does not fit in
    # memory. Slower; the same gradient, except that BatchNorm sees one piece at a time.
    config.batch_parts = 1
    config.duration = "40 epochs"
    config.optimizer = ConfigDict({"name": "adam"})  # sgd | adam | adamw and their keywords
    config.learning_rate = 3e-3  # the schedule's peak
    config.schedule = ConfigDict({"name": "cosine"})  # constant | piecewise | cosine | one_cycle
    config.weight_decay = 1e-4  # of kernels only
    config.ema_decay = 0.0  # 0: none. Else the averaged parameters are what is evaluated
    config.gradient_clip_norm = 0.0  # 0: none
    config.weight_perturbation = 0.0  # 0: none. Else AWP's γ, a share of each kernel's norm

    # Along the way. The best checkpoint is that of the highest accuracy under validation_attack.
    config.log_every = "10 steps"
    config.validate_every = "2 epochs"
    config.checkpoint_every = "10 epochs"  # and after each new best one
    config.validation_attack = ConfigDict({"name": "pgd"})
    # Also logs l2 margins of this many training examples, by each estimate, starting before the
    # first step. first_order: minimum_margin, average_margin, margin_q10, margin_q50 and
    # margin_q90, from the label, and the same for distance, from the predicted class and unsigned.
    # minimum_norm: …_margin_attack, by FAB, about 10·num_steps gradients per example. clever:
    # …_distance_clever, at most 5, num_samples gradients of each class per example.
    config.track_margins = ConfigDict(
        {"first_order": 0, "minimum_norm": 0, "clever": 0, "num_steps": 100, "num_samples": 1024}
    )

    # Attacks on the best and the last checkpoint (see evaluation.last). The key labels the attack
    # in tables; "name", by default the key, is one of robust_jax.attacks.ATTACKS; eps lists the
    # radii in pixel units; loss is one of robust_jax.losses.ATTACK_LOSSES. num_examples: how many
    # of the first are attacked (0, the default: all). surrogate: whose adversarials they are, the
    # folder of a finished run, or "train" for the audit's undefended CNN.
    config.attacks = attack_grid(
        linf=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
        l2=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        autoattack=("linf",),
    )
    config.evaluation = ConfigDict(
        {
            "num_examples": 0,  # how many of the first test examples; 0: all
            "last": True,  # attack the last checkpoint too, not only the best
            "batch_size": 500,
            "jacobian_chunk": 128,  # examples whose exact Jacobians a device holds at a time
            "jacobian_projections": 16,  # of the estimated Frobenius norm
            "spectral_iterations": 20,  # of the power iteration
            "num_images": 10,  # in the report's grid
        }
    )

    # What else is measured: names in robust_jax.app.measurements, each with its keywords, as in
    # {"clusters": {"num_examples": 1000}, "spectra": {}}. "at" is the checkpoint, best (the
    # default), last or initialisation.
    config.measurements = ConfigDict()

    # Is the robustness real? The checks of robust_jax.audit on the best checkpoint. "norm" and
    # "eps" override config.threat.
    config.audit = ConfigDict(
        {
            "num_examples": 200,  # the first of the test set; 0: no audit
            "num_queries": 1000,  # of random search
            # Whose adversarials are tried: "train" for an undefended CNN that is trained here, the
            # folder of a finished run on the same data, or "" for none.
            "surrogate": "train",
        }
    )

    config.parallel = "pmap"  # or its successor, shard_map
    return config


def attack_grid(
    linf: tuple[float, ...] = (),
    l2: tuple[float, ...] = (),
    *,
    autoattack: tuple[str, ...] = (),
    num_examples: int = 0,
) -> ConfigDict:
    """FGSM, BIM, MIM and PGD with restarts in each norm, at the radii given for it.

    autoattack: the norms in which it runs, at the threat model's radius, on the first num_examples
    (0: all).
    """
    grid = {
        f"{name}_{norm}": {"name": name, "norm": norm, "eps": eps, **keywords}
        for norm, eps in (("linf", linf), ("l2", l2))
        if eps
        for name, keywords in (
            ("fgsm", {}),
            ("bim", {"num_steps": 10}),
            ("mim", {"num_steps": 10}),
            ("pgd", {"num_steps": 20, "num_restarts": 3}),
        )
    }
    for norm in autoattack:
        entry = {"name": "autoattack", "norm": norm, "num_examples": num_examples}
        grid[f"autoattack_{norm}"] = entry
    return ConfigDict(grid)


def cifar10_linf(config: ConfigDict) -> None:
    """Sets CIFAR-10 as a config's data, and linf 8/255 for its training, attacks and audit."""
    config.dataset = "tfds:cifar10"
    config.validation_size = 1000
    config.augmentation = {"crop_padding": 4, "flip": True}
    config.log_every = "50 steps"
    config.validate_every = "1 epoch"
    config.checkpoint_every = "1 epoch"

    config.threat.eps = 8 / 255
    config.attacks = attack_grid(
        linf=(2 / 255, 4 / 255, 8 / 255, 12 / 255), l2=(0.25, 0.5, 1.0), autoattack=("linf",)
    )
