"""A study of three arms and one claim, without attacks, that runs in seconds."""

from ml_collections import ConfigDict

from configs.studies import entm
from configs.studies.common import SMOKE, above
from robust_jax.app.studies import arms


def get_config() -> ConfigDict:
    config = entm.get_config()
    config.scale, config.scales = "only", {"only": {}}
    tiny = {
        **SMOKE,
        "model": {"name": "mlp", "hidden": (8,)},
        "duration": "2 steps",
        "evaluation": {**SMOKE["evaluation"], "num_examples": 30},
    }
    config.base = arms.changed(config.base, tiny)
    config.base.attacks = ConfigDict()
    entropy = {"regularizers": {"entropy": {"weight": 1.0}}}
    config.arms = ConfigDict({"at": {}, "entm": entropy, "other": {}}, sort_keys=False)
    config.labels = ConfigDict()
    margin = "measurements.outputs.mean_margin"
    config.measures = (("clean", "clean.accuracy"), ("mean margin", margin))
    config.pairs, config.published = (), ()
    tests = (above("clean.accuracy", "entm", "at"),)
    config.claims = {"a": {"text": "Better.", "tests": tests, "smallest_effect": 0.05}}
    return config
