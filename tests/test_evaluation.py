"""One call for the whole verdict: the same numbers as its parts, and the files it leaves."""

import dataclasses
import json
import shutil
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

import robust_jax
from configs import default
from robust_jax import attacks, data, jacobian, losses, margins
from robust_jax.app import evaluation, stored
from robust_jax.app.experiment import build
from robust_jax.app.pages import compare
from robust_jax.attacks import _autoattack
from robust_jax.errors import UserError
from robust_jax.keys import fold_each, fold_in_each
from tests.calls import evaluate, lowerings
from tests.digits import EPS, test_points, trained
from tests.small_networks import examples, exported, network, weights_of

# Only the page of `found` is drawn, since tests read it.
pytestmark = pytest.mark.usefixtures("undrawn")

KEY = jax.random.key(0)
SETTINGS = {
    "eps": EPS,
    "version": ("apgd_ce", "square"),
    "num_audited": 20,
    "num_queries": 10,
    "training_loss": partial(losses.cross_entropy),  # as in launch.py, so that programs are shared
    "overrides": {"apgd_ce": {"num_steps": 5}, "square": {"num_queries": 10}},
    "progress": False,
}


def points():
    return test_points(60)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The evaluation of a network, and its folder."""
    folder = tmp_path_factory.mktemp("evaluation")
    x, y = points()
    return robust_jax.evaluate(
        trained(), x, y, KEY, folder=folder, name="an MLP", dataset="digits", **SETTINGS
    ), folder


def test_its_numbers_are_those_of_its_parts(found):
    result, _ = found
    x, y = points()
    logits_fn = trained()
    logits = np.asarray(logits_fn(x))
    assert result.clean_accuracy == (logits.argmax(-1) == y).mean()
    keys = fold_each(fold_in_each(KEY, jnp.arange(len(x))), zlib.crc32(b"autoattack_linf"))
    names = ("eps", "version", "overrides", "progress")
    alone = attacks.autoattack(logits_fn, x, y, keys, **{n: SETTINGS[n] for n in names})
    assert result.robust_accuracy == alone.robust.mean() < result.clean_accuracy
    held = result.records[f"autoattack_linf@{EPS:g}/held"]
    np.testing.assert_array_equal(held, alone.robust)
    entry = result.summary["attacks"][0]
    assert entry["members"] == alone.robust_accuracy
    columns = {
        "margin": losses.margin(jnp.asarray(logits), jnp.asarray(y)),
        "frobenius_logits": jacobian.frobenius_norm(logits_fn, x),
        "relative_slope": jacobian.relative_slope(logits_fn, x, jnp.asarray(y)),
        "input_margin": margins.first_order(logits_fn, x, y),
    }
    for name, expected in columns.items():
        np.testing.assert_allclose(result.records[name], expected, rtol=1e-3, atol=1e-4)
    assert result.audit.num_examples <= 20 and len(result.audit.checks) == 11


def test_rows_are_refused_before_anything_is_computed(monkeypatch):
    x, y = points()
    rows = np.asarray(x).reshape(len(x), -1)
    monkeypatch.setattr(evaluation, "Mapper", None)
    with pytest.raises(ValueError, match="leave Square out"):
        robust_jax.evaluate(lambda x: trained()(x.reshape(-1, 8, 8, 1)), rows, y, KEY, **SETTINGS)


def test_it_leaves_records_a_card_and_a_page(found):
    result, folder = found
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.json",
        "records",
        "report.html",
        "results.json",
    ]
    records = pd.read_csv(folder / "records" / "best.csv", dtype={"key": str})
    by = f"autoattack_linf@{EPS:g}/broken_by"
    records[by] = records[by].fillna("")
    pd.testing.assert_frame_equal(
        records, result.records, check_dtype=False, check_exact=False, rtol=1e-4
    )
    card = json.loads((folder / "card.json").read_text())
    assert card == result.card
    assert card["name"] == "an MLP" and card["threat_model"] == "Linf"
    assert card["additional_data"] is card["number_forward_passes"] is None  # not known here
    assert float(card["autoattack_acc"]) == pytest.approx(100 * result.robust_accuracy, abs=0.01)
    page = (folder / "report.html").read_text()
    assert "digits, an MLP" in page and "Is it real?" in page
    assert "the network classifies" in page and "checkpoint</th>" not in page
    assert "trained against" not in page and "the best checkpoint" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("data:image", "")


def test_it_is_compared_with_other_folders(found, tmp_path):
    result, folder = found
    shutil.copytree(folder, tmp_path / "again")
    said = compare.write([folder, tmp_path / "again"], tmp_path / "both")
    rows = {line.split("  ")[0]: line.split()[-2:] for line in said.splitlines() if line}
    assert rows["clean accuracy, %"] == 2 * [f"{100 * result.clean_accuracy:.1f}"]
    assert rows["audit"] == 2 * [result.audit.verdict]
    assert "an MLP" in (tmp_path / "both" / "report.html").read_text()


def test_a_stopped_call_continues_and_compiles_nothing_again(found, tmp_path, monkeypatch):
    result, _ = found
    x, y = points()
    started = []

    def attempt(attack, *settings, real=_autoattack._Attempt):
        started.append(attack.__name__)
        if started == ["apgd", "square"]:
            raise KeyboardInterrupt
        return real(attack, *settings)

    monkeypatch.setattr(_autoattack, "_Attempt", attempt)
    with pytest.raises(KeyboardInterrupt):
        robust_jax.evaluate(trained(), x, y, KEY, folder=tmp_path, **SETTINGS)
    started.clear()
    (tmp_path / "card.json.7.pending").write_text("half")  # as if killed while writing
    again = robust_jax.evaluate(trained(), x, y, KEY, folder=tmp_path, **SETTINGS)
    assert started == ["square"]
    pd.testing.assert_frame_equal(again.records, result.records)
    with lowerings() as seen:
        robust_jax.evaluate(trained(), x, y, KEY, **SETTINGS)
    assert not seen


RBG = jax.random.key(0, impl="rbg")


def broken_above(mean):
    """A network whose logits are NaN for images brighter than mean; any mean shares a program."""
    mean = jnp.float32(mean)

    def logits_fn(x):
        is_broken = x.mean((1, 2, 3))[:, None] > mean
        return jnp.where(is_broken, jnp.nan, network(weights_of(0))(x))

    return logits_fn


@pytest.fixture(scope="module")
def plain():
    """A small network's evaluation without the audit and with a key of another implementation."""
    return evaluate(broken_above(2.0), *examples(count=16), RBG)


