"""Folders know what they hold and whose they are; launch.py finds the config in them."""

import errno
import importlib
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

from configs import default
from robust_jax.app import command_line, folder, stored, training
from robust_jax.app import config as config_lib
from robust_jax.app.results import commit, versions
from robust_jax.app.run import execute
from robust_jax.app.studies import study
from robust_jax.app.subject import load
from robust_jax.errors import UserError
from tests.conftest import REPOSITORY


def a_run(workdir):
    folder.claim(workdir, default.get_config(), "train")


def a_study(workdir):
    folder.claim_study(workdir, settled(), "train")


def an_evaluation(workdir):
    workdir.mkdir()
    stored.write_results(workdir, {"attacks": []})


def other_files(workdir):
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("years of work")


def an_older_study(workdir):
    workdir.mkdir()
    stored.write_results(workdir, {"claims": {}})


def settled():
    return study.settled(importlib.import_module("configs.studies.entm").get_config())


@pytest.mark.parametrize("other", [a_study, an_evaluation, other_files, an_older_study])
def test_a_run_is_not_started_where_something_else_is(other, tmp_path):
    other(tmp_path / "here")
    before = {path: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    with pytest.raises(UserError, match="here holds (a study|an evaluation|other files) and no ru"):
        folder.claim(tmp_path / "here", default.get_config(), "train")
    assert {path: path.read_bytes() for path in (tmp_path / "here").iterdir()} == before


@pytest.mark.parametrize("other", [a_run, an_evaluation, other_files])
def test_a_study_is_not_started_where_something_else_is(other, tmp_path):
    other(tmp_path / "here")
    before = {path: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    with pytest.raises(UserError, match="here holds (a run|an evaluation|other files) and no stud"):
        study.execute(settled(), tmp_path / "here")
    assert {path: path.read_bytes() for path in (tmp_path / "here").iterdir()} == before


def test_a_study_goes_on_in_its_own_folder_whoever_made_it(tmp_path):
    a_study(tmp_path / "one")
    a_study(tmp_path / "one")
    an_older_study(tmp_path / "two")
    a_study(tmp_path / "two")
    a_run(tmp_path / "three" / "ce" / "0")  # as left by a version before study.json
    a_study(tmp_path / "three")
    (tmp_path / "begun").mkdir()  # another process is about to name its first file
    (tmp_path / "begun" / "study.json.1.pending").touch()
    a_study(tmp_path / "begun")
    with pytest.raises(UserError, match="four holds no study; --mode=report needs a finished one"):
        folder.claim_study(tmp_path / "four", settled(), "report")


@pytest.mark.parametrize("mode", ["evaluate", "measure", "report", "audit", "verify"])
def test_modes_need_a_finished_run(mode, tmp_path):
    config = default.get_config()
    config.attacks = ConfigDict()  # else they would be tried out first
    with pytest.raises(UserError, match="holds no run"):
        execute(config, tmp_path / "none", mode)
    assert not (tmp_path / "none").exists()


def test_another_config_is_refused_with_every_field_that_differs(tmp_path):
    a_run(tmp_path)
    config = default.get_config()
    config.update({"seed": 7, "batch_size": 64, "learning_rate": 0.1, "duration": "1 epoch"})
    config.model.widths = (4, 4)
    with pytest.raises(UserError, match="holds a run of another config") as error:
        folder.claim(tmp_path, config, "train")
    for field in (
        "seed: 0 → 7",
        "batch_size: 128 → 64",
        "learning_rate",
        "duration",
        r"model.widths: None → \[4, 4\]",
    ):
        assert re.search(f"config.{field}", str(error.value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint_every", "7 steps"),
        ("data_dir", "elsewhere"),
        ("parallel", "shard_map"),
        ("evaluation.batch_size", 50),
        ("evaluation.jacobian_chunk", 16),
    ],
)
def test_a_run_goes_on_with_other_settings_that_no_number_depends_on(field, value, tmp_path):
    a_run(tmp_path)
    config = default.get_config()
    config_lib.set_field(config, field, value)
    folder.claim(tmp_path, config, "train")  # on another machine, or with less memory
    config.evaluation.jacobian_projections = 3
    with pytest.raises(UserError, match=r"another config \(config.evaluation.jacobian_proj[^;]*\)"):
        folder.claim(tmp_path, config, "train")


def test_a_finished_run_says_that_other_attacks_are_evaluated_and_not_trained(tmp_path):
    a_run(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    config = default.get_config()
    config.attacks.pgd_linf.num_steps = 7
    with pytest.raises(UserError, match="is finished, .*num_steps: 20 → 7.*--mode=evaluate"):
        folder.claim(tmp_path, config, "train")


@pytest.mark.parametrize(
    ("mode", "used", "ignored"),
    [
        ("audit", {"audit.num_queries": 5}, {"threat.eps": 0.3}),
        ("measure", {"measurements": {"outputs": {}}}, {"attacks.pgd_linf.eps": (0.9,)}),
        ("report", {"data_dir": "x", "seed": 0}, {"evaluation.num_images": 3}),
        ("verify", {"parallel": "shard_map"}, {"audit.num_examples": 3}),
        ("evaluate", {"threat.eps": 0.3, "attacks": {}}, {}),
    ],
)
def test_what_is_typed_for_a_finished_run_is_used_or_refused(mode, used, ignored, tmp_path):
    a_run(tmp_path)
    for fields in (used, ignored):
        config = default.get_config()
        for path, value in fields.items():
            config_lib.set_field(config, path, value)
        if fields is used:
            folder.check_heeded(tmp_path, config, fields, mode)
    for path in ignored:
        with pytest.raises(
            UserError, match=f"--mode={mode} ignores config.{path}; use --mode=evaluate"
        ):
            folder.check_heeded(tmp_path, config, ignored, mode)


@pytest.mark.parametrize("mode", ["measure", "audit"])
def test_a_config_file_of_another_threat_model_is_refused_where_it_would_be_ignored(mode, tmp_path):
    a_run(tmp_path)
    config = default.get_config()
    folder.check_heeded(tmp_path, config, (), mode)
    config.threat.eps = 0.3
    for other in ("report", "verify", "evaluate"):
        folder.check_heeded(tmp_path, config, (), other)
    with pytest.raises(UserError, match=f"--mode={mode} ignores config.threat; use --mode=eval"):
        folder.check_heeded(tmp_path, config, (), mode)


@pytest.mark.parametrize("at", ["the records", "the measurements"])
def test_a_full_disk_leaves_the_earlier_evaluation(at, tmp_path, monkeypatch):
    for name in ("results.json", "card.json", "examples.npz"):
        (tmp_path / name).write_text("old")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "best.csv").write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    where = (pd.DataFrame, "to_csv") if at == "the records" else (np, "savez_compressed")
    monkeypatch.setattr(*where, full)
    arrays = {"a/b": np.zeros(3)}
    with pytest.raises(OSError, match="No space"):
        folder.write_evaluation(tmp_path, {}, {"best": pd.DataFrame()}, arrays, arrays)
    kept = [path for path in tmp_path.rglob("*.*") if path.suffix != ".pending"]
    assert len(kept) == 4 and {path.read_text() for path in kept} == {"old"}


def test_what_is_unfinished_is_found_again_by_all_that_a_number_depends_on(tmp_path):
    config = default.get_config()
    here = folder.unfinished(tmp_path, config, "best", 3)
    config.evaluation.batch_size, config.data_dir, config.audit.num_examples = 7, "x", 0
    assert folder.unfinished(tmp_path, config, "best", 3) == here
    config.attacks.pgd_linf.num_steps = 7
    assert folder.unfinished(tmp_path, config, "best", 3) != here


def test_a_config_of_something_else_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="holds other files and no run"):
        folder.claim(tmp_path, default.get_config(), "train")


@pytest.mark.parametrize("config", [default.get_config(), settled()])
def test_a_folder_remembers_its_config(config, tmp_path):
    claim = folder.claim_study if study.is_study(config) else folder.claim
    claim(tmp_path, config, "train")
    assert config_lib.to_json(stored.get_config(str(tmp_path))) == config_lib.to_json(config)


def test_a_config_that_cannot_be_read_is_told_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read .*; take another --workdir"):
        folder.claim(tmp_path, default.get_config(), "train")


CONFIGS = "--config=configs/NAME.py for a run, NAME one of .*default.*; --config=configs/studies/"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", f"--workdir is missing.*; {CONFIGS}"),
        (
            "--config=configs/default.py",
            "--workdir is missing: a folder, as in --workdir=runs/demo$",
        ),
        ("--workdir=none", f"--config is missing and .*none holds no run; {CONFIGS}"),
        ("--workdir none --mode=audit", "none holds no run; --mode=audit needs a finished one$"),
        ("--config=configs/defualt.py --workdir=none", f"no config configs/defualt.py; {CONFIGS}"),
        ("--config=configs --workdir=none", f"there is no config configs; {CONFIGS}"),
        ("--config configs/defualt.py:x --workdir=none", "no config configs/defualt.py:x; --conf"),
    ],
)
def test_launch_says_in_one_line_what_is_missing(arguments, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError) as error:
        command_line.completed(["launch.py", *arguments.split()], REPOSITORY / "configs")
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("whose", [a_run, a_study])
def test_launch_takes_the_config_that_is_in_the_folder(whose, monkeypatch, tmp_path):
    whose(tmp_path)
    arguments = ["launch.py", f"--workdir={tmp_path}", "--config.seed=3"]
    found = command_line.completed(arguments, REPOSITORY / "configs")
    assert found == ["launch.py", f"--config={stored.__file__}:{tmp_path}", *arguments[1:]]
    given = ["launch.py", "--config=configs/default.py", f"--workdir={tmp_path}"]
    monkeypatch.chdir(REPOSITORY)
    for untouched in (["launch.py", "--help"], given):
        assert command_line.completed(untouched, REPOSITORY / "configs") == untouched


