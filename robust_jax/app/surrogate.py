"""The network that an audit transfers adversarials from: another run's, or one trained for it."""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from robust_jax.app import folder
from robust_jax.app.experiment import Experiment, build
from robust_jax.app.folder import Mode
from robust_jax.app.subject import load, subject_of
from robust_jax.devices import processes
from robust_jax.train.loop import train
from robust_jax.types import LogitsFn


def networks(experiment: Experiment, workdir: Path, schema: ConfigDict) -> dict[str, LogitsFn]:
    """The networks whose adversarials the audit tries, by name."""
    chosen = experiment.config.audit.surrogate
    if not chosen:
        return {}
    if chosen != "train":
        return {chosen: load(chosen).logits_fn}
    # A run of its own, of which a notebook may load the network.
    config = surrogate_config(experiment.config, schema)
    other, there = build(config, schema), workdir / "surrogate"
    mode: Mode = "evaluate" if (there / "config.json").exists() else "train"
    processes.on_first(partial(folder.claim, there, config, mode))
    return {"an undefended CNN": subject_of(other, train(other.plan, there)).logits_fn}


def surrogate_config(config: ConfigDict, schema: ConfigDict) -> ConfigDict:
    """The config of an undefended CNN for the same data, for attacks to be transferred from."""
    other = schema.copy_and_resolve_references()
    for field in ("dataset", "data_dir", "test_split", "image_size", "streaming",
                  "validation_size", "normalize", "parallel", "batch_size"):  # fmt: skip
        other[field] = config[field]
    other.seed = config.seed + 1
    other.loss_on, other.adversary = "clean", None
    other.regularizers, other.attacks = ConfigDict(), ConfigDict()
    other.audit.num_examples = 0
    other.duration = "400 steps"
    for field in ("log_every", "validate_every", "checkpoint_every"):
        other[field] = "100 steps"
    other.validation_attack = ConfigDict({"name": "fgsm", "eps": 0.0})
    return other
