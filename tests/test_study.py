"""Studies: verdicts follow from intervals, configs are whole, a small one runs to its report."""

import importlib
import json

import numpy as np
import pytest
from scipy import stats

from configs import default
from robust_jax.app import config as config_lib
from robust_jax.app import runs as run_files
from robust_jax.app import study
from robust_jax.app.experiment import build
from robust_jax.errors import UserError
from robust_jax.models import MODELS
from robust_jax.train import loop
from robust_jax.train.regularizers import REGULARIZERS
from tests.conftest import REPOSITORY

STUDIES = sorted(
    path.stem for path in (REPOSITORY / "configs" / "studies").glob("*.py") if path.stem != "common"
)


def result(clean=0.9, pgd=0.5):
    attacks = [{"name": "pgd", "attack": "pgd", "norm": "linf", "eps": 0.1, "robust_accuracy": pgd}]
    return {"clean": {"accuracy": clean}, "attacks": attacks, "audit": None}


def found(**arms):
    """Made-up runs: by arm, the robust accuracy of each seed."""
    return {arm: {i: result(pgd=v) for i, v in enumerate(values)} for arm, values in arms.items()}


def claim(*tests):
    return {"text": "", "tests": tests}


ABOVE = {"measure": "pgd@0.1", "arms": ("b", "a"), "relation": "above"}


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((0.5, 0.52, 0.48), (0.6, 0.61, 0.59), "supported"),
        ((0.6, 0.61, 0.59), (0.5, 0.52, 0.48), "refuted"),
        ((0.5, 0.6, 0.4), (0.55, 0.45, 0.5), "inconclusive"),
        ((0.5,), (0.9,), "inconclusive"),  # one seed has no interval
        ((), (), "inconclusive"),
    ],
)
def test_a_verdict_follows_from_the_paired_differences(a, b, verdict):
    assert study.judge(claim(ABOVE), found(a=a, b=b))["verdict"] == verdict


def test_seeds_are_paired_so_that_what_they_share_cancels():
    a = np.array([0.3, 0.5, 0.7])
    test = study.judge(claim(ABOVE), found(a=a, b=a + [0.02, 0.021, 0.019]))["tests"][0]
    assert test["verdict"] == "supported"
    np.testing.assert_allclose(test["mean"], 0.02)
    expected = stats.ttest_1samp([0.02, 0.021, 0.019], 0).confidence_interval(0.95)
    np.testing.assert_allclose((test["low"], test["high"]), expected)


def test_all_tests_of_a_claim_must_hold_and_one_refutes_it():
    runs = found(a=(0.5, 0.52, 0.48), b=(0.6, 0.61, 0.59), c=(0.4, 0.7, 0.5))
    unsure = {**ABOVE, "arms": ("c", "a")}
    wrong = {**ABOVE, "relation": "below"}
    assert study.judge(claim(ABOVE, ABOVE), runs)["verdict"] == "supported"
    assert study.judge(claim(ABOVE, unsure), runs)["verdict"] == "inconclusive"
    assert study.judge(claim(ABOVE, unsure, wrong), runs)["verdict"] == "refuted"


def test_margins_levels_and_trends():
    runs = found(a=(0.5, 0.5, 0.51), b=(0.49, 0.49, 0.5), c=(0.2, 0.21, 0.2))
    within = {**ABOVE, "by": -0.02}
    assert study.judge(claim(within), runs)["verdict"] == "supported"
    assert study.judge(claim(ABOVE), runs)["verdict"] == "refuted"
    level = {"measure": "pgd@{size}", "arms": ("c",), "relation": "below", "level": 0.3}
    assert study.judge(claim(level), runs, {"size": 0.1})["verdict"] == "supported"
    falls = {"measure": "pgd@0.1", "arms": ("a", "b", "c"), "relation": "falls", "at": (0, 1, 2)}
    judged = study.judge(claim(falls), runs)
    assert judged["verdict"] == "supported"
    np.testing.assert_allclose(judged["tests"][0]["values"], [0.3, 0.29, 0.31])
    assert study.judge(claim({**falls, "relation": "rises"}), runs)["verdict"] == "refuted"


