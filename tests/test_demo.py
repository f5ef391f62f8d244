"""The demo: launch.py in a process of its own, as its user runs it, and everything it leaves."""

import fcntl
import html.parser
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

from configs import default
from configs.studies import entm
from robust_jax.app import config as config_lib
from robust_jax.app import results as results_lib
from robust_jax.app import stored
from robust_jax.app.pages import report
from robust_jax.app.run import execute
from robust_jax.app.studies import measures
from robust_jax.errors import UserError
from robust_jax.files import write_json
from tests.conftest import environment_of, pages_undrawn
from tests.launches import default_with, flags
from tests.notebooks import NOTEBOOKS, code_cells, run_cell
from tests.pages import code

# The demo runs in its own process, where its pages are drawn.
pytestmark = pytest.mark.usefixtures("undrawn")

TINY = {
    "model.widths": (4, 4),
    "model.hidden": 8,
    "adversary.num_steps": 2,
    "duration": "3 epochs",
    "attacks": {"pgd_linf": {"name": "pgd", "eps": (0.1, 0.2), "num_steps": 3}},
    "audit.num_examples": 0,
}
AUTOATTACK = {
    "name": "autoattack",
    "eps": (0.05, 0.1),
    "version": ("apgd_ce", "square"),
    "num_examples": 100,
    "overrides": {"apgd_ce": {"num_steps": 5}, "square": {"num_queries": 50}},
}


ONE_MEMBER = {**AUTOATTACK, "eps": (0.1,), "version": ("square",), "num_examples": 40}


def fewer_attacks():
    """Part of the default config's grid, with AutoAttack on a small budget."""
    grid = default.attack_grid(
        linf=(0.1, 0.15, 0.2, 0.3), l2=(0.5, 1.0, 2.0), autoattack=("linf",)
    ).to_dict()
    grid["autoattack_linf"]["overrides"] = {
        "apgd_ce": {"num_steps": 10},
        "apgd_t": {"num_steps": 10},
        "fab_t": {"num_steps": 5},
        "square": {"num_queries": 100},
    }
    return {name: entry for name, entry in grid.items() if entry["name"] not in ("bim", "mim")}


class Size(NamedTuple):
    """A size of the demo: changed fields, number of test images, how it is compiled."""

    fields: dict[str, Any]
    count: int
    as_users_do: bool


SIZES = {
    # Learns and resists like the whole demo, with fewer images, attacks and queries.
    "small": Size(
        {
            "duration": "16 epochs",
            "evaluation.num_examples": 100,
            "attacks": fewer_attacks(),
            "audit.num_examples": 20,
            "audit.num_queries": 100,
        },
        count=100,
        as_users_do=False,
    ),
    "whole": Size({}, count=500, as_users_do=True),  # as in `make demo`
}


class Demo(NamedTuple):
    """A finished run: what launch.py printed, its folder and its size."""

    printed: str
    workdir: Path
    size: Size


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def demo(request, launch, tmp_path_factory):
    size = SIZES[request.param]
    workdir = tmp_path_factory.mktemp("demo") / "run"
    result = launch(*flags(size.fields), f"--workdir={workdir}", as_users_do=size.as_users_do)
    assert result.returncode == 0, result.stderr[-3000:]
    return Demo(result.stdout, workdir, size)


@pytest.fixture
def moved(demo, tmp_path):
    """The folder of a copy, since a run can be moved."""
    shutil.copytree(demo.workdir, tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small clean run, made in this process, that learns nothing."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    fields = {
        **TINY,
        "model": {"name": "mlp", "hidden": (8, 8)},
        "attacks": {"pgd_linf": {"name": "pgd", "eps": (0.1,)}, "autoattack_linf": ONE_MEMBER},
        "evaluation.num_examples": 100,
        "evaluation.num_images": 2,
        "learning_rate": 1e-5,
        "loss_on": "clean",
    }
    with pages_undrawn():
        execute(default_with(fields), workdir, "train")
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def results(demo):
    return results_in(demo.workdir)


