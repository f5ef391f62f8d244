"""Studies: verdicts follow from intervals, configs are whole, a small one runs to its report."""

import importlib
import json

import numpy as np
import pytest
from scipy import stats

from configs import default
from robust_jax.app import claims, entries, measures, stored, study, threat
from robust_jax.app import config as config_lib
from robust_jax.app import runs as run_files
from robust_jax.app.experiment import build
from robust_jax.errors import UserError
from robust_jax.models import MODELS
from robust_jax.train import loop
from tests.conftest import REPOSITORY

STUDIES = sorted(
    path.stem for path in (REPOSITORY / "configs" / "studies").glob("*.py") if path.stem != "common"
)
SCALES = [
    (name, scale)
    for name in STUDIES
    for scale in importlib.import_module(f"configs.studies.{name}").get_config().scales
]


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
        ((0.5, 0.5, 0.5), (0.6, 0.6, 0.6), "inconclusive"),  # an interval without width
        ((0.5, 0.4), (0.9, 0.8), "no verdict"),  # an interval needs three
        ((0.5,), (0.9,), "no verdict"),
        ((), (), "no verdict"),
    ],
)
def test_a_verdict_follows_from_the_paired_differences(a, b, verdict):
    assert claims.judge(claim(ABOVE), found(a=a, b=b))["verdict"] == verdict


def test_seeds_are_paired_so_that_what_they_share_cancels():
    a = np.array([0.3, 0.5, 0.7])
    test = claims.judge(claim(ABOVE), found(a=a, b=a + [0.02, 0.021, 0.019]))["tests"][0]
    assert test["verdict"] == "supported"
    np.testing.assert_allclose(test["mean"], 0.02)
    expected = stats.ttest_1samp([0.02, 0.021, 0.019], 0).confidence_interval(0.95)
    np.testing.assert_allclose((test["low"], test["high"]), expected)


def test_all_tests_of_a_claim_must_hold_and_one_refutes_it():
    runs = found(a=(0.5, 0.52, 0.48), b=(0.6, 0.61, 0.59), c=(0.4, 0.7, 0.5))
    unsure = {**ABOVE, "arms": ("c", "a")}
    wrong = {**ABOVE, "relation": "below"}
    assert claims.judge(claim(ABOVE, ABOVE), runs)["verdict"] == "supported"
    assert claims.judge(claim(ABOVE, unsure), runs)["verdict"] == "inconclusive"
    assert claims.judge(claim(ABOVE, unsure, wrong), runs)["verdict"] == "refuted"


def test_margins_levels_and_trends():
    runs = found(a=(0.5, 0.5, 0.51), b=(0.49, 0.491, 0.5), c=(0.2, 0.21, 0.2))
    within = {**ABOVE, "by": -0.02}
    assert claims.judge(claim(within), runs)["verdict"] == "supported"
    assert claims.judge(claim(ABOVE), runs)["verdict"] == "refuted"
    level = {"measure": "pgd@0.1", "arms": ("c",), "relation": "below", "level": 0.3}
    assert claims.judge(claim(level), runs)["verdict"] == "supported"
    falls = {"measure": "pgd@0.1", "arms": ("a", "b", "c"), "relation": "falls", "at": (0, 1, 2)}
    judged = claims.judge(claim(falls), runs)
    assert judged["verdict"] == "supported"
    np.testing.assert_allclose(judged["tests"][0]["values"], [0.3, 0.29, 0.31])
    assert claims.judge(claim({**falls, "relation": "rises"}), runs)["verdict"] == "refuted"


def test_most_of_several_numbers():
    spectra = {"weak": [(3, 2, 1), (3, 2, 5)] * 2, "strong": [(2, 1.5, 4)] * 4}
    runs = {
        arm: {
            seed: {
                "measurements": {"spectra": {"spread/a": a, "spread/b": b, "spread/c": c, "d": 9}}
            }
            for seed, (a, b, c) in enumerate(by_seed)
        }
        for arm, by_seed in spectra.items()
    }
    falls = {
        "measure": "measurements.spectra.spread/*",
        "arms": ("weak", "strong"),
        "relation": "falls",
    }
    judged = claims.judge(claim(falls), runs)
    assert judged["verdict"] == "supported"
    np.testing.assert_allclose(judged["tests"][0]["values"], [1 / 6, 1 / 2] * 2)
    assert claims.judge(claim({**falls, "relation": "rises"}), runs)["verdict"] == "refuted"
    other = {**falls, "measure": "measurements.spectra.spread/z*"}
    assert claims.judge(claim(other), runs)["tests"][0]["values"] == []


def test_a_seed_that_one_arm_lacks_is_left_out():
    runs = found(a=(0.5, 0.52, 0.48, 0.1), b=(0.6, 0.61, 0.59))
    assert len(claims.judge(claim(ABOVE), runs)["tests"][0]["values"]) == 3