def test_most_of_several_numbers():
    runs = {
        arm: {
            seed: {
                "measurements": {"spectra": {"spread/a": a, "spread/b": b, "spread/c": c, "d": 9}}
            }
            for seed in range(3)
        }
        for arm, (a, b, c) in {"weak": (3, 2, 1), "strong": (2, 1.5, 4)}.items()
    }
    falls = {"measure": "measurements.spectra.spread/*", "arms": ("weak", "strong"),
             "relation": "falls"}  # fmt: skip
    judged = study.judge(claim(falls), runs)
    assert judged["verdict"] == "supported"
    np.testing.assert_allclose(judged["tests"][0]["values"], 2 / 3 - 1 / 2)
    assert study.judge(claim({**falls, "relation": "rises"}), runs)["verdict"] == "refuted"
    other = {**falls, "measure": "measurements.spectra.spread/z*"}
    assert study.judge(claim(other), runs)["tests"][0]["values"] == []


def test_a_seed_that_one_arm_lacks_is_left_out():
    runs = found(a=(0.5, 0.52, 0.48, 0.1), b=(0.6, 0.61, 0.59))
    assert len(study.judge(claim(ABOVE), runs)["tests"][0]["values"]) == 3


def test_value_reads_attacks_paths_and_differences():
    results = {**result(0.9, 0.4), "measurements": {"spectra": {"mean": 3}},
               "audit": {"checks": [{"name": "one", "values": {"share": 0.25}}]}}  # fmt: skip
    assert study.value(results, "pgd@0.1") == 0.4
    assert study.value(results, "pgd@0.10000000001") == 0.4
    assert study.value(results, "clean.accuracy") == 0.9
    assert study.value(results, "measurements.spectra.mean") == 3.0
    assert study.value(results, "audit.checks.one.values.share") == 0.25
    np.testing.assert_allclose(study.value(results, "clean.accuracy - pgd@0.1"), 0.5)
    for missing in ("pgd@0.2", "measurements.energy.mean", "clean.accuracy - pgd@0.2",
                    "audit.checks.two.values.share"):  # fmt: skip
        assert study.value(results, missing) is None


def test_changes_merge_sections_and_replace_entries():
    base = default.get_config()
    new = study.changed(base, {"adversary": {"eps": 0.3}, "model": {"name": "lenet5"},
                               "attacks": {"pgd": {"name": "pgd", "eps": 0.1}}})  # fmt: skip
    assert new.adversary.eps == 0.3 and new.adversary.num_steps == 10
    assert new.model.to_dict() == {"name": "lenet5"}
    assert list(new.attacks) == ["pgd"]
    assert base.adversary.eps == 0.15 and base.model.name == "cnn"


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_whole_at_every_scale(name):
    config = importlib.import_module(f"configs.studies.{name}").get_config()
    assert set(config.scales) == {"smoke", "small", "full"}
    for scale in config.scales:
        config.scale = scale
        study.check(config, default.get_config())
        trials = list(study.trials(config))
        for trial in trials[: len(config.arms)]:
            config_lib.bind(MODELS, trial.config.model, "model", reserved=("num_classes",))
            for name, entry in trial.config.regularizers.items():
                assert entry.get("name", name) in REGULARIZERS, entry
        assert len(trials) == len(config.arms) * len({t.seed for t in trials})
        assert len({t.seed for t in trials}) >= (2 if scale == "smoke" else 3)
        radii = config.scales[scale].get("radii", {})
        measures = [m for _, m in config.measures]
        measures += [t["measure"] for claim in config.claims.values() for t in claim.tests]
        for measure in measures:
            for part in measure.format(**radii).split(" - "):
                if "@" in part:
                    attack, _, eps = part.partition("@")
                    sizes = trials[0].config.attacks[attack].eps
                    sizes = sizes if isinstance(sizes, tuple) else (sizes,)
                    assert any(np.isclose(float(eps), size) for size in sizes), part
                elif part.startswith("measurements."):
                    assert part.split(".")[1] in trials[0].config.measurements, part


def test_mistakes_are_told(tmp_path):
    config = importlib.import_module("configs.studies.entm").get_config()
    with pytest.raises(UserError, match="--only's arm is 'atentm'; did you mean at_entm"):
        study.execute(config, tmp_path, only="atentm")
    with pytest.raises(UserError, match="--only's seed is '7'; choices: 0, 1, 2"):
        study.execute(config, tmp_path, only="at/7")
    with pytest.raises(UserError, match="--mode=verify is for one run"):
        study.execute(config, tmp_path, "verify")
    config.scale = "tiny"
    with pytest.raises(UserError, match="config.scale is 'tiny'; choices: full, small, smoke"):
        study.check(config, default.get_config())
    config.scale = "small"
    config.arms.ce.loss_at = "clean"
    with pytest.raises(UserError, match="config.loss_at is not a field of a config; did you mean"):
        study.check(config, default.get_config())
    assert not list(tmp_path.iterdir())