def results_in(workdir):
    return json.loads((workdir / "results.json").read_text())


def accuracy(results, name, eps):
    return next(
        a["robust_accuracy"] for a in results["attacks"] if a["name"] == name and a["eps"] == eps
    )


def test_learns_and_is_robust_beyond_what_chance_and_standard_training_reach(demo, results):
    assert results["clean"]["accuracy"] > 0.95
    assert results["clean"]["count"] == demo.size.count
    assert accuracy(results, "worst_case_linf", 0.1) > 0.7
    assert accuracy(results, "worst_case_linf", 0.15) > 0.5
    assert accuracy(results, "worst_case_l2", 0.5) > 0.6


def test_attacks_do_bite(results):
    """A robust accuracy that no eps brings down would be masked gradients, not robustness."""
    assert accuracy(results, "pgd_linf", 0.3) < 0.1
    assert accuracy(results, "pgd_l2", 2.0) < 0.1
    for norm, eps in (("linf", 0.2), ("l2", 1.0)):
        assert accuracy(results, f"pgd_{norm}", eps) <= accuracy(results, f"fgsm_{norm}", eps)


def test_an_untrained_network_does_not_pass(finished):
    results = results_in(finished)
    assert results["clean"]["accuracy"] < 0.5
    assert accuracy(results, "worst_case_linf", 0.1) < 0.2


def test_results_are_the_means_of_the_records(demo, results):
    records = pd.read_csv(demo.workdir / "records" / "best.csv")
    assert (records["index"] == np.arange(demo.size.count)).all()
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
    best, last = (
        pd.read_csv(demo.workdir / "records" / f"{name}.csv") for name in ("best", "last")
    )
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
    assert (found["norm"], found["eps"], found["count"]) == ("linf", 0.15, demo.size.count)
    assert list(found["members"]) == ["clean", "apgd_ce", "apgd_t", "fab_t", "square"]
    assert found["members"]["clean"] == results["clean"]["accuracy"]
    assert found["members"]["square"] == found["robust_accuracy"]
    assert found["robust_accuracy"] <= accuracy(results, "pgd_linf", 0.15)
    assert results["audit"]["verdict"] == "pass"
    checks = [check["name"] for check in results["audit"]["checks"]]
    assert checks[-2:] == ["square", "transfer"] and len(checks) == 11
    assert report.audit_sentence(results) in (demo.workdir / "report.html").read_text()
    card = json.loads((demo.workdir / "card.json").read_text())
    assert card["autoattack_acc"] == f"{100 * found['robust_accuracy']:.2f}"
    assert (card["threat_model"], card["eps"], card["unreliable"]) == ("Linf", "0.15", False)
    assert (card["additional_data"], card["number_forward_passes"]) == (False, 1)
    assert not (demo.workdir / "unfinished").exists()


def test_best_is_the_step_of_the_highest_robust_validation_accuracy(demo, results):
    lines = [json.loads(line) for line in (demo.workdir / "metrics.jsonl").read_text().splitlines()]
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
    device = {"platform": "cpu", "kind": "cpu", "count": 1, "matmul_precision": None}
    assert results["device"] == device
    with jax.default_matmul_precision("highest"):
        assert results_lib.device()["matmul_precision"] == "highest"
    assert {"jax", "flax", "optax", "python", "robust_jax"} <= set(results["versions"])
    assert results["timings"]["examples_per_second"] > 0
    assert results["jacobian"]["logits"]["frobenius"]["mean"] > 0
    # As users compile it, two computations of one logit's gradient differ by rounding.
    assert 0 < results["relative_slope"]["median"] < 100 and 0.1 < results["temperature"] < 10
    # The EntM study's table, since test_study_runs.py runs none of its arms.
    for _, measure in entm.get_config().measures:
        if not re.match(r"\w+@|measurements\.|audit\.", measure):
            assert measures.value(results, measure) is not None, measure