def test_value_reads_attacks_paths_and_differences():
    results = {
        **result(0.9, 0.4),
        "measurements": {"spectra": {"mean": 3}},
        "audit": {"checks": [{"name": "one", "values": {"share": 0.25}}]},
    }
    assert measures.value(results, "pgd@0.1") == 0.4
    assert measures.value(results, "pgd@0.10000000001") == 0.4
    assert measures.value(results, "clean.accuracy") == 0.9
    assert measures.value(results, "measurements.spectra.mean") == 3.0
    assert measures.value(results, "audit.checks.one.values.share") == 0.25
    np.testing.assert_allclose(measures.value(results, "clean.accuracy - pgd@0.1"), 0.5)
    for missing in (
        "pgd@0.2",
        "measurements.energy.mean",
        "clean.accuracy - pgd@0.2",
        "audit.checks.two.values.share",
    ):
        assert measures.value(results, missing) is None


def test_changes_merge_sections_and_replace_entries():
    base = default.get_config()
    new = study.changed(
        base,
        {
            "threat": {"eps": 0.3},
            "model": {"name": "lenet5"},
            "attacks": {"pgd": {"name": "pgd", "eps": 0.1}},
        },
    )
    assert new.threat.eps == 0.3 and new.threat.norm == "linf"
    assert new.model.to_dict() == {"name": "lenet5"}
    assert list(new.attacks) == ["pgd"]
    assert base.threat.eps == 0.15 and base.model.name == "cnn"


def config_of(name, typed=None, **fields):
    """A study's config as launch.py settles it; typed fields are those of the command line."""
    config = importlib.import_module(f"configs.studies.{name}").get_config()
    typed = typed or {}
    for path, value in {**fields, **typed}.items():
        *sections, field = path.split(".")
        part = config
        for section in sections:
            part = part[section]
        with part.ignore_type():
            part[field] = value
    return study.settled(config, typed)


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_every_study_is_whole_at_every_scale(name, scale):
    config = config_of(name, scale=scale)
    study.check(config, default.get_config())
    trials = list(study.trials(config))
    for trial in trials[: len(config.arms)]:
        config_lib.bind(MODELS, trial.config.model, "model", reserved=("num_classes",))
        for label, entry in threat.complete(trial.config).regularizers.items():
            entries.term(label, entry, trial.config.loss_on)
    assert len(trials) == len(config.arms) * len({t.seed for t in trials})
    assert len({t.seed for t in trials}) >= (2 if scale == "smoke" else 3)
    # As its folder remembers it.
    again = stored.from_json(json.loads(json.dumps(config_lib.to_json(config))))
    assert list(study.trials(study.settled(again))) == trials
    assert list(again.claims) == list(config.claims)


def test_what_is_typed_wins_over_the_scale_or_is_refused():
    typed = {
        "seeds": (0,),
        "scale": "smoke",
        "base.duration": "3 steps",
        "arms.ls.seed": 1,
        "arms.at.duration": "4 steps",
        "base.model.hidden": 9,
    }
    config = config_of("entm", {"scale": "smoke", **typed})
    trials = {trial.arm: trial for trial in study.trials(config)}
    assert len(list(study.trials(config))) == len(config.arms)
    assert {trial.seed for trial in trials.values()} == {0}
    assert trials["ce"].config.duration == "3 steps" and trials["at"].config.duration == "4 steps"
    assert trials["ce"].config.model.hidden == 9
    # What the scale says otherwise is as it was.
    smoke = next(study.trials(config_of("entm", scale="smoke")))
    assert trials["ce"].config.attacks == smoke.config.attacks
    for typed in ({"base.seed": 3}, {"base.adversary.eps": 0.2}, {"base.loss_on": "both"}):
        with pytest.raises(UserError, match="config.base.* changes nothing: every run"):
            config_of("adversarial_strength", typed)
    with pytest.raises(UserError, match="scales.full.seeds changes nothing: the scale is small"):
        config_of("entm", {"scales.full.seeds": (1,)})


