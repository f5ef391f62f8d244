"""Whatever is put into a config field: an experiment or one line that says what is wrong."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import default
from robust_jax.errors import UserError
from robust_jax.experiment import Experiment, build


def paths(config, prefix=""):
    """Every field and section, by its dotted name."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from paths(value, f"{prefix}{name}.")


SCHEMA = default.get_config()
# What of the data is read from elsewhere has tests of its own.
PATHS = sorted(set(paths(SCHEMA)) - {"data_dir"})
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 10**9, 0.0, 0.5, -0.1, 1e-30, 1e30, float("nan"), float("inf")]),
    st.integers(-10, 1000),
    st.floats(-2, 2),
)
WORDS = st.sampled_from(
    ["", "pgd", "linf", "l2", "apgd", "fab", "square", "autoattack", "cnn", "lenet5", "adam", "sgd",
     "constant", "cosine", "cross_entropy", "kl", "dlr", "both", "clean", "digits", "pmap",
     "bfloat16", "2 epochs", "0 steps", "-1 epochs", "3", "1e9 epochs", "nonsense", "é\n"]
)  # fmt: skip
ENTRIES = st.dictionaries(
    st.sampled_from(["name", "eps", "norm", "num_steps", "weight", "loss", "widths", "on", "x"]),
    st.one_of(NUMBERS, WORDS, st.tuples(NUMBERS, NUMBERS)),
    max_size=4,
)
VALUES = st.one_of(
    NUMBERS, WORDS, st.booleans(), st.none(), st.just(()), st.tuples(NUMBERS), ENTRIES,
    st.tuples(NUMBERS, NUMBERS),
)  # fmt: skip


def an_experiment_or_one_line(overrides):
    config = default.get_config()
    for path, value in overrides.items():
        *sections, field = path.split(".")
        section = config
        for name in sections:
            section = section.get(name) if isinstance(section, ConfigDict) else None
        if isinstance(section, ConfigDict):
            section.unlock()
            with section.ignore_type():
                section[field] = ConfigDict(value) if isinstance(value, dict) else value
    try:
        assert isinstance(build(config, SCHEMA), Experiment)
    except UserError as error:
        text = str(error)
        assert text and "\n" not in text and "Traceback" not in text
        assert not re.search(r"0x[0-9a-f]{6}|jax\._src|<function", text), text


overridden = given(st.dictionaries(st.sampled_from(PATHS), VALUES, min_size=1, max_size=3))
common = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=50, derandomize=True, **common)
@overridden
def test_any_override_gives_an_experiment_or_one_line(overrides):
    an_experiment_or_one_line(overrides)


@pytest.mark.slow
@settings(max_examples=500, **common)
@overridden
def test_five_hundred_overrides(overrides):
    an_experiment_or_one_line(overrides)