def test_the_table_is_printed_and_the_page_is_self_contained(demo, results):
    assert report.table(results) in demo.printed
    page = (demo.workdir / "report.html").read_text()

    class Links(html.parser.HTMLParser):
        found: list = []

        def handle_starttag(self, tag, attributes):
            self.found += [v for k, v in attributes if k in ("src", "href")]

    Links().feed(page)
    assert all(link.startswith(("data:", "#")) for link in Links.found)
    assert f"{100 * results['clean']['accuracy']:.1f}" in page


def test_a_finished_run_says_so_and_keeps_its_files(demo, results, caplog):
    before = (demo.workdir / "results.json").read_bytes()
    with caplog.at_level(logging.INFO, "absl"):
        said = execute(stored.config_of(demo.workdir), demo.workdir, "train")
    assert said == report.table(results)
    assert "is finished" in caplog.text
    assert (demo.workdir / "results.json").read_bytes() == before


def test_a_finished_run_without_its_last_checkpoint_is_not_trained_again(copied):
    shutil.rmtree(copied / "checkpoints" / "last")

    def times():
        return {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.name != ".lock"}

    before = times()
    execute(stored.config_of(copied), copied, "train")
    assert times() == before
    with pytest.raises(UserError, match="last is empty: .* if the run is finished, put the folder"):
        execute(stored.config_of(copied), copied, "evaluate")


def test_a_finished_run_without_its_page_gets_it(copied):
    """The run was stopped before it wrote its last file."""

    before = (copied / "report.html").read_text(encoding="utf-8")
    (copied / "report.html").unlink()
    execute(stored.config_of(copied), copied, "train")
    assert (copied / "report.html").read_text(encoding="utf-8") == before


def test_another_config_in_the_same_folder_is_refused(demo):
    before = {p: p.stat().st_mtime_ns for p in demo.workdir.rglob("*")}
    config = stored.config_of(demo.workdir)
    config.seed = 7
    with pytest.raises(UserError, match=r"a run of another config \(config.seed: 0 → 7\)"):
        execute(config, demo.workdir, "train")
    assert {p: p.stat().st_mtime_ns for p in demo.workdir.rglob("*")} == before


def test_report_mode_writes_the_page_again(moved, launch):
    page = (moved / "report.html").read_text()
    (moved / "report.html").unlink()
    assert not list(moved.rglob("*.pending"))
    said = launch(f"--workdir={moved}", "--mode=report")  # finds the config in the folder
    assert said.stdout == f"report: {moved / 'report.html'}\n", said.stderr[-3000:]
    assert (moved / "report.html").read_text() == page


def test_evaluate_mode_takes_other_attacks_and_gives_the_same_numbers_for_the_same(
    finished, copied, results
):
    audited = results["audit"]  # as if the small run had one
    results, config = {**results_in(copied), "audit": audited}, stored.config_of(copied)
    write_json(copied / "results.json", results)
    before = pd.read_csv(copied / "records" / "best.csv")
    pgd = {"name": "pgd", "eps": (0.05, 0.1, 0.12)}
    config.attacks = ConfigDict({"pgd_linf": pgd})
    execute(config, copied, "evaluate")
    again = results_in(copied)
    assert {a["name"] for a in again["attacks"]} >= {"pgd_linf", "worst_case_linf"}
    assert accuracy(again, "pgd_linf", 0.1) == accuracy(results, "pgd_linf", 0.1)
    assert accuracy(again, "pgd_linf", 0.12) <= accuracy(again, "pgd_linf", 0.1)
    assert accuracy(again, "autoattack_linf", 0.1) == accuracy(results, "autoattack_linf", 0.1)
    assert again["clean"] == results["clean"] and again["audit"] == audited
    after = pd.read_csv(copied / "records" / "best.csv")
    for column in ("margin", "pgd_linf@0.1/held"):
        pd.testing.assert_series_equal(after[column], before[column])
    assert 0 < after["pgd_linf@0.1/held"].sum() < after["correct"].sum()
    # The folder now belongs to a run with these attacks.
    with pytest.raises(UserError, match="is finished, and was evaluated with.*--mode=evaluate"):
        execute(stored.config_of(finished), copied, "train")