def test_a_network_without_forward_mode_is_evaluated(plain):
    x, y = examples(count=16)
    outside_jax = evaluate(exported(0), x, y, RBG)
    assert outside_jax.robust_accuracy == plain.robust_accuracy < 1
    held = "autoattack_linf@0.05/held"
    np.testing.assert_array_equal(outside_jax.records[held], plain.records[held])
    exact = jacobian.singular_values(network(weights_of(0)), x)[:, 0]
    np.testing.assert_allclose(outside_jax.records["spectral_logits"], exact, rtol=1e-4)
    missing = {"frobenius_estimate_logits", "frobenius_estimate_error_logits"}
    assert set(plain.records) - set(outside_jax.records) == missing


def test_logits_that_are_nan_are_told(plain):
    x, y = examples(count=16)
    is_broken = x.mean((1, 2, 3)) > 0.5
    found = evaluate(broken_above(0.5), x, y, RBG)
    assert 0 < found.clean_accuracy == 1 - is_broken.mean() < plain.clean_accuracy
    many = f"{is_broken.sum()} of 16 points have logits that are NaN"
    assert found.warnings[0].startswith(many)


def test_a_folder_of_something_else_is_left_alone(found, tmp_path):
    _, folder = found
    x, y = points()
    (tmp_path / "thesis.tex").write_text("years of work")
    for where, holds, keywords in (
        (tmp_path, "other files", {}),
        (folder, "an evaluation of something else", {"name": "another", "dataset": "digits"}),
        (folder, "an evaluation of something else", {"name": "an MLP", "num_audited": 3}),
    ):
        before = {path: path.read_bytes() for path in where.rglob("*.*")}
        key = jax.random.key(1) if "num_audited" in keywords else KEY
        with pytest.raises(UserError, match=f"holds {holds}; give another folder"):
            robust_jax.evaluate(trained(), x, y, key, folder=where, **{**SETTINGS, **keywords})
        assert {path: path.read_bytes() for path in where.rglob("*.*")} == before


