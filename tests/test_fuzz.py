"""Any config, npz file or setting of an attack gives a result, or a line that says what is wrong.

None gives a traceback from inside another library, or an adversarial outside its ball.
"""

import inspect
import io
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import default
from robust_jax import data
from robust_jax.app import entries
from robust_jax.app.experiment import Experiment, build
from robust_jax.errors import UserError
from tests.linear import ORDERS, POINTWISE, make_linear, sizes


def paths(config, prefix=""):
    """Every field and section, by its dotted name."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from paths(value, f"{prefix}{name}.")


SCHEMA = default.get_config()
# Reading data from elsewhere has tests of its own.
PATHS = sorted(set(paths(SCHEMA)) - {"data_dir"})
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 10**9, 0.0, 0.5, -0.1, 1e-30, 1e30, float("nan"), float("inf")]),
    st.integers(-10, 1000),
    st.floats(-2, 2),
)
WORDS = st.sampled_from(
    [
        "",
        "pgd",
        "linf",
        "l2",
        "apgd",
        "fab",
        "square",
        "autoattack",
        "cnn",
        "lenet5",
        "adam",
        "sgd",
        "constant",
        "cosine",
        "cross_entropy",
        "kl",
        "dlr",
        "both",
        "clean",
        "digits",
        "pmap",
        "bfloat16",
        "2 epochs",
        "0 steps",
        "-1 epochs",
        "3",
        "1e9 epochs",
        "nonsense",
        "é\n",
    ]
)
ENTRIES = st.dictionaries(
    st.sampled_from(["name", "eps", "norm", "num_steps", "weight", "loss", "widths", "on", "x"]),
    st.one_of(NUMBERS, WORDS, st.tuples(NUMBERS, NUMBERS)),
    max_size=4,
)
VALUES = st.one_of(
    NUMBERS,
    WORDS,
    st.booleans(),
    st.none(),
    st.just(()),
    st.tuples(NUMBERS),
    ENTRIES,
    st.tuples(NUMBERS, NUMBERS),
)


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
        entries.check(config, SCHEMA)
        assert isinstance(build(config), Experiment)
    except UserError as error:
        assert_one_line(error)


def assert_one_line(error):
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


IMAGES = st.tuples(
    st.sampled_from([(6, 5, 4, 1), (6, 5, 4), (6, 20), (0, 5, 4, 1), (6,), (6, 5, 4, 3), ()]),
    st.sampled_from(["uint8", "float32", "float64", "int64", "bool", "complex64", "U3", "object"]),
    st.sampled_from([0, 1, 255, 0.5, -1, 2, float("nan"), float("inf")]),
)
LABELS = st.tuples(
    st.sampled_from([6, 5, 0, (6, 1)]),
    st.sampled_from(["int32", "uint8", "float32", "U3", "object", "bool"]),
    st.lists(st.integers(-2, 12), min_size=1, max_size=6),
)


def images_of(shape, dtype, value):
    with np.errstate(all="ignore"):
        return np.full(shape, value).astype(dtype)


def labels_of(shape, dtype, values):
    with np.errstate(all="ignore"):
        return np.resize(values, shape).astype(dtype)


def a_data_set_or_one_line(path):
    try:
        dataset = data.load(f"npz:{path}", validation_size=2)
    except UserError as error:
        assert_one_line(error)
    else:
        for split in (dataset.train, dataset.validation, dataset.test):
            pixels = np.asarray(data.to_pixels(split.images))
            assert pixels.ndim == 4 and (pixels >= 0).all() and (pixels <= 1).all()
            assert (split.labels >= 0).all() and (split.labels < dataset.num_classes).all()


@settings(max_examples=200, derandomize=True, **common)
@given(
    images=st.tuples(IMAGES, IMAGES),
    labels=st.tuples(LABELS, LABELS),
    missing=st.sampled_from(["", "", "", "x_train", "y_test"]),
)
def test_any_arrays_in_an_npz_file_give_a_data_set_or_one_line(
    images, labels, missing, tmp_path_factory
):
    arrays = {
        "x_train": images_of(*images[0]),
        "y_train": labels_of(*labels[0]),
        "x_test": images_of(*images[1]),
        "y_test": labels_of(*labels[1]),
    }
    arrays.pop(missing, None)
    path = tmp_path_factory.mktemp("npz") / "arrays.npz"
    np.savez(path, **arrays)
    a_data_set_or_one_line(path)


@settings(max_examples=200, derandomize=True, **common)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    kept=st.floats(0, 1),
)
def test_any_bytes_of_an_npz_file_give_a_data_set_or_one_line(damage, kept, tmp_path_factory):
    file = io.BytesIO()
    labels = np.arange(12) % 3
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 1), dtype=np.uint8)
    np.savez_compressed(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    content = bytearray(file.getvalue())
    for at, byte in damage:
        content[int(at * (len(content) - 1))] = byte
    path = tmp_path_factory.mktemp("npz") / "bytes.npz"
    path.write_bytes(content if damage else content[: int(kept * len(content))])
    a_data_set_or_one_line(path)


LOGITS_FN, *_ = make_linear(jax.random.key(0))
X = jax.random.uniform(jax.random.key(1), (2, 4, 5, 1))
KEYWORDS = st.dictionaries(
    st.sampled_from(
        [
            "num_steps",
            "num_restarts",
            "num_queries",
            "num_targets",
            "step_size",
            "momentum",
            "p_init",
            "overshoot",
            "theta",
            "rho",
            "alpha",
            "learning_rate",
            "random_start",
        ]
    ),
    st.one_of(st.integers(-1, 5), st.sampled_from([0.0, 0.1, 1.0, -0.5, 1e30, float("nan"), "x"])),
    max_size=2,
)
RADII = st.sampled_from([0, 1e-7, 1 / 255, 0.1, 0.5, 1, 3.0, 40, -0.1, float("nan"), float("inf")])


def an_adversarial_or_one_line(name, norm, eps, keywords):
    attack = POINTWISE[name]
    known = inspect.signature(attack).parameters
    keywords = {k: v for k, v in keywords.items() if k in known}
    if norm != "its own":
        keywords["norm"] = norm
    elif name == "jsma":
        norm = "l0"
    else:
        norm = known["norm"].default
    y = jnp.argmax(LOGITS_FN(X), -1)
    try:
        x_adv = attack(LOGITS_FN, X, y, jax.random.key(2), eps=eps, **keywords)
    except (ValueError, TypeError) as error:
        # The library refuses it itself; nothing fails further in.
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert "robust_jax" in raised_in, f"{raised_in}: {error}"
        assert_one_line(error)
    else:
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        if norm == "l0":
            assert (np.asarray(x_adv != X).any(-1).sum((1, 2)) <= eps).all()
        else:
            assert norm in ORDERS
            assert (sizes(x_adv, X, norm) <= eps * (1 + 1e-6)).all()


attacked = given(
    name=st.sampled_from(sorted(POINTWISE)),
    norm=st.sampled_from(["linf", "l2", "l1", "its own", "l7"]),
    eps=RADII,
    keywords=KEYWORDS,
)


@settings(max_examples=25, derandomize=True, **common)
@attacked
def test_any_arguments_give_an_adversarial_in_its_ball_or_one_line(name, norm, eps, keywords):
    an_adversarial_or_one_line(name, norm, eps, keywords)


@pytest.mark.slow
@settings(max_examples=500, **common)
@attacked
def test_five_hundred_attacks(name, norm, eps, keywords):
    an_adversarial_or_one_line(name, norm, eps, keywords)
