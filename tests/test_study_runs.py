"""Studies that train and attack: a seed of each, seeds together, part by part."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from ml_collections import ConfigDict

from robust_jax.app import config as config_lib
from robust_jax.app import folder, stored
from robust_jax.app.experiment import build
from robust_jax.app.studies import study
from robust_jax.train import loop
from tests import small_study as small
from tests.test_study import STUDIES, config_of, small_study


def test_seeds_train_together_and_leave_the_evaluation_to_their_runs(tmp_path, monkeypatch):
    config = small_study(seeds=(0, 1))
    trials = [trial for trial in study.trials(config) if trial.arm == "entm"]
    study.train_seeds_together(trials, tmp_path)
    plans = [build(trial.config).plan for trial in trials]
    for trial, plan in zip(trials, plans, strict=True):
        loop.restore(plan, tmp_path / trial.name)  # raises if training is not finished
        assert not (tmp_path / trial.name / "results.json").exists()
    (tmp_path / "entm" / "0" / "results.json").write_text("{}")
    monkeypatch.setattr(study.run, "train_together", None)  # one is left: nothing to share
    study.train_seeds_together(trials, tmp_path)


SMOKE_RUNS = {  # an arm of each study
    "entm": "at",
    "energy": "at_one_step",
    "adversarial_strength": "eps_1",
    "average_margin": "linear_regularised",
    "guided_complement_entropy": "gce",
}


def run_at_smoke(config, arm, workdir):
    """Runs a seed of one arm alone, then the report."""
    if "sweep" in config.arms[arm]:
        study.execute(config, workdir, only=f"{arm}/sweep")
    study.execute(config, workdir, only=f"{arm}/0")
    assert not (workdir / "report.html").exists()
    said = study.execute(config, workdir, "report")
    assert "no verdict" in said and max(map(len, said.splitlines())) <= 80
    results = stored.results(workdir)
    for label, measure in results["measures"].items():
        if not measure.startswith("audit."):  # smoke has no audit
            assert results["table"][arm][label]["mean"] is not None, label


@pytest.fixture
def on_few_images(monkeypatch):
    """on_few_images(name, workdir) runs a seed of a study with small networks and few samples."""

    def run(name, workdir):
        config = config_of(name, scale="smoke")
        if name in ("energy", "guided_complement_entropy"):
            config.base.model = ConfigDict({"name": "mlp", "hidden": (8,)})
        if config.base.model.name == "cnn":
            config.base.model.widths = (4,)
        config.base.duration = "1 epoch"
        config.base.evaluation.num_examples = 32  # so that each attack has batches of one size
        for entry in config.base.measurements.values():
            if "num_examples" in entry:
                entry.num_examples = min(entry.num_examples, 50)
        run_at_smoke(config, SMOKE_RUNS[name], workdir)

    monkeypatch.setattr(study, "_forget_a_run", lambda: None)  # studies share small programs
    monkeypatch.setattr(folder, "write_report", lambda *_: None)  # a run's page: see test_report.py
    return run


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_a_seed_of_each_study_runs(name, on_few_images, tmp_path, monkeypatch):
    written = []  # instead of a page: see test_study_report.py
    monkeypatch.setattr(study.report, "write", lambda *what: written.append(what))
    on_few_images(name, tmp_path)
    _, results, arrays = written[-1]
    for of_arm in results["published"].values():
        assert of_arm.keys() <= results["measures"].keys()
    if name == "guided_complement_entropy":
        assert 62.74 in results["published"]["gce"].values()
        assert {"clusters/projection", "clusters/label"} <= arrays["gce"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arm"),
    [
        *SMOKE_RUNS.items(),
        ("average_margin", "mlp_regularised"),
        ("average_margin", "cnn_regularised"),
        ("energy", "oscillation_few"),
    ],
)
def test_a_seed_of_each_study_runs_at_smoke(name, arm, tmp_path):
    run_at_smoke(config_of(name, scale="smoke"), arm, tmp_path)
    assert (tmp_path / "report.html").exists() and (tmp_path / "results.md").exists()


def test_a_study_runs_part_by_part_and_is_collected(launch, tmp_path, monkeypatch):
    flags = ("--config=tests/small_study.py", "--config.seeds=(0, 1)", f"--workdir={tmp_path}")
    config = small.get_config()
    config.seeds = (0, 1)
    monkeypatch.setattr(study, "_forget_a_run", lambda: None)
    monkeypatch.setattr(folder, "write_report", lambda *_: None)  # a run's page: see test_report.py
    config = study.settled(config, ["seeds"])
    study.execute(config, tmp_path, only="at/1")
    with ThreadPoolExecutor() as pool:  # two processes in one folder at the same time
        other = pool.submit(launch, *flags, "--only=at/1")  # which finds it finished
        study.execute(config, tmp_path, only="entm/0")
        assert other.result().returncode == 0, other.result().stderr[-3000:]
    assert not (tmp_path / "report.html").exists()
    before = stored.results(tmp_path / "at" / "1")

    def from_its_folder(*typed):
        config = stored.get_config(str(tmp_path))
        for path, value in typed:
            config_lib.set_field(config, path, value)
        return study.settled(config, [path for path, _ in typed])

    few = ConfigDict({"name": "outputs", "num_examples": 50})
    more = from_its_folder(("base.measurements.few", few))
    study.execute(more, tmp_path, "measure", only="at/1")
    after = stored.results(tmp_path / "at" / "1")
    arrays = stored.measured(tmp_path / "at" / "1")
    assert len(arrays["few/gap"]) == 50 < len(arrays["outputs/gap"])
    del after["measurements"]["few"], after["config"]["measurements"]["few"]
    assert after == before

    said = []
    monkeypatch.setattr(study.logging, "warning", lambda text, *values: said.append(text % values))
    study.execute(from_its_folder(), tmp_path, "report")
    assert said[-1] == "4 of 6 runs are not finished: at/0, other/0, entm/1, other/1"
    results = stored.results(tmp_path)
    assert list(results["table"]["at"]["clean"]["values"]) == ["1"]
    assert results["table"]["at"]["mean margin"]["images"] == len(arrays["outputs/gap"])
    assert results["table"]["other"]["clean"]["mean"] is None
    assert results["claims"]["a"]["verdict"] == "no verdict"
    assert "**no verdict**: Better." in (tmp_path / "results.md").read_text()
    assert "no verdict" in (tmp_path / "report.html").read_text()
    for name in ("accuracy", "measures"):
        assert 1000 < (tmp_path / "figures" / f"{name}.svg").stat().st_size < 500_000