def test_another_network_of_the_same_name_does_not_replace_an_evaluation(found):
    _, folder = found
    x, y = points()
    page = (folder / "report.html").read_bytes()
    with pytest.raises(UserError, match="an evaluation of something else; give another folder"):
        robust_jax.evaluate(
            lambda x: 0.9 * trained()(x), x, y, KEY, folder=folder, name="an MLP", **SETTINGS
        )
    assert (folder / "report.html").read_bytes() == page


def test_several_radii_are_nested_and_the_first_is_the_headline(found):
    result, _ = found
    x, y = points()
    several = robust_jax.evaluate(trained(), x, y, KEY, **{**SETTINGS, "eps": (EPS, EPS / 2)})
    assert several.robust_accuracy <= result.robust_accuracy  # more attempts at each image
    entries = several.summary["attacks"]
    accuracies = {e["eps"]: e["robust_accuracy"] for e in entries if e["attack"] == "autoattack"}
    assert several.robust_accuracy == accuracies[EPS] < accuracies[EPS / 2]
    held, held_at_half = (
        several.records[f"autoattack_linf@{eps:g}/held"] for eps in (EPS, EPS / 2)
    )
    assert (held <= held_at_half).all()
    assert several.audit.eps == EPS


def test_a_network_that_is_always_wrong_has_no_audit_and_says_so():
    x, y = points()
    result = robust_jax.evaluate(
        lambda x: x[:, 4, 4] * (jnp.arange(10) == 0), x[y > 0], y[y > 0], KEY, **SETTINGS
    )
    assert result.clean_accuracy == result.robust_accuracy == 0 and result.audit is None
    assert any("classified correctly" in warning for warning in result.warnings)
    # Where that pixel is black all logits are equal, so the slope over their gap is infinite.
    assert np.isinf(result.records["relative_slope"]).any()
    assert result.summary["relative_slope"]["standard_error"] is None


def test_mistakes_are_told_in_one_line(tmp_path):
    x, y = points()
    for changes, message in [
        ({"eps": "8/255"}, "eps is '8/255'"),
        ({"eps": ()}, r"eps is \(\); give a radius above 0"),
        ({"eps": np.array([0.1, 0.0])}, r"eps is \(0.1, 0.0\); give a radius above 0"),
        ({"norm": "l0"}, "norm must be one of"),
        ({"norm": "l3"}, "norm must be one of linf, l2, l1"),
        ({"version": "rand"}, "evaluate is for deterministic networks"),
        ({"num_audited": -1}, "num_audited is -1; it must be an integer, 0 or more"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"num_queries": 0}, "num_queries must be a whole number of at least 1, not 0"),
        ({"folder": __file__}, "which is a file"),
        ({"x": 255 * x}, "pixels must be in"),
        ({"key": jax.random.split(KEY, len(x))}, r"key has the shape \[60\]; give one key"),
    ]:
        arguments = {"x": x, "y": y, "key": KEY, **SETTINGS, **changes}
        with pytest.raises(ValueError, match=message):
            robust_jax.evaluate(trained(), **arguments)

    def black_box(x, vmap_method=None):
        out = jax.ShapeDtypeStruct((len(x), 10), jnp.float32)
        zeros = lambda x: np.zeros((*x.shape[:-3], 10), np.float32)  # noqa: E731
        return jax.pure_callback(zeros, out, x, vmap_method=vmap_method)

    for how in (None, "broadcast_all"):
        with pytest.raises(ValueError, match="leaves JAX and has no gradient there"):
            robust_jax.evaluate(
                partial(black_box, vmap_method=how), x, y, KEY, folder=tmp_path / "mine", **SETTINGS
            )
    assert not (tmp_path / "mine").exists()