@pytest.mark.slow  # goes with the whole demo; the test above covers the mode
def test_launch_evaluates_the_demo_again_and_keeps_its_audit(demo, results, moved, launch):
    pgd = {"name": "pgd", "norm": "linf", "eps": (0.1, 0.15), "num_steps": 20, "num_restarts": 3}
    result = launch(
        *flags(demo.size.fields),
        f"--workdir={moved}",
        "--mode=evaluate",
        f"--config.attacks={ ({'pgd_linf': pgd})!r}",
        "--config.audit.num_examples=0",
        as_users_do=demo.size.as_users_do,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    again = results_in(moved)
    for eps in (0.1, 0.15):
        assert accuracy(again, "pgd_linf", eps) == accuracy(results, "pgd_linf", eps)
    assert again["clean"] == results["clean"] and again["audit"] == results["audit"]


def test_a_run_whose_evaluation_was_killed_is_evaluated_again(copied):
    results, config = results_in(copied), stored.config_of(copied)
    (copied / "results.json").unlink()  # written last
    (copied / "report.html").unlink()
    records = copied / "records" / "best.csv.pending"
    records.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        execute(config, copied, "train")
    records.unlink()
    with (copied / ".lock").open("w") as lock:  # as another process would
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another process is at work in {copied}"):
            execute(config, copied, "train")
    execute(config, copied, "train")
    again = results_in(copied)
    for key in ("clean", "attacks", "jacobian", "last", "best"):
        assert again[key] == results[key]
    assert (copied / "report.html").exists()


def test_a_clean_objective_does_not_claim_an_adversary(finished):
    results = results_in(finished)
    assert results["trained_against"] is None
    assert "adversary" not in report.title(results)
    assert "not a size it was trained against" in report.headline(results)


def test_verify_finds_every_adversarial_again_or_says_what_differs(copied):
    config = stored.config_of(copied)
    assert "confirmed: every adversarial" in execute(config, copied, "verify")
    results = results_in(copied)
    counts = {a["name"]: a["count"] for a in results["attacks"]}
    assert counts == {
        "pgd_linf": 100,
        "autoattack_linf": 40,
        "worst_case_linf": 100,
        "worst_case_linf_first_40": 40,
    }
    # An image that was broken is passed off as one that held, and two numbers are made up.
    path = copied / "records" / "best.csv"
    records = pd.read_csv(path)
    broken = records.index[(records["pgd_linf@0.1/held"] == False) & records["correct"]]  # noqa: E712
    records.loc[broken[0], "pgd_linf@0.1/held"] = True
    records.to_csv(path, index=False)
    results["last"]["attacks"][0]["robust_accuracy"] += 0.1
    results["clean"]["accuracy"] += 0.1
    (copied / "results.json").write_text(json.dumps(results))
    wrong = "is not confirmed: records/best.csv pgd_linf@0.1/held: 1 rows"
    with pytest.raises(UserError, match=re.escape(wrong)) as told:
        execute(config, copied, "verify")
    for name in ("attacks", "best.attacks", "last.attacks", "clean"):
        assert f"results.json {name} is not what the records add up to" in str(told.value)
    assert "best.clean is not" not in str(told.value)


def test_verify_takes_what_an_older_version_left(copied):
    results, tree = results_in(copied), json.loads((copied / "config.json").read_text())
    for written in (tree, results["config"]):
        written.pop("train_size")
    for table in (results, results["best"], results["last"]):
        for number in ("temperature", "relative_slope"):
            table.pop(number)
        table["jacobian"].pop("matched")
    (copied / "config.json").write_text(json.dumps(tree))
    (copied / "results.json").write_text(json.dumps(results))
    for path in (copied / "records").iterdir():
        pd.read_csv(path).drop(columns="relative_slope").to_csv(path, index=False)
    assert "confirmed" in execute(stored.config_of(copied), copied, "verify")


def test_a_record_s_key_makes_its_adversarial_again(demo):
    """As the docs say, the attack's key is the row's, folded with the attack's name."""
    import zlib

    import jax

    from robust_jax import data
    from robust_jax.app.subject import load
    from robust_jax.attacks import pgd

    records = pd.read_csv(demo.workdir / "records" / "best.csv", dtype={"key": str})
    broken = records[(records["pgd_linf@0.15/held"] == False) & records["pgd_linf@0.1/held"]]  # noqa: E712
    rows = broken.iloc[:8]
    words = [[int(key[:8], 16), int(key[8:], 16)] for key in rows["key"]]
    keys = jax.random.wrap_key_data(np.array(words, np.uint32))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(b"pgd_linf")))(keys)
    logits_fn = load(demo.workdir).logits_fn
    images = data.to_pixels(data.load("digits", validation_size=197).test.images)[
        rows["index"].values
    ]
    x_adv = pgd(
        logits_fn, images, rows["label"].values, keys, eps=0.15, num_steps=20, num_restarts=3
    )
    distance = np.abs(x_adv - images).max((1, 2, 3))
    np.testing.assert_allclose(distance, rows["pgd_linf@0.15/distance"], atol=1e-5)
    assert (np.argmax(logits_fn(x_adv), -1) != rows["label"]).all()