def test_a_run_of_version_0_1_0_is_built_again(tmp_path):
    tree = json.loads((REPOSITORY / "tests" / "config_0_1_0.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config = stored.config_of(tmp_path)
    config_lib.check_fields(config, default.get_config())
    assert config.train_size == 0 and config.threat.to_dict() == {"norm": "linf", "eps": 0.15}
    for label in ("average_margin", "energy_oscillation_label_free"):
        tree["regularizers"][label]["weight"] = 1.0
    tree["regularizers"]["energy_oscillation_label_free"].pop("norm")
    tree["adversary"]["loss"] = "carlini_wagner"
    tree["audit"] |= {"norm": "l2", "eps": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config = stored.config_of(tmp_path)
    training.build(config)  # binds every entry and tries it out
    assert config.adversary.loss == "margin_loss" and config.adversary.norm == "linf"
    on = {label: entry for label, entry in config.regularizers.items() if entry.weight}
    assert {label: entry.name for label, entry in on.items()} == {
        "average_margin": "input_margin",
        "energy_oscillation_label_free": "energy_oscillation",
    }
    energy = on["energy_oscillation_label_free"]
    assert energy.label_free and energy.norm == "linf" and config.threat.norm == "l2"


def test_a_config_of_today_is_read_as_it_is(tmp_path):
    config = default.get_config()
    config.regularizers = {
        "vat_label_free": {"name": "vat", "weight": 1.0, "eps": 0.5},
        "average_margin": {"name": "entropy", "weight": 0.0},
    }
    folder.claim(tmp_path, config, "train")
    assert config_lib.to_json(stored.config_of(tmp_path)) == config_lib.to_json(config)


def test_a_run_that_tracked_margins_by_one_estimate_is_read(tmp_path):
    a_run(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    for before, first_order in ((0, 0), (1000, 1000)):
        (tmp_path / "config.json").write_text(json.dumps({**tree, "track_margins": before}))
        expected = default.get_config()
        expected.track_margins.first_order = first_order
        assert stored.config_of(tmp_path).track_margins == expected.track_margins
        folder.check_trained_as(tmp_path, expected)
    (tmp_path / "config.json").unlink()
    a_study(tmp_path)
    tree = json.loads((tmp_path / "study.json").read_text())
    arm = next(iter(tree["arms"]))
    tree["base"]["track_margins"] = tree["arms"][arm]["track_margins"] = 7
    tree["base"]["evaluation"].pop("last")
    tree["base"].pop("train_size")
    (tmp_path / "study.json").write_text(json.dumps(tree))
    found = stored.config_of(tmp_path)
    assert found.base.track_margins.first_order == found.arms[arm].track_margins.first_order == 7
    assert found.base.track_margins.keys() == expected.track_margins.keys()


def test_json_is_a_config_again():
    tree = {"a": [1, [2, 3]], "b": {"c": [], "d": None}, "arms": {"z": {}, "a": {"eps": [0.5]}}}
    config = stored.from_json(json.loads(json.dumps(tree)))
    assert config.a == (1, (2, 3)) and config.b.c == () and config.b.d is None
    assert list(config.arms) == ["z", "a"] and config.arms.a.eps == (0.5,)


def test_a_fraction_of_255_levels_is_a_radius_on_the_command_line_too():
    given = [
        "--config.threat.eps=8/255",
        "--config.attacks.pgd.eps=(4 / 255, 0.1)",
        "--workdir=8/2",
        "--config.attacks={'pgd': {'eps': (8/255, 0.1), 'num_steps': 3}, 'x/2': {\"eps\": 4/255}}",
    ]
    eps, several, other, table = command_line.with_fractions(given)
    assert eval(table.partition("=")[2]) == {
        "pgd": {"eps": (8 / 255, 0.1), "num_steps": 3},
        "x/2": {"eps": 4 / 255},
    }
    with pytest.raises(UserError, match="8/0 is no number"):
        command_line.with_fractions(["--config.threat.eps=8/0"])
    assert float(eps.partition("=")[2]) == 8 / 255
    assert eval(several.partition("=")[2]) == (4 / 255, 0.1)
    assert other == given[2]


def test_a_figure_that_fails_costs_no_results(tmp_path, monkeypatch):
    a_run(tmp_path)
    monkeypatch.setattr(folder.report, "write", lambda *_: 1 / 0)
    monkeypatch.setattr(folder.cards, "card", lambda _: None)
    (tmp_path / "report.html").write_text("of other results")
    with pytest.raises(ZeroDivisionError):
        folder.write(tmp_path, {"config": json.loads((tmp_path / "config.json").read_text())})
    assert stored.is_finished(tmp_path) and not (tmp_path / "report.html").exists()


def test_another_checkpoint_than_there_is_is_refused(tmp_path):
    with pytest.raises(UserError, match="at is 'first'; choices: best, last, initialisation"):
        load(tmp_path, at="first")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_name_the_commit_of_the_checkout_that_made_them(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    code = tmp_path / "code.py"
    code.write_text("1")
    assert commit(code) == ""
    git("init", "--quiet")
    assert commit(code) == ""  # like an installed package within a checkout
    git("add", "code.py")
    git("commit", "--quiet", "-m", "a")
    clean = commit(code)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    other = tmp_path / "other.py"
    other.write_text("1")
    assert commit(other) == ""  # its version is unknown
    code.write_text("2")
    assert commit(code) == f"{clean}-dirty"
    assert versions("jax").get("commit", "") == commit()