WRONG = {
    "radius without a name": ({"claims.a.tests.0.measure": "pgd@{traned}"}, "traned.*trained"),
    "attack of a claim": ({"claims.a.tests.0.measure": "pgdd@0.1"}, "'pgdd'; did you mean pgd"),
    "radius that is not attacked": ({"claims.a.tests.0.measure": "pgd@0.3"}, "pgd runs at 0.02"),
    "no radius": ({"claims.a.tests.0.measure": "pgd@"}, "a radius stands after the @"),
    "part of a difference": ({"claims.a.tests.0.measure": "pgd@0.1 - x"}, "'x': 'x' is 'x'; choi"),
    "arm of a claim": ({"claims.a.tests.0.arms": ("entm", "ec")}, "arm is 'ec'; choices: ce"),
    "relation": ({"claims.a.tests.0.relation": "beats"}, "'beats'; choices: above, below"),
    "number of the table": ({"measures": (("x", "clean.acuracy"),)}, "did you mean accuracy"),
    "a number's whole section": ({"measures": (("x", "jacobian.logits"),)}, "is not a number"),
    "below a number": ({"measures": (("x", "clean.count.x"),)}, "nothing below clean.count"),
    "not measured": ({"measures": (("x", "measurements.gaps.accuracy"),)}, "choices: outputs"),
    "label of a radius": ({"measures": (("at {x}", "clean.accuracy"),)}, "radii of the scale: fai"),
    "pair": ({"pairs": (("clean", "dirty"),)}, "pairs' measure is 'dirty'"),
    "along training": ({"along_training": ("margin",)}, "along_training.*'margin'.*average_margin"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_typo_in_a_claim_or_a_measure_is_found_before_anything_runs(case):
    fields, message = WRONG[case]
    name = "average_margin" if case == "along training" else "entm"
    config = importlib.import_module(f"configs.studies.{name}").get_config()
    for path, value in fields.items():
        if path.startswith("claims"):
            config.claims.a.tests[0][path.rpartition(".")[2]] = value
        else:
            config[path] = value
    if "measures" in fields:
        config.pairs = ()
    with pytest.raises(UserError, match=message) as error:
        study.check(study.settled(config), default.get_config())
    assert "\n" not in str(error.value)


def test_intervals_of_accuracies_stay_between_none_and_all():
    found = claims.mean_interval([0.0, 0.3, 0.1], bounds=measures.bounds("pgd@0.1"))
    assert found.low == 0 and found.high < 1
    assert measures.bounds("clean.accuracy - pgd@0.1") == (-1, 1)
    assert measures.bounds("measurements.outputs.mean_margin")[0] == -np.inf


def test_mistakes_are_told(tmp_path):
    config = config_of("entm")
    with pytest.raises(UserError, match="--only's arm is 'atentm'; did you mean at_entm"):
        study.execute(config, tmp_path, only="atentm")
    with pytest.raises(UserError, match="--only's seed is '7'; choices: 0, 1, 2"):
        study.execute(config, tmp_path, only="at/7")
    with pytest.raises(UserError, match="--mode=verify is for one run"):
        study.execute(config, tmp_path, "verify")
    with pytest.raises(
        UserError, match="config.scale is 'tiny'; choices: full, medium, small, smoke"
    ):
        config_of("entm", scale="tiny")
    with pytest.raises(UserError, match="a study's field is 'seed'; did you mean seeds"):
        config_of("entm", seed=3)
    config = config_of("entm", **{"arms.ce.loss_at": "clean"})
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
    config = config_of("entm", {"base.duration": "6 steps"}, scale="smoke")
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
        pytest.param("average_margin", "cnn_regularised", marks=pytest.mark.slow),
        ("energy", "oscillation_few"),
    ],
)
def test_a_seed_of_each_study_runs_at_smoke(name, arm, tmp_path):
    config = config_of(name, scale="smoke")
    study.execute(config, tmp_path, only=f"{arm}/0")
    said = study.execute(config, tmp_path, "report")
    assert "no verdict" in said and max(map(len, said.splitlines())) <= 80
    results = run_files.results(tmp_path)
    for label, measure in results["measures"].items():
        if not measure.startswith("audit."):  # smoke has no audit
            assert results["table"][arm][label]["mean"] is not None, label
    assert (tmp_path / "README.md").exists()


def test_a_study_runs_part_by_part_and_is_collected(launch, tmp_path):
    flags = (
        "--config=configs/studies/guided_complement_entropy.py",
        "--config.scale=smoke",
        f"--workdir={tmp_path}",
    )
    for part in ("ce/1", "gce"):
        alone = launch(*flags, f"--only={part}")
        assert alone.returncode == 0, alone.stderr[-3000:]
        assert not (tmp_path / "report.html").exists()
    collected = launch(f"--workdir={tmp_path}", "--mode=report")  # the folder knows the study
    assert collected.returncode == 0, collected.stderr[-3000:]
    assert "9 of 12 runs are not finished: ce/0, cot/0, gce_published/0, at/0" in collected.stderr
    before = run_files.results(tmp_path / "ce" / "1")
    again = launch(
        f"--workdir={tmp_path}",
        "--only=ce/1",
        "--mode=measure",
        "--config.base.measurements.clusters.num_examples=50",
    )
    assert again.returncode == 0, again.stderr[-3000:]
    after = run_files.results(tmp_path / "ce" / "1")
    assert after.pop("measurements") != before.pop("measurements")
    assert after["config"]["measurements"] != before["config"].pop("measurements")
    del after["config"]["measurements"]
    assert after == before
    assert len(run_files.measured(tmp_path / "ce" / "1")["clusters/label"]) == 50
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["table"]["gce"]["FGSM at 0.2"]["values"]) == 2
    assert results["table"]["at"]["FGSM at 0.2"]["mean"] is None
    assert results["claims"]["e"]["verdict"] == "no verdict"
    page = (tmp_path / "report.html").read_text()
    readme = (tmp_path / "README.md").read_text()
    for text in (page, readme):
        assert "no verdict" in text and "published 62.74" in text
    for name in ("accuracy", "measures", "pairs", "clusters"):
        figure = tmp_path / "figures" / f"{name}.svg"
        assert 1000 < figure.stat().st_size < 500_000
