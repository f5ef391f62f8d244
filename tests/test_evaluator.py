"""The evaluator: AutoAttack within it continues from what an earlier evaluation left."""

import functools

import jax
import numpy as np
import pandas as pd
import pytest

from robust_jax import data
from robust_jax.app import evaluator
from robust_jax.app.evaluator import AttackGrid, AuditSettings, Evaluator, Settings
from robust_jax.app.records import column
from robust_jax.attacks import _autoattack, autoattack, fgsm
from robust_jax.devices import parallel
from tests.digits import EPS, network, trained

MEMBERS = ("apgd_ce", "square")
OVERRIDES = {"apgd_ce": {"num_steps": 3}, "square": {"num_queries": 10}}
SETTINGS = Settings(
    batch_size=16, jacobian_chunk=8, jacobian_projections=2, spectral_iterations=1, num_images=2
)


@functools.cache
def split():
    return data.load("digits", validation_size=100).test.take(np.arange(40))


def evaluator_of(grids, settings):
    return Evaluator(
        lambda variables: functools.partial(network, variables),
        parallel.lifted(network, "pmap", batch_size=settings.batch_size),
        split(),
        grids,
        settings,
        jax.random.key(0),
    )


@functools.cache
def autoattack_at_two_radii():
    """Cached, to keep its programs."""
    attack = functools.partial(autoattack, version=MEMBERS, overrides=OVERRIDES, progress=False)
    grid = AttackGrid("autoattack", attack, "linf", (EPS / 2, EPS), members=MEMBERS)
    return evaluator_of({"autoattack": grid}, SETTINGS)


def records(unfinished=None, scale=1.0):
    """The records of the trained network; another scale of its weights makes another network."""
    variables = jax.tree.map(lambda w: scale * w, trained().args[0])
    return autoattack_at_two_radii().records(variables, "evaluate", unfinished)


def test_an_attack_at_many_radii_is_compiled_for_one_size_of_batch():
    traced = []

    def attack(logits_fn, x, y, keys, *, eps):
        traced.append(len(x) * jax.device_count())
        return fgsm(logits_fn, x, y, keys, eps=eps)

    eps = tuple(np.linspace(0.01, 0.3, 12))
    grid = AttackGrid("fgsm", attack, "linf", eps)
    evaluator = evaluator_of({"fgsm": grid}, SETTINGS._replace(batch_size=64))
    found = evaluator.records(trained().args[0], "evaluate")
    standing = {found[f"fgsm@{e:g}/held"].sum() for e in eps}
    assert len(standing) > 4 and len(set(traced)) == 1


def test_autoattack_goes_on_and_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    expected = records()
    attempts = []

    def attempt(attack, *settings, real=_autoattack._Attempt):
        attempts.append(attack.__name__)
        if len(attempts) == stop_at:
            raise KeyboardInterrupt
        return real(attack, *settings)

    monkeypatch.setattr(_autoattack, "_Attempt", attempt)
    stop_at = 4  # Square at the second radius
    with pytest.raises(KeyboardInterrupt):
        records(tmp_path)
    assert attempts == ["apgd", "square", "apgd", "square"]
    states = sorted(path.name for path in tmp_path.iterdir())
    assert states == ["autoattack@0.05.npz", "autoattack@0.1.npz", "records.npz"]
    attempts.clear()
    pd.testing.assert_frame_equal(records(tmp_path), expected)
    assert attempts == ["square"]


def test_a_state_of_another_network_is_passed_over(tmp_path):
    records(tmp_path, scale=1.1)
    pd.testing.assert_frame_equal(records(tmp_path), records())


def test_what_square_breaks_is_a_share_of_all_that_were_attacked(monkeypatch):
    """AutoAttack is only given the examples that stand."""
    before = {"clean": 1.0, "apgd_ce": 1.0, "square": 1 - 1 / 300}  # one of 300, or of 600
    assert _autoattack.doubt_about_square(before)
    assert not _autoattack.doubt_about_square(before, 1 / 2)
    warned = []
    whole = autoattack_at_two_radii()
    monkeypatch.setattr(whole, "_warn", warned.append)
    found = {"clean": 1.0, "apgd_ce": 1.0, "square": 0.5}

    def half(logits_fn, x, y, key, **_):
        said = ("something else", *_autoattack.doubt_about_square(found))
        robust = np.arange(len(x)) % 2 == 0
        zero = np.zeros(len(x), np.float32)
        names = np.where(robust, "", "square")
        return _autoattack.AutoAttackResult(x, robust, names, zero, zero, found, said)

    grid = AttackGrid("autoattack", half, "linf", (EPS / 2, EPS), members=MEMBERS)
    records = whole.with_grids({"autoattack": grid}).records(trained().args[0], "evaluate")
    standing = [records["correct"].sum(), records[column("autoattack", EPS / 2, "held")].sum()]
    assert 40 > standing[0] > standing[1] > 0
    expected = [
        f"autoattack at eps {eps:g}: {said}"
        for eps, count in zip((EPS / 2, EPS), standing, strict=True)
        for said in (
            "something else",
            f"square lowered the robust accuracy of the others by {100 * count / 40 / 2:.1f} "
            "points: their gradients may be masked; give it more queries",
        )
    ]
    assert warned == expected


def test_the_audit_is_told_how_many_examples_are_in_memory_at_a_time(monkeypatch):
    """Its float64 pass does not use the mapping of the other passes."""
    given = {}
    monkeypatch.setattr(evaluator, "audit", lambda *_, **keywords: given.update(keywords))
    settings = AuditSettings("linf", EPS, 4, 3, None)
    evaluator_of({}, SETTINGS).audit(trained().args[0], settings, {})
    assert given["batch_size"] == SETTINGS.batch_size