def test_records_of_one_name_and_networks_in_bfloat16_are_told_apart_and_continued(
    plain, tmp_path, monkeypatch
):
    x, y = examples(count=16)
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights_of(0))
    seen = set()

    def narrow(x):
        seen.add(x.dtype)
        return network(weights)(x)

    def call(norm, folder):
        return robust_jax.evaluate(
            narrow,
            x.astype(jnp.bfloat16),
            y,
            KEY,
            eps=0.05,
            norm=norm,
            version=("apgd_ce",),
            overrides={"apgd_ce": {"num_steps": 2}},
            num_audited=0,
            folder=folder,
            progress=False,
        )

    mine = [dataclasses.replace(attacks.NORMS[name], name="mine") for name in ("linf", "l2")]
    with monkeypatch.context() as context:
        context.setattr(stored, "write_results", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(mine[0], tmp_path)
    assert (tmp_path / "card.json").exists() and not (tmp_path / "results.json").exists()
    found = call(mine[0], tmp_path)
    assert (tmp_path / "results.json").exists() and not (tmp_path / "unfinished").exists()
    pd.testing.assert_frame_equal(found.records, call(mine[0], None).records)
    assert 0 < found.robust_accuracy < 1
    assert abs(found.robust_accuracy - plain.robust_accuracy) < 0.2
    assert seen == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(UserError, match="holds an evaluation of something else"):
        call(mine[1], tmp_path)


def test_a_folder_is_known_again_where_a_logit_is_nan(tmp_path):
    x, y = points()

    def logits_fn(images):
        is_first = (images == x[0]).all((1, 2, 3))
        return jnp.where(is_first[:, None], jnp.nan, trained()(images))

    settings = {**SETTINGS, "version": ("apgd_ce",), "num_audited": 0}
    settings["overrides"] = {"apgd_ce": {"num_steps": 1}}
    call = partial(robust_jax.evaluate, logits_fn, x, y, KEY, folder=tmp_path, **settings)
    pd.testing.assert_frame_equal(call().records, call().records)


def test_launchs_evaluation_of_a_network_finds_the_same():
    logits_fn = trained()
    (weights,) = logits_fn.args
    params = {
        name: {"kernel": weights[f"w{i}"], "bias": weights[f"b{i}"]}
        for i, name in enumerate(("Dense_0", "head"), start=1)
    }
    config = default.get_config()
    config.validation_size, config.normalize = 100, False
    config.model = ConfigDict({"name": "mlp", "hidden": (len(weights["b1"]),)})
    few = {name: SETTINGS[name] for name in ("version", "overrides")}
    config.attacks = ConfigDict({"autoattack_linf": {"name": "autoattack", "eps": (EPS,), **few}})
    config.evaluation.update({"num_examples": 60, "batch_size": 128})
    queries = SETTINGS["num_queries"]
    config.audit.update({"num_examples": 20, "num_queries": queries, "eps": EPS, "norm": "linf"})
    run = build(config)
    records = run.evaluator.records({"params": params}, "evaluate")
    audit = run.evaluator.audit({"params": params}, run.audit, {})
    images, labels = run.dataset.test.take(np.arange(60))
    x = data.to_pixels(images)
    found = robust_jax.evaluate(logits_fn, x, labels, run.evaluation_key, **SETTINGS)
    assert 0 < found.robust_accuracy < found.clean_accuracy
    pd.testing.assert_frame_equal(
        found.records[records.columns], records, check_exact=False, rtol=1e-4
    )
    assert [check[:3] for check in found.audit.checks] == [check[:3] for check in audit.checks]


def test_overrides_may_hold_a_loss_and_numbers_of_numpy(tmp_path):
    x, y = (values[:10] for values in points())

    def call(factor):
        def loss(logits, labels):
            return factor * losses.margin_loss(logits, labels)

        own = {"apgd_ce": {"num_steps": np.int64(2), "loss": loss}}
        settings = {**SETTINGS, "version": ("apgd_ce",), "overrides": own, "num_audited": 0}
        return robust_jax.evaluate(trained(), x, y, KEY, folder=tmp_path, **settings)

    first = call(1.0)
    results = json.loads((tmp_path / "results.json").read_text())
    said = results["config"]["attacks"]["autoattack_linf"]["overrides"]["apgd_ce"]
    assert said["num_steps"] == 2 and said["loss"].endswith("call.<locals>.loss")
    assert call(1.0).robust_accuracy == first.robust_accuracy
    with pytest.raises(UserError, match="an evaluation of something else"):
        call(2.0)  # another loss of the same name
