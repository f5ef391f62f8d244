"""Every config in configs/ composes on a small network and images, and steps or is traced."""

import importlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from robust_jax import data
from robust_jax._network import comparable
from robust_jax.app import entries, training
from robust_jax.app.experiment import build
from robust_jax.attacks import square
from robust_jax.models import num_parameters
from tests.conftest import REPOSITORY

CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
# The others are only traced: they are like these, or test_objectives.py runs their terms.
STEPPED = {
    "cifar10_cnn_average_margin",
    "default",
    "digits_cnn_awp",
    "digits_cnn_gce_published",
    "digits_cnn_l2_one_step_at",
    "digits_cnn_trades",
}
# Fields that make a network of the same class small.
SMALL = {
    "cnn": {"widths": (4,), "hidden": 8},
    "small_cnn": {"widths": (4, 4), "hidden": (8, 8)},
    "preact_resnet": {"width": 1 / 16},
    "resnet50": {"width": 1 / 16},
    "wide_resnet": {"depth": 10, "width": 1},
}


@pytest.fixture(scope="module")
def npz_files(tmp_path_factory):
    """Random images of 10 classes in the shapes of the data sets that the configs name."""
    folder = tmp_path_factory.mktemp("npz")
    rng = np.random.default_rng(0)
    shapes = {
        "tfds:mnist": (28, 28, 1),
        "tfds:fashion_mnist": (28, 28, 1),
        "tfds:cifar10": (32, 32, 3),
        "tfds:imagenet2012": (64, 64, 3),
    }
    files = {}
    for name, shape in shapes.items():
        path = folder / f"{name.removeprefix('tfds:')}.npz"
        arrays = {
            f"x_{s}": rng.integers(0, 256, (40, *shape), dtype=np.uint8) for s in ("train", "test")
        }
        np.savez(path, **arrays, y_train=np.arange(40) % 10, y_test=np.arange(40) % 10)
        files[name] = f"npz:{path}"
    return files


@pytest.fixture(scope="module")
def attacks_tried_once():
    """Skips other radii and, but for Square's windows, other images, since tracing takes time."""
    tried, plain = set(), training.try_attack

    def try_attack(path, attack, dataset, reference=None, **keywords):
        every = attack.keywords | keywords
        shape = dataset.image_shape if attack.func is square else None
        kept = comparable({name: value for name, value in every.items() if name != "eps"})
        this = (attack.func, kept, shape, reference is None)
        if this not in tried:
            plain(path, attack, dataset, reference, **keywords)
            tried.add(this)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "try_attack", try_attack)
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_config_takes_two_steps_or_is_traced(name, npz_files, attacks_tried_once):
    config = importlib.import_module(f"configs.{name}").get_config()
    if config.dataset != "digits":
        config.dataset = npz_files[config.dataset]
        config.validation_size = 8
        config.streaming, config.image_size, config.test_split = False, 0, "test"
    config.batch_size = 16
    config.duration = "2 steps"
    config.model.update(SMALL.get(config.model.name, {}))
    if config.adversary is not None:
        config.adversary.num_steps = min(config.adversary.num_steps, 2)
    entries.check(config, default.get_config())
    if name != "default" and config.attacks == default.get_config().attacks:
        config.attacks = ConfigDict()  # already tried out with the default
    plan = build(config).plan
    assert plan.total_steps == 2
    if name not in STEPPED:
        _, sums = jax.eval_shape(lambda: plan.train_step(plan.init(), plan.batches[0], plan.key))
        assert sums["loss"][0].shape == ()
        return
    state = plan.init()
    before = jax.device_get(state.params)
    for step in range(2):
        state, sums = plan.train_step(state, plan.batches[step], plan.key)
    assert int(state.step) == 2
    assert np.isfinite(sums["loss"][0])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, before, jax.device_get(state.params))
    assert all(jax.tree.leaves(moved))


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    config = default.get_config()
    config.model = {"name": "wide_resnet", "depth": 10, "width": 1}
    config.dtype = "bfloat16"
    config.adversary.num_steps = 1
    config.batch_size = 16
    config.ema_decay = 0.9
    config.gradient_clip_norm = 1.0
    config.attacks = ConfigDict()
    plan = build(config).plan
    state, _ = jax.eval_shape(lambda: plan.train_step(plan.init(), plan.batches[0], plan.key))
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype != np.int32]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}
    config.model = {"name": "mlp", "hidden": (8,)}
    plan = build(config).plan
    _, sums = plan.train_step(plan.init(), plan.batches[0], plan.key)
    assert np.isfinite(sums["loss"][0])


def test_the_step_is_compiled_once():
    """The second call and all later ones find the program of the first."""
    config = default.get_config()
    config.model.update(SMALL["cnn"])
    config.adversary.num_steps = 1
    config.batch_size = 16
    config.attacks = ConfigDict()
    plan = build(config).plan
    state, _ = plan.train_step(plan.init(), plan.batches[0], plan.key)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    try:
        for step in (1, 2):
            state, _ = plan.train_step(state, plan.batches[step], plan.key)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled


@pytest.mark.slow
def test_the_imagenet_step_compiles_for_eight_devices_without_data(monkeypatch):
    """At its real size: ResNet-50, 512 images of 224x224, bfloat16."""
    images = np.broadcast_to(np.uint8(0), (2000, 224, 224, 3))
    split = data.Split(images, np.arange(2000, dtype=np.int32) % 1000)
    dataset = data.Dataset("imagenet", split, split, split, 1000, (0.5,) * 3, (0.2,) * 3)
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    config = importlib.import_module("configs.imagenet_resnet50_at").get_config()
    plan = build(config).plan
    assert jax.device_count() == 8
    state = jax.eval_shape(plan.init)
    assert num_parameters(state.params) == 25_557_032  # as in torchvision
    batch = {
        "image": jax.ShapeDtypeStruct((512, 224, 224, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((512,), np.int32),
        "position": jax.ShapeDtypeStruct((512,), np.int32),
    }
    compiled = jax.jit(plan.train_step).lower(state, batch, plan.key).compile()
    reduced = compiled.as_text().count("all-reduce")
    assert reduced  # the gradient, and BatchNorm's statistics
