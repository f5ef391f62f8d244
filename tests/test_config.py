"""Bad input gets one line that names the field, the value and the choices."""

import dataclasses
import errno
import importlib
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import launch as launch_py
from configs import default
from robust_jax import losses
from robust_jax.app import config as config_lib
from robust_jax.app import entries, threat, training
from robust_jax.app.evaluator import Attempt, Settings
from robust_jax.app.experiment import build, check
from robust_jax.app.surrogate import SHARED, surrogate_config
from robust_jax.errors import UserError
from robust_jax.train.validate import NOT_TRACKED
from tests.conftest import REPOSITORY
from tests.linear import POINTWISE

CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))


def changed(**fields):
    """The default config with dotted fields set ("." written "__")."""
    config = default.get_config()
    with config.unlocked(), config.ignore_type():
        for path, value in fields.items():
            section, parts = config, path.split("__")
            for part in parts[:-1]:
                if part not in section:
                    section[part] = ConfigDict()
                section = section[part]
            if value is REMOVED:
                del section[parts[-1]]
            else:
                section[parts[-1]] = value
    return config


REMOVED = object()
MISTAKES = {
    "unknown field": ({"bacth_size": 8}, "config.bacth_size is not a field.*you mean batch_size"),
    "a seed that no key holds": ({"seed": 2**63}, f"it must be below {2**32 - 1}"),
    "missing field": ({"seed": REMOVED}, "config.seed is missing; the default is 0"),
    "unknown nested field": ({"augmentation__flp": True}, "augmentation.flp is not.*mean flip"),
    "field of another type": ({"seed": "one"}, "config.seed must be a whole number, not 'one'"),
    "flag for a number": ({"batch_size": True}, "config.batch_size must be a whole number"),
    "section for a field": ({"evaluation": 3}, "config.evaluation must be a section"),
    "unknown data set": ({"dataset": "minst"}, "'minst'; choices: digits, tfds:<name>, npz:<path>"),
    "unknown model": ({"model__name": "resnet"}, "config.model.name is 'resnet'.*preact_resnet"),
    "unknown model keyword": ({"model__wdths": (8,)}, "model.wdths is not a keyword of cnn.*wid"),
    "model keyword of a wrong type": ({"model__widths": "a"}, "config.model.widths must be"),
    "model keyword set elsewhere": ({"model__num_classes": 3}, "num_classes is not a keyword"),
    "model of no size": ({"model__hidden": 0}, "config.model: hidden=0 must be above 0"),
    "negative width": ({"model__widths": (-4, 4)}, r"config.model: widths=\(-4, 4\) must be above"),
    "impossible depth": ({"model": {"name": "wide_resnet", "depth": 29}}, "config.model: depth=29"),
    "unknown dtype": ({"dtype": "float16"}, "config.dtype is 'float16'; .*float32, bfloat16"),
    "unknown loss": ({"loss__name": "ce"}, "config.loss.name is 'ce'.*choices: cross_entropy"),
    "unknown loss keyword": ({"loss__smoothing": 0.1}, "config.loss.smoothing.*label_smoothing"),
    "loss out of range": ({"loss__label_smoothing": 1.5}, r"config.loss: .* in \[0, 1\), not 1.5"),
    "loss not an entry": ({"loss": "cross_entropy"}, 'config.loss must be an entry like {"name"'),
    "unknown half": ({"loss_on": "advers"}, "loss_on must be one of clean, adversarial, both"),
    "no adversary": ({"adversary": None}, "config: loss_on needs the adversarial half"),
    "unknown adversary": ({"adversary__name": "apgdx"}, "config.adversary.name is 'apgdx'"),
    "negative eps": ({"adversary__eps": -0.1}, "config.adversary: eps must not be negative"),
    "negative steps": ({"adversary__num_steps": -1}, "adversary: num_steps must be .* not -1"),
    "eps missing": ({"adversary__norm": "l2"}, "adversary.eps is missing: its norm is l2, and"),
    "eps of one of 255 levels": ({"threat__eps": 8.0}, "eps is 8; pixels are in .*255 levels are"),
    "eps of an attack too large": ({"attacks__pgd_l2__eps": (1.0, 9.0)}, "no two images are furth"),
    "eps of the audit too large": ({"audit__eps": "2/1"}, "config.audit.eps is 2; pixels are in"),
    "no eps of the audit": ({"audit__eps": None}, "config.audit.eps must be a number, not None"),
    "unknown norm of the audit": ({"audit__norm": "L2", "audit__eps": 0.5}, "audit.norm is 'L2'; "),
    "eps of a measurement too large": (
        {"measurements": {"energy": {"eps": 8.0}}},
        "energy.eps is 8; ",
    ),
    "eps of a regulariser too large": (
        {"regularizers__energy_mean_square": {"weight": 1.0, "eps": 8.0}},
        "energy_mean_square.eps is 8; pixels",
    ),
    "eps no fraction": ({"threat__eps": "8/255/2"}, "'8/255/2'; a radius is a number or a fracti"),
    "eps by zero": ({"threat__eps": "8/0"}, "'8/0'; a radius is a number or a fraction"),
    "unknown threat": ({"threat__norm": "l7"}, "config.threat.norm is 'l7'; .*choices: linf, l2"),
    "two step sizes": (
        {"adversary__step_size": 0.1, "adversary__relative_step_size": 1.0},
        "give either this or step_size",
    ),
    "step of an attack without": (
        {"attacks__fgsm_linf__relative_step_size": 1.0},
        "relative_step_size: fgsm takes no step_s",
    ),
    "step backwards": ({"adversary__relative_step_size": -1.0}, "step_size is -1.0; it must be ab"),
    "batch larger than the data": ({"batch_size": 1104}, "1104, and the training set holds 1100"),
    "unknown norm": ({"adversary__norm": "l3"}, "norm is 'l3'; choices: linf, l2, l1"),
    "unknown attack loss": ({"adversary__loss": "x"}, "config.adversary.loss is 'x'; choices:"),
    "unknown regulariser": ({"regularizers__entrpy": {"weight": 1.0}}, "entrpy.*entropy"),
    "no weight": ({"regularizers__entropy": ConfigDict()}, "entropy.weight is missing"),
    "weight not a number": ({"regularizers__entropy__weight": "1"}, "weight must be a number"),
    "regulariser keyword": ({"regularizers__vat": {"weight": 1.0}}, "vat.eps is missing"),
    "regulariser on nothing": (
        {"regularizers__entropy": {"weight": 1.0, "on": "x"}},
        "entropy.on must be one of clean",
    ),
    "pair on one half": (
        {"regularizers__kl": {"weight": 1.0, "on": "clean"}},
        "kl does not take 'on'; it looks at clean, adversarial",
    ),
    "infinite weight": ({"regularizers__kl": {"weight": float("nan")}}, "it must be finite"),
    "regulariser out of range": (
        {"regularizers__jacobian": {"weight": 1.0, "num_projections": 0}},
        "config.regularizers.jacobian: num_projections must be a whole number of at least 1",
    ),
    "margin of no scale": (
        {"regularizers__input_margin": {"weight": 1.0, "tau": 0.0}},
        "tau must be above 0, not 0",
    ),
    "energy of no sample": (
        {"regularizers__energy_mean_square": {"weight": 1.0, "eps": 0.1, "num_samples": 0}},
        "config.regularizers.energy_mean_square: num_samples must be a whole number",
    ),
    "attack without radii": ({"attacks__pgd_linf__eps": ()}, "attacks.pgd_linf.eps is empty"),
    "attack with negative radius": ({"attacks__pgd_linf__eps": (-1.0,)}, "eps must not be neg"),
    "its last radius infinite": ({"attacks__pgd_linf__eps": (0.1, np.inf)}, "eps must be finite"),
    "attack with a word for a radius": ({"attacks__pgd_linf__eps": (0.1, "x")}, "'x'; a radius is"),
    "name that is a list": ({"model__name": ["cnn"]}, "config.model.name is"),
    "measurement not an entry": ({"measurements__spectra": 3}, "spectra must be an entry like"),
    "measurement of no steps": (
        {"measurements__energy": {"num_steps": 0}},
        "measurements.energy: num_steps must be a whole number of at least 1, not 0",
    ),
    "measurement of a negative count": (
        {"measurements__outputs": {"num_examples": -5}},
        "measurements.outputs: num_examples must be a whole number",
    ),
    "measurement of a negative radius": (
        {"measurements__features": {"eps": -0.1}},
        "measurements.features: eps must not be negative",
    ),
    "attack not an entry": ({"attacks__pgd": "pgd"}, "config.attacks.pgd must be an entry"),
    "attack of no name": ({"attacks__pgd": {"name": {}, "eps": 0.1}}, "config.attacks.pgd.name is"),
    "epochs and steps": ({"duration": "2 epochs 5 steps"}, "one positive number with one unit"),
    "no unit": ({"duration": "20"}, "config.duration is '20'; give one positive number"),
    "negative duration": ({"validate_every": "-1 steps"}, "config.validate_every is '-1 steps'"),
    "zero duration": ({"log_every": "0 steps"}, "config.log_every is '0 steps'"),
    "batch that 8 devices cannot share": ({"batch_size": 12}, "batch_size: 12 .* by 8 device"),
    "empty batch": ({"batch_size": 0}, "take a multiple of 8"),
    "unknown optimiser": ({"optimizer__name": "sdg"}, "config.optimizer.name is 'sdg'.*mean sgd"),
    "unknown schedule": ({"schedule__name": "cos"}, "config.schedule.name is 'cos'"),
    "schedule out of range": ({"schedule__warmup": 2.0}, "schedule: warmup must be a fraction"),
    "learning rate": ({"learning_rate": 0.0}, "config.learning_rate is 0.0; it must be above 0"),
    "weight decay": ({"weight_decay": -1.0}, "config.weight_decay is -1.0; it must be at least 0"),
    "weight perturbation": ({"weight_perturbation": -0.1}, "perturbation is -0.1; it must be at"),
    "averaging": ({"ema_decay": 1.0}, r"config.ema_decay is 1.0; it must be in \[0, 1\)"),
    "labels": ({"num_labeled": 15}, "num_labeled is 15; it must be a multiple"),
    "projections": ({"evaluation__jacobian_projections": 1}, "jacobian_projections is 1.*least 2"),
    "mapping": ({"parallel": "xmap"}, "config.parallel is 'xmap'; .*choices: pmap, shard_map"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_told_in_one_line(case):
    fields, message = MISTAKES[case]
    config = changed(**fields)
    with pytest.raises(UserError, match=message) as error:
        check(config, default.get_config())
        build(config)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_batch_that_devices_cannot_share_matters_where_it_is_trained_on():
    config = changed(batch_size=12)
    check(config, default.get_config(), trains=False)
    with pytest.raises(UserError, match="12 examples cannot be shared by 8 device"):
        check(config, default.get_config())


def test_launch_tells_a_mistake_in_one_line_and_writes_nothing(launch, tmp_path):
    workdir = tmp_path / "run"
    result = launch("--config=configs/default.py", f"--workdir={workdir}", "--config.loss.name=ce")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: config.loss.name is 'ce'")
    assert "Traceback" not in result.stderr
    assert not workdir.exists()


def test_launch_tells_of_a_full_disk_in_one_line(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/demo/records/best.csv")

    class Ended(BaseException):
        """Raised in place of ending the process."""

    def ended(code):
        raise Ended(code)

    monkeypatch.setattr("launch.carry_out", full)
    monkeypatch.setattr("launch.logging", MagicMock())
    monkeypatch.setattr("launch.python_logging", MagicMock())
    monkeypatch.setattr("os._exit", ended)
    with pytest.raises(Ended, match="1"):
        launch_py.main(["launch.py"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: No space left on device: runs/demo/records/best.csv; what was")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_its_command_and_how_long_it_takes(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py --workdir=runs/" in doc
    assert re.search("minute|hour|accelerator", doc)


EFFECTS = {
    "seed": 1,
    "validation_size": 100,
    "train_size": 200,
    "num_labeled": 100,
    "augmentation.crop_padding": 1,
    "augmentation.flip": True,
    "normalize": False,
    "dtype": "bfloat16",
    "loss_on": "clean",
    "batch_size": 32,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "gradient_clip_norm": 0.01,
    "weight_perturbation": 0.1,
    "model.hidden": (9,),
    "loss.name": "boosted_cross_entropy",
    "adversary.eps": 0.3,
    "regularizers.entropy.weight": 1.0,
    "optimizer.name": "sgd",
    "schedule.name": "constant",
    "duration": "7 steps",
}


# The other fields are tested with clean training, which compiles faster.
ATTACKED = ("loss_on", "adversary.eps")


def two_steps(field=None, value=None, *, attacked=False):
    """The parameters after two steps of a tiny run whose config has one field changed."""
    config = default.get_config()
    config.model = {"name": "mlp", "hidden": (8,)}
    config.adversary.num_steps = 1
    config.batch_size = 64
    config.duration = "3 steps"
    config.optimizer = {"name": "sgd" if field == "gradient_clip_norm" else "adam"}
    config.attacks = ConfigDict()
    if not attacked:
        config.loss_on = "clean"
    if field is not None:
        with config.unlocked():
            *sections, last = field.split(".")
            part = config
            for section in sections:
                part = part[section]
            part[last] = value
    plan = build(config).plan
    state = plan.init()
    for step in range(2):
        state, _ = plan.train_step(state, plan.batches[step], plan.key)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


@pytest.fixture(scope="module")
def unchanged():
    return {
        "clean": two_steps(),
        "sgd": two_steps("optimizer.name", "sgd"),
        "attacked": two_steps(attacked=True),
    }


@pytest.mark.parametrize("field", EFFECTS)
def test_field_has_an_effect_on_training(field, unchanged):
    attacked = field in ATTACKED
    kind = "attacked" if attacked else "sgd" if field == "gradient_clip_norm" else "clean"
    before = unchanged[kind]
    after = two_steps(field, EFFECTS[field], attacked=attacked)
    assert all(np.isfinite(leaf).all() for leaf in after)
    same = [a.shape == b.shape and (a == b).all() for a, b in zip(before, after, strict=True)]
    assert not all(same)


def test_every_field_is_read(monkeypatch):
    """Each field, also of sections, is read to build the run and not just to check it."""
    read = set()
    plain = ConfigDict.__getitem__

    def getitem(self, key):
        read.add((id(self), key))
        return plain(self, key)

    config = threat.complete(changed(num_labeled=100))
    monkeypatch.setattr(threat, "complete", lambda config: config)  # else it would make a copy
    monkeypatch.setattr(ConfigDict, "__getitem__", getitem)
    monkeypatch.setattr(ConfigDict, "__getattr__", getitem)
    build(config)
    sections = {"": config, "augmentation.": plain(config, "augmentation")}
    unread = [
        prefix + field
        for prefix, section in sections.items()
        for field in section
        if (id(section), field) not in read
    ]
    assert unread == []
    # `evaluation` has the evaluator's fields, and two that choose its images and checkpoints.
    assert set(plain(config, "evaluation")) == {*Settings._fields, "num_examples", "last"}
    assert plain(config, "track_margins").to_dict() == NOT_TRACKED._asdict()


def test_an_attack_is_tried_out_once_unless_something_is_different(monkeypatch):
    attempts = []

    def attack(logits_fn, x, y, key, *, eps, norm="l2"):
        attempts.append((eps, norm))
        if eps < 0:
            raise ValueError("eps is negative")
        return x

    few, many = (SimpleNamespace(image_shape=(8, 8, 1), num_classes=n) for n in (3, 10))
    wide = SimpleNamespace(image_shape=(8, 9, 1), num_classes=3)
    bound = partial(attack, norm="linf")
    for one, dataset, eps in (
        *((attack, few, 0.1), (bound, few, 0.1), (attack, many, 0.1)),
        *((attack, wide, 0.1), (attack, few, 0.2)),
    ):
        before = len(attempts)
        training.try_attack("config.attacks.it", one, dataset, eps=eps)
        assert len(attempts) == before + 1
        again = partial(one.func, **one.keywords) if one is bound else one
        training.try_attack("config.attacks.it", again, dataset, eps=eps)
        assert len(attempts) == before + 1
    for _ in range(2):
        with pytest.raises(UserError, match="config.attacks.it: eps is negative"):
            training.try_attack("config.attacks.it", attack, few, eps=-0.1)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "default"])
def test_the_surrogate_is_an_undefended_cnn_of_the_same_recipe_whatever_the_run(name):
    """Every field has a value, and only those that describe the data and the machine vary."""
    config = importlib.import_module(f"configs.{name}").get_config()
    of_default, found = map(surrogate_config, (default.get_config(), config))
    entries.check(found, default.get_config())
    for field in set(found) - {*SHARED, "seed", "audit"}:
        assert found[field] == of_default[field], field
    for field in SHARED:
        assert found[field] == config[field], field
    assert found.seed == config.seed + 1 and found.audit.num_examples == 0


def test_what_has_no_norm_and_radius_of_its_own_follows_the_threat_model():
    attacks = {
        "pgd": {},
        "l2": {"name": "pgd", "norm": "l2", "eps": 0.5},
        "jsma": {"eps": 3},
    }
    found = threat.complete(
        changed(
            threat={"norm": "l1", "eps": "2/4"},
            attacks=ConfigDict(attacks),
            measurements=ConfigDict({"energy": {}, "margins": {}}),
            regularizers__vat={"weight": 1.0, "eps": 0.25},
        )
    )
    followers = (
        found.adversary,
        found.validation_attack,
        found.audit,
        found.attacks.pgd,
        found.measurements.energy,
        found.regularizers.energy_oscillation,
    )
    assert all((entry.norm, entry.eps) == ("l1", 0.5) for entry in followers)
    assert found.attacks.l2.to_dict() == attacks["l2"]
    assert found.attacks.jsma.to_dict() == attacks["jsma"]
    # Margins are measured in l2, as published, but regularised in the norm of the threat model.
    assert "norm" not in found.measurements.margins
    assert found.regularizers.input_margin.norm == "l1" and found.regularizers.vat.eps == 0.25
    assert threat.complete(found) == found
    # DeepFool takes two norms by name, and records.
    attacks = ConfigDict({"deepfool": {}})
    found = threat.complete(changed(threat={"norm": "l2", "eps": 0.5}, attacks=attacks))
    assert found.attacks.deepfool.to_dict() == {"norm": "l2", "eps": 0.5}


@pytest.mark.parametrize(
    "version, members",
    [("rand", None), ("standard", 4), (("square", "apgd_ce", "square"), 2)],
)
def test_autoattack_has_each_of_its_members_once(version, members):
    """A name given twice would take the images that it broke from the accuracy twice."""
    entry = ConfigDict({"name": "autoattack", "eps": 0.1, "version": version})
    if members is None:
        with pytest.raises(UserError, match="rand is for randomised networks"):
            entries.attack_grid("ensemble", entry)
    else:
        grid = entries.attack_grid("ensemble", entry)
        assert len(grid.members) == len(set(grid.members)) == members


def test_one_override_moves_all_that_follow():
    """The validation attack, the audit and AutoAttack, and a step in units of the radius."""
    built = build(changed(threat__eps="8/255", adversary__relative_step_size=0.25))
    assert built.audit.eps == 8 / 255
    assert built.grids["autoattack_linf"].eps == (8 / 255,)
    entry = threat.complete(changed(threat__eps=0.2, adversary__relative_step_size=0.25)).adversary
    assert entries.adversary(entry).attack.keywords["step_size"] == 0.05
    grid = entries.attack_grid("pgd", ConfigDict({"eps": (0.1, 0.4), "relative_step_size": 0.5}))
    assert grid.attack.relative == 0.5
    step = dataclasses.replace(grid.attack, attack=lambda *_, **keywords: keywords)
    assert step(eps=0.4) == {"eps": 0.4, "step_size": 0.2}


def test_an_adversary_of_another_radius_than_the_threat_models_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(training.logging, "warning", lambda text, *v: said.append(text % v))
    l2 = ConfigDict({"name": "pgd", "norm": "l2", "eps": 0.15, "num_steps": 2})
    for fields in (
        {"adversary__eps": 8 / 255},
        {"threat__eps": 8 / 255},
        {"adversary": l2},
        {"adversary": l2, "loss_on": "clean"},
        {"adversary": ConfigDict({"name": "jsma", "eps": 4})},
    ):
        build(changed(**fields, attacks=ConfigDict()))
    assert said == [
        f"config.adversary is at {own}, and config.threat at ℓ∞ ε = 0.15"
        for own in ("ℓ∞ ε = 8/255", "ℓ₂ ε = 0.15", "ℓ₀ ε = 4")
    ]


@pytest.mark.parametrize(
    "adversary",
    [{"name": "fgsm"}, {"name": "bim"}, {"name": "mim"}, {"name": "pgd", "random_start": False}],
)
def test_an_adversary_that_starts_where_the_kl_is_least_is_refused(adversary):
    config = changed(adversary=ConfigDict({**adversary, "loss": "kl"}))
    with pytest.raises(UserError, match="has no gradient at x, where this attack starts"):
        build(config)


def test_an_entry_is_named_by_its_label_unless_it_says_otherwise():
    attacks = {"pgd": {"eps": 0.1}, "twice": {"name": "pgd", "eps": (0.1,), "num_restarts": 2}}
    measured = {"outputs": {}, "outputs_train": {"name": "outputs", "split": "train"}}
    built = build(changed(attacks=ConfigDict(attacks), measurements=ConfigDict(measured)))
    assert {label: grid.kind for label, grid in built.grids.items()} == dict.fromkeys(
        attacks, "pgd"
    )
    assert built.measurements["outputs_train"].keywords == {"split": "train"}
    assert len({measure.func for measure in built.measurements.values()}) == 1


def test_names_in_a_config_are_found_with_their_keywords():
    loss = config_lib.bind(
        losses.LOSSES, ConfigDict({"name": "cross_entropy", "label_smoothing": 0.1}), "x"
    )
    assert loss.func is losses.cross_entropy
    assert loss.keywords == {"label_smoothing": 0.1}


def test_every_attack_can_be_evaluated_in_a_norm_of_its_own():
    """A name and a radius are enough; each attack is traced as the evaluation runs it."""
    attacks = {name: {"name": name, "eps": 1} for name in POINTWISE}
    grids = build(changed(attacks=ConfigDict(attacks))).grids
    batch = {"image": jnp.zeros((2, 4, 5, 1)), "label": jnp.zeros(2, int), "index": jnp.arange(2)}
    for name, grid in grids.items():
        assert grid.norm == {"jsma": "l0", "carlini_wagner": "l2"}.get(name, "linf")
        attempt = partial(Attempt(grid.attack, grid.norm, name), lambda x: x[:, 0, :3, 0])
        key_data = jax.random.key_data(jax.random.key(0))
        assert jax.eval_shape(attempt, batch, key_data, 4.0)["distance"].shape == (2,)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("500 steps", 500),
        ("1 step", 1),
        ("2 epochs", 16),
        ("0.5 epochs", 4),
        ("1e3 examples", 8),
        ("129 examples", 2),
        (" 3 epochs ", 24),
    ],
)
def test_durations_in_steps(duration, steps):
    assert config_lib.num_steps(duration, "x", batch_size=128, num_examples=1000) == steps


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_any_text_is_a_duration_or_a_one_line_error(text):
    try:
        assert config_lib.num_steps(text, "x", batch_size=8, num_examples=100) >= 1
    except UserError as error:
        assert "give one positive number" in str(error)


def test_differences_are_named():
    one, other = {"a": {"b": 1, "c": 2}, "d": 0}, {"a": {"b": 1, "c": 3}, "e": 0, "d": 0}
    assert config_lib.differences(one, other) == ["config.a.c: 2 → 3", "config.e: None → 0"]
    assert config_lib.differences(one, other, ignore=("a", "e")) == []
    assert config_lib.differences(one, other, ignore=("a.c",)) == ["config.e: None → 0"]


def test_config_modules_are_small_deltas():
    assert "default" in CONFIGS
    for name in CONFIGS:
        lines = Path(REPOSITORY / "configs" / f"{name}.py").read_text().splitlines()
        assert name == "default" or len(lines) < 70


@pytest.mark.parametrize(
    "path", sorted(Path(REPOSITORY / "configs").rglob("*.py")), ids=lambda path: path.stem
)
def test_configs_are_deltas_of_default_and_of_no_other(path):
    """A change of one network's recipe must not change another's."""
    imported = re.findall(r"^\s*(?:from|import) (configs\S*.*)$", path.read_text(), re.MULTILINE)
    allowed = {"configs import default"}
    for line in imported:
        in_studies = path.parent.name == "studies" and line.startswith("configs.studies.common ")
        assert line in allowed or in_studies, line


def test_a_config_file_may_give_the_radius_as_a_fraction():
    config = default.get_config()
    config.threat.eps = "8/255"
    assert threat.complete(config).adversary.eps == 8 / 255