def test_a_run_s_networks_are_those_of_its_records(demo, results):
    from robust_jax import data, losses
    from robust_jax.app.subject import load

    records = stored.load(demo.workdir).records
    assert results["best"]["step"] < results["last"]["step"]
    margins = {}
    for at in ("best", "last", "initialisation"):
        subject = load(demo.workdir, at)
        test = subject.dataset.test
        num = len(records["best"])
        logits = subject.logits_fn(data.to_pixels(test.images[:num]))
        margins[at] = np.asarray(-losses.margin_loss(logits, test.labels[:num]))
    for at in ("best", "last"):
        np.testing.assert_allclose(margins[at], records[at]["margin"], atol=1e-3)
        for other in margins.keys() - {at}:
            assert np.abs(margins[other] - records[at]["margin"]).max() > 0.01
    assert (margins["initialisation"] > 0).mean() < 0.5


def test_autoattack_alone_is_evaluated(copied):
    """The run was stopped after training, before anything was evaluated."""
    for name in ("results.json", "card.json", "examples.npz"):
        (copied / name).unlink()
    config = stored.config_of(copied)
    config.attacks = ConfigDict({"autoattack": {**ONE_MEMBER, "eps": (0.05, 0.1)}})
    write_json(copied / "config.json", config_lib.to_json(config))
    execute(config, copied, "train")
    card = json.loads((copied / "card.json").read_text())
    assert card["eps"] == "0.05" and "not the standard budgets" in card["footnote"]
    assert not (copied / "examples.npz").exists()


def test_the_best_alone_is_evaluated_if_the_config_says_so_and_the_last_later(copied):
    whole = results_in(copied)
    assert whole["best"]["step"] != whole["last"]["step"]
    shutil.rmtree(copied / "records")
    (copied / "results.json").unlink()
    config = stored.config_of(copied)
    config.evaluation.last = False
    write_json(copied / "config.json", config_lib.to_json(config))
    execute(config, copied, "train")
    alone = results_in(copied)
    assert "last" not in alone and alone["best"] == whole["best"]
    assert [path.name for path in (copied / "records").iterdir()] == ["best.csv"]
    assert "is the only one that was evaluated" in (copied / "report.html").read_text()
    assert "confirmed" in execute(config, copied, "verify")
    config.evaluation.last = True
    execute(config, copied, "evaluate")
    both = results_in(copied)
    assert (both["best"], both["last"]) == (whole["best"], whole["last"])
    config.evaluation.last = False  # earlier results stay
    execute(config, copied, "evaluate")
    assert results_in(copied)["last"] == whole["last"]


