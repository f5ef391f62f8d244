"""Studies: verdicts follow from intervals, configs are whole, a small one runs to its report."""

import functools
import importlib
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from robust_jax.app import config as config_lib
from robust_jax.app import experiment, stored
from robust_jax.app.studies import arms, measures, study
from robust_jax.errors import UserError
from tests import small_study as small
from tests.conftest import REPOSITORY
from tests.test_claims import result, table

check_run = functools.partial(experiment.check, schema=default.get_config())
STUDIES = sorted(
    path.stem for path in (REPOSITORY / "configs" / "studies").glob("*.py") if path.stem != "common"
)
SCALES = [
    (name, scale)
    for name in STUDIES
    for scale in importlib.import_module(f"configs.studies.{name}").get_config().scales
]


def test_value_reads_attacks_paths_and_differences():
    results = {
        **result(pgd=0.4),
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
        config_lib.set_field(config, path, value)
    return study.settled(config, typed)


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_every_study_is_whole_at_every_scale(name, scale):
    config = config_of(name, scale=scale)
    study.check(config, check_run)
    trials = list(study.trials(config))
    assert len(trials) == len(config.arms) * len({t.seed for t in trials})
    assert len({t.seed for t in trials}) >= (2 if scale == "smoke" else 3)
    # The same after a round trip through its folder's JSON.
    again = stored.from_json(json.loads(json.dumps(config_lib.to_json(config))))
    assert list(study.trials(study.settled(again))) == trials
    assert list(again.claims) == list(config.claims)


def test_what_is_typed_wins_over_the_scale_or_is_refused():
    typed = {
        "seeds": (0,),
        "scale": "smoke",
        "base.duration": "3 steps",
        "arms.at.duration": "4 steps",
        "base.model.hidden": 9,
    }
    config = config_of("entm", {"scale": "smoke", **typed})
    trials = {trial.arm: trial for trial in study.trials(config)}
    assert len(list(study.trials(config))) == len(config.arms)
    assert {trial.seed for trial in trials.values()} == {0}
    assert trials["ce"].config.duration == "3 steps" and trials["at"].config.duration == "4 steps"
    assert trials["ce"].config.model.hidden == 9
    # The scale's other fields are unchanged.
    smoke = next(study.trials(config_of("entm", scale="smoke")))
    assert trials["ce"].config.attacks == smoke.config.attacks
    for typed in ({"base.seed": 3}, {"base.adversary.eps": 0.2}, {"base.loss_on": "both"}):
        with pytest.raises(UserError, match="config.base.* changes nothing: every run"):
            config_of("adversarial_strength", typed)
    for path, why in (
        ("scales.full.seeds", "the scale is small"),
        ("arms.ls.seed", "every arm has config.seeds"),
        ("arms.at_ls.loss.label_smoothing", "the sweep of at_ls sets it"),
    ):
        with pytest.raises(UserError, match=f"{path} changes nothing: {why}"):
            config_of("entm", {path: 1})
    one = {"seeds": (7,), "along_training": ("average_margin",)}
    margin = config_of("average_margin", one, scale="medium")
    assert margin.seeds == (7,) and margin.along_training == ("average_margin",)
    for seeds in ((), (0, 0, 0)):
        with pytest.raises(UserError, match="give one at least, and each once"):
            study.check(config_of("entm", {"seeds": seeds}), check_run)
    for seeds in ((0, 1.5), (0, "a"), (True, 0), (0, -1)):
        with pytest.raises(UserError, match="give whole numbers from 0 on"):
            study.check(config_of("entm", {"seeds": seeds}), check_run)


WRONG = {
    "radius without a name": ({"claims.a.tests.0.measure": "pgd@{traned}"}, "traned.*trained"),
    "attack of a claim": ({"claims.a.tests.0.measure": "pgdd@0.1"}, "'pgdd'; did you mean pgd"),
    "radius that is not attacked": ({"claims.a.tests.0.measure": "pgd@0.3"}, "pgd runs at 0.02"),
    "no radius": ({"claims.a.tests.0.measure": "pgd@"}, "a radius stands after the @"),
    "part of a difference": (
        {"claims.a.tests.0.measure": "pgd@0.1 - x"},
        "measure is 'x'; choices: clean",
    ),
    "arm of a claim": ({"claims.a.tests.0.arms": ("entm", "ec")}, "arm is 'ec'; choices: ce"),
    "relation": ({"claims.a.tests.0.relation": "beats"}, "'beats'; choices: above, below"),
    "number of the table": (
        {"measures": (("x", "clean.acuracy"),)},
        "'x', is 'clean.acuracy', where a part is 'acuracy'; did you mean accuracy",
    ),
    "a number's whole section": ({"measures": (("x", "jacobian.logits"),)}, "is not a number"),
    "below a number": ({"measures": (("x", "clean.count.x"),)}, "nothing below clean.count"),
    "not measured": ({"measures": (("x", "measurements.gaps.accuracy"),)}, "choices: outputs"),
    "label of a radius": (
        {"measures": (("at {x}", "clean.accuracy"),)},
        "a radius of the scale: fai",
    ),
    "pair": ({"pairs": (("clean", "dirty"),)}, "pairs' measure is 'dirty'"),
    "along training": ({"along_training": ("margin",)}, "along_training.*'margin'.*average_margin"),
    "published arm": ({"published": (("ec", {"clean": 90.0}),)}, "published's arm is 'ec'"),
    "published measure": ({"published": (("ce", {"clear": 90.0}),)}, "'clear'; did you mean clean"),
    "arm of a scale": ({"scales.small": {"arms": {"atm": {}}}}, "small.arms has a key.*'atm'"),
    "claim without a text": ({"claims.a": {"tests": ()}}, "claims.a.text is missing"),
    "claim without a test": ({"claims.a": {"text": "", "tests": ()}}, "claims.a.tests is empty"),
    "test of no arms": (
        {"claims.a": {"text": "", "tests": ({"measure": "pgd@0.1", "relation": "above"},)}},
        "a test without 'arms'",
    ),
    "tolerance in percent": ({"claims.a.tests.0.by": "10 %"}, "whose by is '10 %'; give a number"),
    "measurement": ({"base.measurements": {"outputz": {}}}, "outputz.name is 'outputz'; did you"),
    "loss of an arm": ({"arms.ls": {"loss": {"name": "smooth"}}}, "loss.name is 'smooth'; choices"),
    "term of an arm": (
        {"arms.ls": {"regularizers": {"entropi": {"weight": 1.0}}}},
        "entropi.name is 'entropi'; did you mean entropy",
    ),
    "attack of an arm": ({"arms.ls": {"attacks": {"pgd": {"nm": 1}}}}, "pgd.nm is not a keyword"),
    "model of an arm": ({"arms.ls": {"model": {"name": "lenet"}}}, "'lenet'; did you mean lenet5"),
    "margins of an arm": (
        {
            "arms.ls": {
                "model": {"name": "preact_resnet"},
                "measurements": {"margins": {"estimate": "lipschitz"}},
            }
        },
        "margins by lipschitz are for Linear, .* not for a PreActResNet",
    ),
    "radius in words": ({"base.threat": {"norm": "linf", "eps": 0.1, "epz": 1}}, "epz is not a fi"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_typo_in_a_claim_or_a_measure_is_found_before_anything_runs(case):
    fields, message = WRONG[case]
    name = "average_margin" if case == "along training" else "entm"
    config = importlib.import_module(f"configs.studies.{name}").get_config()
    for path, value in fields.items():
        if path.startswith("claims.a.tests"):
            config.claims.a.tests[0][path.rpartition(".")[2]] = value
        else:
            section, _, field = path.rpartition(".")
            (config_lib.get_field(config, section) if section else config)[field] = value
    if "measures" in fields:
        config.pairs = ()
    with pytest.raises(UserError, match=message) as error:
        study.check(study.settled(config), check_run)
    assert "\n" not in str(error.value)


def fake_runs(monkeypatch, accuracy=lambda config: 0.5, num_images=200, *, page=False):
    """Replaces runs by stubs that write results with this accuracy, under PGD and held out.

    page: writes the study's page too, which takes longer than all the rest.
    """
    ran = []
    monkeypatch.setattr(study, "_forget_a_run", lambda: None)  # slow, and there is nothing to drop
    if not page:
        monkeypatch.setattr(study.report, "write", lambda *_: None)

    def execute(config, workdir, mode):
        if (workdir / "results.json").exists() and mode == "train":
            return
        ran.append(str(workdir.relative_to(workdir.parents[2 if "sweep" in workdir.parts else 1])))
        held = np.random.default_rng(config.seed).random(num_images) < accuracy(config)
        results = {**result(pgd=held.mean()), "config": config_lib.to_json(config)}
        results["versions"] = {"robust_jax": "0.2.0", "jax": "0.10.2" if config.seed else "0.11.2"}
        results["training"] = {"best": {"robust_accuracy": accuracy(config)}}
        results["measurements"] = {"outputs": {"mean_confidence": 2 * accuracy(config)}}
        (workdir / "records").mkdir(parents=True, exist_ok=True)
        table(held).to_csv(workdir / "records" / "best.csv", index=False)
        (workdir / "config.json").write_text(json.dumps(results["config"]))
        (workdir / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(study.run, "execute", execute)
    return ran


def small_study(**fields):
    """The settled config of small_study.py, on robust accuracy and with other fields."""
    config = small.get_config()
    config.base.attacks = {"pgd": {"eps": (0.1,)}}
    config.measures = (("PGD", "pgd@0.1"),)
    config.claims.a.tests[0]["measure"] = "pgd@0.1"
    for path, value in fields.items():
        config_lib.set_field(config, path, value)
    return study.settled(config)


def test_seeds_are_added_to_the_arms_of_a_test_until_it_is_narrow(tmp_path, monkeypatch):
    fields = {"seeds_limit": 9, "claims.a.widest": 0.3}
    alike = fake_runs(monkeypatch)
    config = small_study(**fields)
    study.check(config, check_run)
    said = study.execute(config, tmp_path / "alike")
    assert len(alike) == 9  # both arms hold the same images: there is nothing to narrow

    def apart(config):  # varies with the seed, so that only seeds narrow it
        return 0.5 + (0.2 if config.regularizers.entropy.weight else 0.1) * (-1) ** config.seed

    ran = fake_runs(monkeypatch, apart)
    said = study.execute(config, tmp_path / "apart")
    results = stored.results(tmp_path / "apart")
    seeds = {arm: list(row["PGD"]["values"]) for arm, row in results["table"].items()}
    assert seeds["other"] == ["0", "1", "2"]  # no test uses it
    assert seeds["at"] == seeds["entm"] == [str(seed) for seed in results["seeds"]]
    test = results["claims"]["a"]["tests"][0]
    assert 3 < len(test["values"]) < 9 and test["high"] - test["low"] < 0.3 * (1 + 1e-6)
    assert test["images"] == 200
    assert "Number of tests: 1." in said
    ran.clear()
    study.execute(config, tmp_path / "apart")  # again: nothing is left to do
    study.execute(config, tmp_path / "apart", "report")
    assert not ran
    study.execute(config, tmp_path / "apart", only="other/7")  # a scheduler adds a seed by itself
    study.execute(config, tmp_path / "apart", "report")
    assert ran == ["other/7"]
    assert "7" in stored.results(tmp_path / "apart")["table"]["other"]["PGD"]["values"]
    ran.clear()
    study.execute(config, tmp_path / "apart", "evaluate")
    assert len(ran) == 9 + 2 * (len(test["values"]) - 3) + 1  # each once, the added ones too

    narrow = small_study(**{**fields, "claims.a.widest": 0.01, "seeds_limit": 4})
    ran = fake_runs(monkeypatch, apart)
    study.execute(narrow, tmp_path / "limit")
    assert len(ran) <= 9 + 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base.threat.eps": 0.3}, "config.threat.eps: .* → 0.3.*what trains cannot be changed"),
        ({"base.attacks.pgd": {"eps": (0.1,), "num_steps": 7}}, "pgd is not what was evaluated"),
    ],
)
def test_runs_of_another_threat_or_attack_are_not_collected(fields, said, tmp_path, monkeypatch):
    ran = fake_runs(monkeypatch)
    study.execute(small_study(), tmp_path)
    study.execute(small_study(**{"base.attacks.pgd": {"eps": (0.1, 0.2)}}), tmp_path, "report")
    with pytest.raises(UserError, match=f"at/0.*{said}"):
        study.execute(small_study(**fields), tmp_path, "report")
    if "base.threat.eps" in fields:  # before any run is attacked again
        ran.clear()
        for mode in ("train", "evaluate"):
            with pytest.raises(UserError, match=f"at/0.*{said}"):
                study.execute(small_study(**fields), tmp_path, mode)
        assert not ran
    (tmp_path / "at" / "0" / "config.json").unlink()
    with pytest.raises(UserError, match="at/0 has results and no config.json"):
        study.execute(small_study(), tmp_path, "report")


def test_an_arm_of_a_wrong_type_is_told_with_its_field():
    config = small.get_config()
    config.arms.at = {"batch_size": "many", "threat": {"eps": "8/255"}}
    with pytest.raises(UserError, match="config.batch_size must be a whole number, not 'many'"):
        study.check(study.settled(config), check_run)
    config.arms.at = {"threat": {"eps": "8/255"}}
    study.check(study.settled(config), check_run)


def test_fewer_than_three_seeds_are_warned_of(tmp_path, monkeypatch):
    fake_runs(monkeypatch)
    said = []
    monkeypatch.setattr(study.logging, "warning", lambda text, *values: said.append(text % values))
    study.execute(small_study(seeds=(0, 1)), tmp_path / "two")
    study.execute(small_study(), tmp_path / "three")
    assert said == ["2 seeds: no verdicts, an interval needs three"]


def test_a_finished_study_cannot_become_another(tmp_path, monkeypatch):
    fake_runs(monkeypatch)
    study.execute(small_study(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(UserError, match="holds another study, 'Uncertainty promotion"):
        study.execute(config_of("energy"), tmp_path, "report")
    with pytest.raises(UserError, match="at/0 holds a run of another config.*batch_size: 128 → 64"):
        study.execute(small_study(**{"base.batch_size": 64}), tmp_path, "report")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_a_study_keeps_no_programs_of_its_runs(tmp_path, monkeypatch):
    # A process may have 65,530 memory maps, and the programs of a run take some thousand.
    forget = study._forget_a_run
    fake_runs(monkeypatch)
    monkeypatch.setattr(study, "_forget_a_run", forget)
    fake, compiled = study.run.execute, []
    loaded = jax.devices()[0].client.live_executables

    def execute(config, *arguments):
        compiled.append(jax.jit(lambda x: x * len(compiled)))  # something keeps a reference
        compiled[-1](float(config.seed))
        held.append(len(loaded()))
        return fake(config, *arguments)

    held: list[int] = []
    monkeypatch.setattr(study.run, "execute", execute)
    forget()  # drops the programs of other tests
    study.execute(small_study(seeds=(0, 1)), tmp_path, only="at")
    assert len(held) == 2 and held[1] <= held[0]


SWEEP = {"field": "regularizers.entropy.weight", "values": (0.1, 1.0, 3.0)}


def best_at_one(config):
    """The entropy's weight decides: 1 is best, and 3 comes nearer to 0.3 than 0.1 does."""
    weight = config.regularizers.entropy.weight
    return {0.0: 0.4, 0.1: 0.2, 1.0: 0.6, 3.0: 0.35}[weight]


def test_a_sweep_chooses_a_value_that_the_seeds_then_have(tmp_path, monkeypatch):
    ran = fake_runs(monkeypatch, best_at_one, page=True)
    config = small_study(**{"arms.entm.sweep": SWEEP})
    study.check(config, check_run)
    with pytest.raises(UserError, match="entm is not chosen yet: run --only=entm/sweep first"):
        study.execute(config, tmp_path, only="entm/0")
    assert "no verdict" in study.execute(config, tmp_path, "report")
    study.execute(config, tmp_path, only="entm/sweep")
    swept = [f"entm/sweep/{value}" for value in SWEEP["values"]]
    assert ran == swept
    for name in swept:
        own = stored.results(tmp_path / name)["config"]
        assert own["seed"] not in config.seeds and not own["attacks"]
        assert own["audit"]["num_examples"] == 0
    study.execute(config, tmp_path, only="entm/0")
    study.execute(config, tmp_path)
    assert ran.count("entm/sweep/1.0") == ran.count("entm/0") == 1
    for seed in config.seeds:
        own = stored.results(tmp_path / "entm" / str(seed))["config"]
        assert own["regularizers"]["entropy"]["weight"] == 1.0 and own["seed"] == seed
        assert list(own["attacks"]) == ["pgd"] and "sweep" not in own
    results = stored.results(tmp_path)
    assert results["sweeps"]["entm"] == {
        **SWEEP,
        "values": [0.1, 1.0, 3.0],
        "by": "training.best.robust_accuracy",
        "found": [0.2, 0.6, 0.35],
        "nearest": None,
        "target": None,
        "chosen": 1.0,
    }
    assert results["configs"]["entm"]["regularizers"]["entropy"]["weight"] == 1.0
    assert (tmp_path / "figures" / "sweeps.svg").exists()
    assert "At an edge" not in (tmp_path / "results.md").read_text()
    again = stored.from_json(json.loads((tmp_path / "study.json").read_text()))
    assert study.settled(again).to_dict() == config.to_dict()


def test_a_page_says_what_each_test_rests_on(tmp_path, monkeypatch):
    def accuracy(config):
        return 0.53 if config.regularizers.entropy.weight else 0.5

    fake_runs(monkeypatch, accuracy, num_images=2000, page=True)
    config = small_study(
        **{
            "labels": ConfigDict({"entm": "AT + EntM"}),
            "arms.entm.sweep": SWEEP,
            "seeds": (0, 1, 2),
        }
    )
    said = study.execute(config, tmp_path)
    assert said.startswith("supported, but small: Better.")
    readme, page = ((tmp_path / name).read_text() for name in ("results.md", "report.html"))
    mean, low, high = (
        100 * stored.results(tmp_path)["claims"]["a"]["tests"][0][end]
        for end in ("mean", "low", "high")
    )
    assert 0 < low < mean < high < 5
    found = f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
    line = ("PGD: AT + EntM above at", found, "5 points", "3 seeds × 2,000 images")
    assert f"| {' | '.join(line)} | supported, but small |" in readme
    assert all(part in page for part in (found, *line[2:], "Number of tests: 1.", "Sweeps: what"))
    made_by = "Made by robust_jax 0.2.0, jax 0.10.2 and 0.11.2."
    assert made_by in readme and made_by in page


def test_a_sweep_can_choose_what_is_nearest_to_another_arm(tmp_path, monkeypatch):
    fake_runs(monkeypatch, best_at_one, page=True)
    ls = {
        "regularizers": {"entropy": {"weight": 1.0}},
        "sweep": {**SWEEP, "values": (0.1,), "by": "training.best.robust_accuracy"},
    }
    by = "measurements.outputs.mean_confidence"
    # The matched arm comes first in the config, and runs after the arm it is matched with.
    matched = {**SWEEP, "values": (1.0, 3.0), "nearest": "other", "by": by}
    config = small_study(
        **{
            "arms.entm.sweep": matched,
            "arms.other": ls,
            "sweep.base": {"measurements": {"outputs": {"num_examples": 100}}},
        }
    )
    study.check(config, check_run)
    with pytest.raises(UserError, match="run --only=other/sweep and --only=entm/sweep first"):
        study.execute(config, tmp_path, only="entm/0")
    study.execute(config, tmp_path)
    sweeps = stored.results(tmp_path)["sweeps"]
    assert sweeps["other"]["chosen"] == 0.1 and sweeps["entm"]["chosen"] == 3.0
    np.testing.assert_allclose(sweeps["entm"]["target"], 0.4)
    page = (tmp_path / "results.md").read_text()
    assert "At an edge, so a better value may lie beyond: entm (3)." in page
    np.testing.assert_allclose(sweeps["entm"]["found"], [1.2, 0.7])


def test_a_sweep_chooses_once_all_is_run_and_leaves_out_what_has_no_number(tmp_path, monkeypatch):
    def accuracy(config):
        value = best_at_one(config)
        return value if value < 0.6 else float("nan")  # it diverged: null in its results

    fake_runs(monkeypatch, accuracy)
    config = small_study(**{"arms.entm.sweep": SWEEP})
    trials = list(arms.sweep_trials(config, "entm"))
    for trial in reversed(trials):
        assert arms.swept(config, tmp_path)["entm"].chosen is None
        study.run.execute(trial.config, tmp_path / trial.name, "train")
    results = tmp_path / trials[1].name / "results.json"
    results.write_text(results.read_text().replace("NaN", "null"))
    sweep = arms.swept(config, tmp_path)["entm"]
    assert sweep.found == [0.2, None, 0.35] and sweep.chosen == 3.0


WRONG_SWEEPS = {
    "key": ({"feild": "x"}, "sweep's key is 'feild'; did you mean field"),
    "no values": ({"field": "batch_size"}, "sweep.values is missing"),
    "field": ({"field": "regularizers.entropi.weight", "values": (1.0,)}, "the arm does not have"),
    "text": (
        {"field": "loss.name", "values": ("cross_entropy",)},
        "takes a numeric field and a tuple of numbers",
    ),
    "values": ({**SWEEP, "values": (1.0, "2")}, "takes a numeric field and a tuple of numbers"),
    "one number": ({**SWEEP, "values": 1.0}, "takes a numeric field and a tuple of numbers"),
    "the same twice": ({**SWEEP, "values": (1.0, 1.0)}, "give different numbers"),
    "range": ({"field": "learning_rate", "values": (0.1, -1.0)}, "learning_rate is -1.0; it must"),
    "measure": ({**SWEEP, "by": "training.best.acuracy"}, "'acuracy'; choices|did you mean"),
    "not measured": ({**SWEEP, "by": "pgd@0.1"}, "sweep.by's attack is 'pgd'; choices: none"),
    "nearest": ({**SWEEP, "nearest": "entm"}, "sweep.nearest is 'entm'; choices: none"),
}


@pytest.mark.parametrize("case", WRONG_SWEEPS)
def test_a_typo_in_a_sweep_is_found_before_anything_runs(case):
    sweep, message = WRONG_SWEEPS[case]
    with pytest.raises(UserError, match=message) as error:
        study.check(small_study(**{"arms.entm.sweep": sweep}), check_run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms.entm.sweep": SWEEP, "sweep.seed": 1}, "config.sweep.seed is 1, a seed of the stu"),
        (
            {"labels": ConfigDict({"et": "EntM"})},
            "config.labels' arm is 'et'; did you mean|choices",
        ),
        ({"seeds_limit": 2}, "config.seeds_limit is 2, and there are 3 seeds"),
        ({"claims.a.smalest": 0.1}, "a's key is 'smalest'; choices|did you mean smallest_effect"),
        ({"claims.a.widest": "much"}, "a's widest is 'much'; it is a number"),
        ({"sweep.bi": "x"}, "config.sweep's field is 'bi'; did you mean by|choices"),
    ],
)
def test_a_typo_in_what_decides_is_found_before_anything_runs(fields, message):
    with pytest.raises(UserError, match=message) as error:
        study.check(small_study(**fields), check_run)
    assert "\n" not in str(error.value)


def test_a_scale_can_set_seeds_sweeps_and_values(tmp_path):
    config = importlib.import_module("configs.studies.entm").get_config()
    config.arms.entm.sweep = SWEEP
    config.scales["medium"] = {
        "seeds": (0, 1, 2, 3),
        "seeds_limit": 8,
        "radii": config.scales["small"]["radii"],
        "sweep": {"base": {"duration": "1 epoch"}},
        "arms": {"entm": {"sweep": {"values": (0.5, 2.0)}}},
    }
    config.scale = "medium"
    medium = study.settled(config)
    study.check(medium, check_run)
    assert arms.extra_seeds(medium) == (4, 5, 6, 7)
    swept = list(arms.sweep_trials(medium, "entm"))
    assert [t.config.regularizers.entropy.weight for t in swept] == [0.5, 2.0]
    assert {t.config.duration for t in swept} == {"1 epoch"}
    config.scales["medium"]["sedes"] = (0,)
    with pytest.raises(UserError, match="scales.medium's field is 'sedes'; did you mean seeds"):
        study.settled(config)


def test_mistakes_are_told(tmp_path):
    config = config_of("entm")
    with pytest.raises(UserError, match="--only's arm is 'atentm'; did you mean at_entm"):
        study.execute(config, tmp_path, only="atentm")
    with pytest.raises(UserError, match="--only's seed is '7'; choices: 0, 1, 2"):
        study.execute(config, tmp_path, only="at/7")
    with pytest.raises(UserError, match="--mode=verify is for one run"):
        study.execute(config, tmp_path, "verify")
    with pytest.raises(UserError, match="--mode=report is about the whole study"):
        study.execute(config, tmp_path, "report", only="at")
    with pytest.raises(UserError, match="--mode=audit is for the seeds of entm"):
        study.execute(config, tmp_path, "audit", only="entm/sweep")
    with pytest.raises(
        UserError, match="config.scale is 'tiny'; choices: full, medium, small, smoke"
    ):
        config_of("entm", scale="tiny")
    with pytest.raises(UserError, match="a study's field is 'seed'; did you mean seeds"):
        config_of("entm", seed=3)
    config = config_of("entm", **{"arms.ce.loss_at": "clean"})
    with pytest.raises(UserError, match="config.loss_at is not a field of a config; did you mean"):
        study.check(config, check_run)
    assert not list(tmp_path.iterdir())


def test_numbers_along_training_are_those_of_the_validations(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.2)):
        (tmp_path / str(seed)).mkdir()
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
    # A run whose margins were all infinite has none.
    assert study._history([tmp_path / "0"], "average_margin_attack") == []
    # Nor has one that was copied without its metrics.jsonl.
    (tmp_path / "copied").mkdir()
    assert study._history([tmp_path / "copied"], "average_margin") == []