def test_numbers_along_training_are_those_of_the_validations(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.2)):
        (tmp_path / str(seed) / "records").mkdir(parents=True)
        for name in ("best", "last"):
            (tmp_path / str(seed) / "records" / f"{name}.csv").write_text("index\n0\n")
        lines = [
            {"step": 5, "epoch": 0.5, "train/loss": 1.0},
            {"step": 5, "validation/average_margin": 1.0 + shift},
            {"step": 20, "validation/average_margin": 3.0 + shift},
        ]
        (tmp_path / str(seed) / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    points = study._history([tmp_path / "0", tmp_path / "1"], "average_margin")
    assert [point["epoch"] for point in points] == [0.5, 2.0]
    np.testing.assert_allclose([point["mean"] for point in points], [1.1, 3.1])
    assert points[0]["low"] < 1.1 < points[0]["high"]


def test_seeds_train_together_and_leave_the_evaluation_to_their_runs(tmp_path, monkeypatch):
    config = importlib.import_module("configs.studies.entm").get_config()
    config.scale = "smoke"
    config.base.duration = "6 steps"
    config.scales.smoke.base.duration = "6 steps"
    trials = [trial for trial in study.trials(config) if trial.arm == "at_ls"]
    study.train_seeds_together(trials, tmp_path)
    plans = [build(trial.config).plan for trial in trials]
    for trial, plan in zip(trials, plans, strict=True):
        assert loop.is_trained(plan, tmp_path / trial.name)
        assert not (tmp_path / trial.name / "results.json").exists()
    (tmp_path / "at_ls" / "0" / "results.json").write_text("{}")
    monkeypatch.setattr(study.run, "train_together", None)  # one is left: nothing to share
    study.train_seeds_together(trials, tmp_path)


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("entm", "at_entm"),
        pytest.param("adversarial_strength", "eps_1", marks=pytest.mark.slow),
        pytest.param("average_margin", "average_margin", marks=pytest.mark.slow),
        ("energy", "oscillation_100"),
    ],
)
def test_a_seed_of_each_study_runs_at_smoke(name, arm, tmp_path):
    config = importlib.import_module(f"configs.studies.{name}").get_config()
    config.scale = "smoke"
    study.execute(config, tmp_path, only=f"{arm}/0")
    results = study.execute(config, tmp_path, "report")
    for label, measure in results["measures"].items():
        if not measure.startswith("audit."):  # smoke has no audit
            assert results["table"][arm][label]["mean"] is not None, label
    assert (tmp_path / "README.md").exists()


def test_a_study_runs_part_by_part_and_is_collected(launch, tmp_path):
    flags = ("--config=configs/studies/guided_complement_entropy.py", "--config.scale=smoke",
             f"--workdir={tmp_path}")  # fmt: skip
    for part in ("ce/1", "gce"):
        alone = launch(*flags, f"--only={part}")
        assert alone.returncode == 0, alone.stderr[-3000:]
        assert not (tmp_path / "report.html").exists()
    collected = launch(*flags, "--mode=report")
    assert collected.returncode == 0, collected.stderr[-3000:]
    assert "7 of 10 runs are not finished: ce/0, cot/0, at/0, gce_at/0" in collected.stderr
    before = run_files.results(tmp_path / "ce" / "1")
    again = launch(*flags, "--only=ce/1", "--mode=measure",
                   "--config.base.measurements.clusters.num_examples=50")  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    after = run_files.results(tmp_path / "ce" / "1")
    assert after.pop("measurements") != before.pop("measurements")
    assert after["config"]["measurements"] != before["config"].pop("measurements")
    del after["config"]["measurements"]
    assert after == before
    assert len(run_files.measured(tmp_path / "ce" / "1")["clusters/label"]) == 50
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["table"]["gce"]["FGSM"]["values"]) == 2
    assert results["table"]["at"]["FGSM"]["mean"] is None
    assert results["claims"]["e"]["verdict"] == "inconclusive"
    page = (tmp_path / "report.html").read_text()
    readme = (tmp_path / "README.md").read_text()
    for text in (page, readme):
        assert "inconclusive" in text and "published 62.74" in text
    for name in ("accuracy", "measures", "pairs", "clusters"):
        figure = tmp_path / "figures" / f"{name}.svg"
        assert 1000 < figure.stat().st_size < 200_000
