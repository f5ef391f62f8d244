"""The demo: launch.py in a process of its own, as its user runs it, and everything it leaves."""

import fcntl
import html.parser
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from configs import default
from robust_jax.app import report
from robust_jax.app.run import execute
from robust_jax.errors import UserError
from tests.conftest import REPOSITORY, environment_of
from tests.pages import code

TINY = (
    "--config=configs/default.py",
    "--config.model.widths=(4,4)",
    "--config.model.hidden=8",
    "--config.adversary.num_steps=2",
    "--config.duration=3 epochs",
    "--config.attacks=" + repr({"pgd_linf": {"name": "pgd", "eps": (0.1, 0.2), "num_steps": 3}}),
    "--config.audit.num_examples=0",
)
AUTOATTACK = {
    "name": "autoattack",
    "eps": (0.05, 0.1),
    "version": ("apgd_ce", "square"),
    "num_examples": 100,
    "overrides": {"apgd_ce": {"num_steps": 5}, "square": {"num_queries": 50}},
}


@pytest.fixture(scope="module")
def demo(launch, tmp_path_factory):
    """(what launch.py printed, the run's folder): the default config, as in `make demo`."""
    workdir = tmp_path_factory.mktemp("demo") / "run"
    result = launch("--config=configs/default.py", f"--workdir={workdir}", as_users_do=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result, workdir


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    """(flags, folder) of a small run's launch."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    attacks = {"pgd_linf": {"name": "pgd", "eps": (0.1,)}, "autoattack_linf": AUTOATTACK}
    flags = (*TINY, f"--config.attacks={attacks!r}")
    result = launch(*flags, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr[-3000:]
    return flags, workdir


@pytest.fixture
def copied(finished, tmp_path):
    """(flags, folder) of a copy, to do things to."""
    flags, workdir = finished
    shutil.copytree(workdir, tmp_path / "run")
    return (*flags, f"--workdir={tmp_path / 'run'}"), tmp_path / "run"


@pytest.fixture(scope="module")
def untrained(launch, tmp_path_factory):
    """Results of a clean objective that learns nothing."""
    workdir = tmp_path_factory.mktemp("untrained") / "run"
    result = launch(
        *TINY, f"--workdir={workdir}", "--config.learning_rate=1e-9", "--config.loss_on=clean"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def results(demo):
    return json.loads((demo[1] / "results.json").read_text())


def accuracy(results, name, eps):
    return next(
        a["robust_accuracy"] for a in results["attacks"] if a["name"] == name and a["eps"] == eps
    )


def test_learns_and_is_robust_beyond_what_chance_and_standard_training_reach(results):
    assert results["clean"]["accuracy"] > 0.95
    assert results["clean"]["count"] == 500
    assert accuracy(results, "worst_case_linf", 0.1) > 0.7
    assert accuracy(results, "worst_case_linf", 0.15) > 0.5
    assert accuracy(results, "worst_case_l2", 0.5) > 0.6


def test_attacks_do_bite(results):
    """A robust accuracy that no eps brings down would be masked gradients, not robustness."""
    assert accuracy(results, "pgd_linf", 0.3) < 0.1
    assert accuracy(results, "pgd_l2", 2.0) < 0.1
    for norm, eps in (("linf", 0.2), ("l2", 1.0)):
        assert accuracy(results, f"pgd_{norm}", eps) <= accuracy(results, f"fgsm_{norm}", eps)


def test_an_untrained_network_does_not_pass(untrained):
    assert untrained["clean"]["accuracy"] < 0.5
    assert accuracy(untrained, "worst_case_linf", 0.1) < 0.2


def test_results_are_the_means_of_the_records(demo, results):
    records = pd.read_csv(demo[1] / "records" / "best.csv")
    assert len(records) == 500
    assert (records["index"] == np.arange(500)).all()
    assert records["correct"].mean() == results["clean"]["accuracy"]
    assert ((records["prediction"] == records["label"]) == records["correct"]).all()
    assert ((records["margin"] > 0) == records["correct"]).all()
    assert (records["spectral_logits"] <= records["frobenius_logits"] * (1 + 1e-4)).all()
    assert records["entropy"].between(0, np.log(10) + 1e-5).all()
    assert records["confidence"].between(0, 1).all()
    best = records.loc[records["correct"], "confidence"]
    np.testing.assert_allclose(records.loc[records["correct"], "top_probability"], best, rtol=1e-4)
    assert (records["top_probability"] >= records["confidence"] - 1e-6).all()
    # The softmax's own Jacobian has a norm of at most ½.
    for norm in ("frobenius", "spectral"):
        assert (records[f"{norm}_probabilities"] <= 0.5001 * records[f"{norm}_logits"]).all()
        assert (records[f"{norm}_probabilities"] > 0).all()
    for attack in results["attacks"]:
        if attack["attack"] != "worst_case":
            column = f"{attack['name']}@{attack['eps']:g}"
            held, distance = records[f"{column}/held"], records[f"{column}/distance"]
            assert ((records[f"{column}/margin"] > 0) == held).all()
            assert (records[f"{column}/margin"] <= records["margin"] + 1e-4).mean() > 0.99
            assert held.mean() == attack["robust_accuracy"]
            assert (distance.isna() == held).all()
            assert distance.max() <= attack["eps"] * (1 + 1e-6) + 1e-6
    error = records["frobenius_estimate_error_logits"]
    z = (records["frobenius_estimate_logits"] - records["frobenius_logits"]) / error
    assert (z.abs() < 3).mean() > 0.9


def test_last_has_records_of_its_own(demo, results):
    best, last = (pd.read_csv(demo[1] / "records" / f"{name}.csv") for name in ("best", "last"))
    assert results["best"]["step"] != results["last"]["step"]
    assert (best["margin"] != last["margin"]).mean() > 0.9
    assert last["correct"].mean() == results["last"]["clean"]["accuracy"]


def test_accuracy_falls_with_eps_and_the_worst_case_is_the_worst(results):
    by_name = {}
    for attack in results["attacks"]:
        by_name.setdefault(attack["name"], []).append(attack["robust_accuracy"])
    for values in by_name.values():
        assert values == sorted(values, reverse=True)
        assert values[0] <= results["clean"]["accuracy"]
    for norm in ("linf", "l2"):
        worst = by_name[f"worst_case_{norm}"]
        for name, values in by_name.items():
            if name.endswith(norm) and len(values) == len(worst):
                assert all(w <= v for w, v in zip(worst, values, strict=True))


def test_autoattack_and_the_audit_end_the_demo(demo, results):
    found = next(a for a in results["attacks"] if a["attack"] == "autoattack")
    assert (found["norm"], found["eps"], found["count"]) == ("linf", 0.15, 500)
    assert list(found["members"]) == ["clean", "apgd_ce", "apgd_t", "fab_t", "square"]
    assert found["members"]["clean"] == results["clean"]["accuracy"]
    assert found["members"]["square"] == found["robust_accuracy"]
    assert found["robust_accuracy"] <= accuracy(results, "pgd_linf", 0.15)
    assert results["audit"]["verdict"] == "pass"
    checks = [check["name"] for check in results["audit"]["checks"]]
    assert checks[-2:] == ["square", "transfer"] and len(checks) == 11
    assert report.audit_sentence(results) in (demo[1] / "report.html").read_text()
    card = json.loads((demo[1] / "card.json").read_text())
    assert card["autoattack_acc"] == f"{100 * found['robust_accuracy']:.2f}"
    assert (card["threat_model"], card["eps"], card["unreliable"]) == ("Linf", "0.15", False)
    assert not (demo[1] / "unfinished").exists()


def test_best_is_the_step_of_the_highest_robust_validation_accuracy(demo, results):
    lines = [json.loads(line) for line in (demo[1] / "metrics.jsonl").read_text().splitlines()]
    accuracies = {
        line["step"]: line["validation/robust_accuracy"]
        for line in lines
        if "validation/robust_accuracy" in line
    }
    best = max(accuracies.values())
    assert results["best"]["step"] == min(s for s, a in accuracies.items() if a == best)
    assert results["last"]["step"] == max(accuracies)
    assert results["step"] == results["best"]["step"]


def test_results_say_how_they_were_made(results):
    assert results["seed"] == 0
    assert results["threat"] == results["trained_against"] == {"norm": "linf", "eps": 0.15}
    assert results["device"] == {"platform": "cpu", "kind": "cpu", "count": 1}
    assert {"jax", "flax", "optax", "python", "robust_jax"} <= set(results["versions"])
    assert results["timings"]["examples_per_second"] > 0
    assert results["jacobian"]["logits"]["frobenius"]["mean"] > 0
    # Compiled as for users, two computations of one logit's gradient differ by rounding.
    assert 0 < results["relative_slope"]["median"] < 100 and 0.1 < results["temperature"] < 10


def test_the_table_is_printed_and_the_page_is_self_contained(demo, results):
    printed, workdir = demo
    assert report.table(results) in printed.stdout
    page = (workdir / "report.html").read_text()

    class Links(html.parser.HTMLParser):
        found: list = []

        def handle_starttag(self, tag, attributes):
            self.found += [v for k, v in attributes if k in ("src", "href")]

    Links().feed(page)
    assert all(link.startswith(("data:", "#")) for link in Links.found)
    assert f"{100 * results['clean']['accuracy']:.1f}" in page


def test_a_finished_run_says_so_and_keeps_its_files(demo, launch):
    _, workdir = demo
    before = (workdir / "results.json").read_bytes()
    result = launch("--config=configs/default.py", f"--workdir={workdir}")
    assert result.returncode == 0
    assert "is finished" in result.stderr
    assert (workdir / "results.json").read_bytes() == before


def test_another_config_in_the_same_folder_is_refused(demo):
    _, workdir = demo
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    config = default.get_config()
    config.seed = 7
    with pytest.raises(UserError, match=r"a run of another config \(config.seed: 0 → 7\)"):
        execute(config, workdir, "train")
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_report_mode_writes_the_page_again(demo, launch, tmp_path):
    workdir = tmp_path / "copied"  # a run can be moved
    shutil.copytree(demo[1], workdir)
    page = (workdir / "report.html").read_text()
    (workdir / "report.html").unlink()
    assert not list(workdir.rglob("*.pending"))
    result = launch("--config=configs/default.py", f"--workdir={workdir}", "--mode=report")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (workdir / "report.html").read_text() == page


def test_evaluate_mode_takes_other_attacks_and_gives_the_same_numbers_for_the_same(
    demo, results, launch, tmp_path
):
    workdir = tmp_path / "copied"
    shutil.copytree(demo[1], workdir)
    attacks = {
        "pgd_linf": {
            "name": "pgd",
            "norm": "linf",
            "eps": (0.05, 0.1, 0.12),
            "num_steps": 20,
            "num_restarts": 3,
        }
    }
    result = launch(
        "--config=configs/default.py",
        f"--workdir={workdir}",
        "--mode=evaluate",
        f"--config.attacks={attacks!r}",
        as_users_do=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    again = json.loads((workdir / "results.json").read_text())
    assert {a["name"] for a in again["attacks"]} >= {"pgd_linf", "worst_case_linf"}
    for eps in (0.05, 0.1):
        assert accuracy(again, "pgd_linf", eps) == accuracy(results, "pgd_linf", eps)
    assert again["clean"] == results["clean"]
    # The folder is now that of a run with these attacks.
    result = launch("--config=configs/default.py", f"--workdir={workdir}")
    assert result.returncode == 1
    assert "is finished" in result.stderr and "--mode=evaluate" in result.stderr


def test_a_run_whose_evaluation_was_killed_is_evaluated_again(launch, copied):
    flags, workdir = copied
    results = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").unlink()  # written last
    (workdir / "report.html").unlink()
    records = workdir / "records" / "best.csv.pending"
    records.symlink_to("/dev/full")
    full = launch(*flags)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("error: No space left on device")
    records.unlink()
    with (workdir / ".lock").open("w") as lock:  # as another process would
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = launch(*flags)
    assert second.returncode == 1
    assert f"another process is at work in {workdir}" in second.stderr.splitlines()[-1]
    result = launch(*flags)
    assert result.returncode == 0, result.stderr[-3000:]
    again = json.loads((workdir / "results.json").read_text())
    for key in ("clean", "attacks", "jacobian", "last", "best"):
        assert again[key] == results[key]
    assert (workdir / "report.html").exists()


def test_a_clean_objective_does_not_claim_an_adversary(untrained):
    assert untrained["trained_against"] is None
    assert "adversary" not in report.title(untrained)
    assert "not a size it was trained against" in report.headline(untrained)


def test_verify_finds_every_adversarial_again_or_says_what_differs(launch, copied):
    flags, workdir = copied
    verified = launch(*flags, "--mode=verify")
    assert verified.returncode == 0, verified.stderr[-3000:]
    assert "confirmed: every adversarial" in verified.stdout
    results = json.loads((workdir / "results.json").read_text())
    counts = {a["name"]: a["count"] for a in results["attacks"]}
    assert counts == {
        "pgd_linf": 500,
        "autoattack_linf": 100,
        "worst_case_linf": 500,
        "worst_case_linf_first_100": 100,
    }
    # An image that was broken is passed off as one that held, and two numbers are made up.
    path = workdir / "records" / "best.csv"
    records = pd.read_csv(path)
    broken = records.index[(records["pgd_linf@0.1/held"] == False) & records["correct"]]  # noqa: E712
    records.loc[broken[0], "pgd_linf@0.1/held"] = True
    records.to_csv(path, index=False)
    results["last"]["attacks"][0]["robust_accuracy"] += 0.1
    results["clean"]["accuracy"] += 0.1
    (workdir / "results.json").write_text(json.dumps(results))
    verified = launch(*flags, "--mode=verify")
    assert verified.returncode == 1
    assert "is not confirmed: records/best.csv pgd_linf@0.1/held: 1 rows" in verified.stderr
    for name in ("attacks", "best.attacks", "last.attacks", "clean"):
        assert f"results.json {name} is not what the records add up to" in verified.stderr
    assert "best.clean is not" not in verified.stderr


def test_a_record_s_key_makes_its_adversarial_again(demo):
    """As docs say: the key of the row, folded with the attack's name."""
    import zlib

    import jax

    from robust_jax import data
    from robust_jax.app.subject import load
    from robust_jax.attacks import pgd

    records = pd.read_csv(demo[1] / "records" / "best.csv", dtype={"key": str})
    broken = records[(records["pgd_linf@0.15/held"] == False) & records["pgd_linf@0.1/held"]]  # noqa: E712
    rows = broken.iloc[:8]
    words = [[int(key[:8], 16), int(key[8:], 16)] for key in rows["key"]]
    keys = jax.random.wrap_key_data(np.array(words, np.uint32))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(b"pgd_linf")))(keys)
    logits_fn = load(demo[1]).logits_fn
    images = data.to_pixels(data.load("digits", validation_size=197).test.images)[
        rows["index"].values
    ]
    x_adv = pgd(
        logits_fn, images, rows["label"].values, keys, eps=0.15, num_steps=20, num_restarts=3
    )
    distance = np.abs(x_adv - images).max((1, 2, 3))
    np.testing.assert_allclose(distance, rows["pgd_linf@0.15/distance"], atol=1e-5)
    assert (np.argmax(logits_fn(x_adv), -1) != rows["label"]).all()