def test_audit_mode_looks_again(finished, copied, results):
    audited = results["audit"]  # as if the small run had one
    results, config = {**results_in(copied), "audit": audited}, stored.config_of(copied)
    write_json(copied / "results.json", results)
    before = (copied / "results.json").read_bytes()
    config.audit.num_examples, config.audit.surrogate = 20, "nowhere"
    with pytest.raises(UserError, match="config.audit.surrogate is 'nowhere', which holds no run"):
        execute(config, copied, "audit")
    config.audit.num_examples = 0
    with pytest.raises(UserError, match="config.audit.num_examples is 0; say how many"):
        execute(config, copied, "audit")
    assert (copied / "results.json").read_bytes() == before
    config.audit.num_examples = 20
    config.audit.num_queries, config.audit.surrogate = 50, str(finished)
    execute(config, copied, "audit")
    again = results_in(copied)
    assert again["config"]["audit"]["num_queries"] == 50
    transfer = again["audit"]["checks"][-1]
    assert transfer["name"] == "transfer" and str(finished) in transfer["values"]
    assert again["attacks"] == results["attacks"]
    assert report.audit_sentence(again) in (copied / "report.html").read_text()


@pytest.mark.slow  # test_processes.py compares four devices with one, test_train.py steps on eight
def test_eight_devices_give_the_numbers_of_one(launch, tmp_path):
    found = {}
    for devices, mapping in ((1, "pmap"), (8, "pmap"), (8, "shard_map")):
        workdir = tmp_path / f"{devices}_{mapping}"
        result = launch(
            *flags(TINY), f"--workdir={workdir}", f"--config.parallel={mapping}", devices=devices
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found[devices, mapping] = results_in(workdir)
    # A run may continue or be evaluated again on another number of devices.
    again = launch(*flags(TINY), f"--workdir={tmp_path / '8_pmap'}", "--mode=evaluate", devices=1)
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
        shutil.copytree(demo.workdir, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    for example in code("docs/analyse_runs.md"):
        exec(example, {})


# Replaces the notebooks' images, steps, queries and attacks by just enough to show that every cell
# runs. A network that is audited twice is compiled once.
FEWER = {
    "[:200]": "[:20]",
    "arange(200)": "arange(20)",
    "arange(80)": "arange(20)",
    "[:50]": "[:10]",
    "num_steps=20": "num_steps=5",
    "num_queries=500": "num_queries=20",
    "num_queries=300": "num_queries=20",
    "audit(honest, x, y, key": "audit(rounded, x, y, key",
    """overrides={"square": {"num_queries": 500}}""": (
        f"version={AUTOATTACK['version']}, overrides={AUTOATTACK['overrides']}"
    ),
}


@pytest.fixture
def beside_the_demo(demo, moved, monkeypatch):
    """Sets the runs that the notebooks read, and enters the notebooks' folder."""
    monkeypatch.setenv("ROBUST_JAX_RUN", str(demo.workdir))
    monkeypatch.setenv("ROBUST_JAX_RUNS", f"{demo.workdir} {moved}")
    monkeypatch.chdir(NOTEBOOKS[0].parent)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_of_a_notebook_runs_on_the_demo(path, beside_the_demo):
    namespace = {}
    with pd.option_context("display.max_colwidth", None):  # one of the notebooks sets it
        for source, committed in code_cells(path):
            for many, few in FEWER.items():
                source = source.replace(many, few)
            assert run_cell(source, namespace) == committed, source


def test_what_a_notebook_has_less_of_is_in_one():
    cells = [source for path in NOTEBOOKS for source, _ in code_cells(path)]
    for many in FEWER:
        assert any(many in source for source in cells), many


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=() if path.stem == "compare_runs" else pytest.mark.slow,
            id=path.name,
        )
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs_in_a_kernel(path, beside_the_demo, monkeypatch):
    import nbclient
    import nbformat

    # The one on Jacobians spends much more time computing than compiling.
    flags = environment_of(1, as_users_do=path.stem == "jacobian_norms")["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", flags)
    notebook = nbformat.read(path, as_version=4)
    committed = sum(len(cell.get("outputs", ())) for cell in notebook.cells)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    assert committed == sum(len(cell.get("outputs", ())) for cell in notebook.cells) > 0