def test_autoattack_alone_is_evaluated(launch, tmp_path):
    flags = (*TINY, f"--config.attacks={ {'autoattack': AUTOATTACK}!r}")
    result = launch(*flags, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr[-3000:]
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert card["eps"] == "0.05" and "not the standard budgets" in card["footnote"]
    assert not (tmp_path / "run" / "examples.npz").exists()


def test_audit_mode_looks_again(demo, results, launch, tmp_path):
    workdir = tmp_path / "copied"
    shutil.copytree(demo[1], workdir)
    before = (workdir / "results.json").read_bytes()
    wrong = launch(
        "--config=configs/default.py",
        f"--workdir={workdir}",
        "--mode=audit",
        "--config.audit.surrogate=nowhere",
    )
    assert wrong.returncode == 1
    assert "config.audit.surrogate is 'nowhere', which holds no run" in wrong.stderr
    ignored = launch(f"--workdir={workdir}", "--mode=audit", "--config.threat.eps=0.3")
    assert ignored.returncode == 1
    assert "--mode=audit ignores config.threat.eps; use --mode=evaluate" in ignored.stderr
    assert (workdir / "results.json").read_bytes() == before
    result = launch(
        "--config=configs/default.py",
        f"--workdir={workdir}",
        "--mode=audit",
        "--config.audit.num_examples=60",
        "--config.audit.num_queries=50",
        f"--config.audit.surrogate={demo[1]}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    again = json.loads((workdir / "results.json").read_text())
    assert again["audit"]["num_examples"] <= 60
    transfer = again["audit"]["checks"][-1]
    assert transfer["name"] == "transfer" and str(demo[1]) in transfer["values"]
    assert again["attacks"] == results["attacks"]
    assert report.audit_sentence(again) in (workdir / "report.html").read_text()


@pytest.mark.slow  # test_processes.py has four devices beside one, test_train.py a step on eight
def test_eight_devices_give_the_numbers_of_one(launch, tmp_path):
    found = {}
    for devices, mapping in ((1, "pmap"), (8, "pmap"), (8, "shard_map")):
        workdir = tmp_path / f"{devices}_{mapping}"
        result = launch(
            *TINY, f"--workdir={workdir}", f"--config.parallel={mapping}", devices=devices
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found[devices, mapping] = json.loads((workdir / "results.json").read_text())
    # A run continues, or is measured again, on another number of devices.
    again = launch(*TINY, f"--workdir={tmp_path / '8_pmap'}", "--mode=evaluate", devices=1)
    assert again.returncode == 0, again.stderr[-3000:]
    one = found.pop((1, "pmap"))
    for other in found.values():
        assert other["device"]["count"] == 8
        # Sign steps turn rounding into a few different pixels, hence a few different examples.
        np.testing.assert_allclose(other["clean"]["accuracy"], one["clean"]["accuracy"], atol=0.02)
        for eps in (0.1, 0.2):
            np.testing.assert_allclose(
                accuracy(other, "pgd_linf", eps), accuracy(one, "pgd_linf", eps), atol=0.03
            )
        np.testing.assert_allclose(
            other["jacobian"]["logits"]["frobenius"]["mean"],
            one["jacobian"]["logits"]["frobenius"]["mean"],
            rtol=0.02,
        )


def test_the_page_on_reading_runs_runs_on_the_demo(demo, monkeypatch, tmp_path):
    for name in ("demo", "other"):
        shutil.copytree(demo[1], tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    for example in code("docs/analyse_runs.md"):
        exec(example, {})


@pytest.mark.parametrize("name", sorted(p.name for p in (REPOSITORY / "notebooks").glob("*.ipynb")))
def test_notebook_runs_on_the_demo(name, demo, monkeypatch, tmp_path):
    import nbclient
    import nbformat

    other = tmp_path / "other"  # to compare with
    shutil.copytree(demo[1], other)
    monkeypatch.setenv("ROBUST_JAX_RUN", str(demo[1]))
    monkeypatch.setenv("ROBUST_JAX_RUNS", f"{demo[1]} {other}")
    # That on Jacobians computes for much longer than it compiles.
    flags = environment_of(1, as_users_do=name == "jacobian_norms.ipynb")["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", flags)
    path = REPOSITORY / "notebooks" / name
    notebook = nbformat.read(path, as_version=4)
    committed = sum(len(cell.get("outputs", ())) for cell in notebook.cells)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    assert committed == sum(len(cell.get("outputs", ())) for cell in notebook.cells) > 0
