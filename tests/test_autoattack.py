"""AutoAttack: bookkeeping of points, batches and saved states; its warnings; few classes."""

import dataclasses
import functools
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import losses
from robust_jax.attacks import _autoattack, autoattack, distances, fab, norms
from robust_jax.attacks._autoattack import MEMBERS, VERSIONS
from robust_jax.batches import bound
from robust_jax.devices import parallel
from robust_jax.errors import UnusableState
from tests.linear import make_nonlinear

KEY = jax.random.key(0)
QUICK = {
    "apgd_ce": {"num_steps": 10},
    "apgd_dlr": {"num_steps": 10},
    "apgd_t": {"num_steps": 10, "num_targets": 2},
    "fab": {"num_steps": 8},
    "fab_t": {"num_steps": 8, "num_targets": 2},
    "square": {"num_queries": 60},
}
# One example per device, so batches have one size and compile once, however many are left.
run = functools.partial(autoattack, overrides=QUICK, progress=False, batch_size=8)


@functools.cache
def problem(num_classes=4, num_wrong=5):
    """A network and 40 points, the first few of them labelled wrong."""
    logits_fn = make_nonlinear(jax.random.key(4), num_classes=num_classes)
    x = np.asarray(jax.random.uniform(KEY, (40, 4, 5, 1)))
    y = np.array(jnp.argmax(logits_fn(x), -1))
    y[:num_wrong] = (y[:num_wrong] + 1) % num_classes
    return logits_fn, x, y


@functools.cache
def baseline():
    logits_fn, x, y = problem()
    return run(logits_fn, x, y, KEY, eps=0.05)


def sizes(delta, norm):
    return np.asarray(distances(jnp.zeros_like(delta), delta, norm=norm))


def test_versions_run_the_attacks_of_the_paper_in_its_order():
    assert list(VERSIONS["standard"]) == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert list(VERSIONS["plus"]) == ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"]
    assert list(VERSIONS["rand"]) == ["apgd_ce", "apgd_dlr"]


def test_l1_has_budgets_of_its_own():
    ensemble = _autoattack.ensemble_of(norm="l1")
    assert {name: dict(member.keywords) for name, member in ensemble.items()} == {
        "apgd_ce": {"loss": losses.cross_entropy, "num_restarts": 5},
        "apgd_t": {"num_targets": 5},
        "fab_t": {},
        "square": {},
    }
    logits_fn, x, y = problem()
    version = ("apgd_ce", "fab_t", "square")
    result = run(logits_fn, x, y, KEY, eps=0.4, norm="l1", version=version)
    assert 0 < result.robust.mean() < 0.7
    broken = result.distance > 0
    assert broken.any()
    np.testing.assert_allclose(result.distance[broken], sizes(result.x_adv - x, "l1")[broken])
    assert result.distance[broken].max() <= 0.4 * (1 + 1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_result_holds_together(norm):
    logits_fn, x, y = problem()
    if norm == "linf":
        names, eps, result = list(VERSIONS["standard"]), 0.05, baseline()
    else:
        names, eps = ["apgd_dlr", "fab", "square"], 0.15
        result = run(logits_fn, x, y, KEY, eps=eps, norm=norm, version=tuple(names))
    right = np.asarray(losses.correct(logits_fn(result.x_adv), y), bool)
    np.testing.assert_array_equal(result.robust, right)
    np.testing.assert_array_equal(result.broken_by == "", result.robust)
    np.testing.assert_array_equal(result.broken_by == "clean", np.arange(40) < 5)
    assert set(result.broken_by) <= {"", "clean", *MEMBERS}
    assert 0 < result.robust.sum() < 35
    untouched = result.robust | (result.broken_by == "clean")
    np.testing.assert_array_equal(result.x_adv[untouched], x[untouched])
    distance = sizes(result.x_adv - x, norm)
    assert (distance <= eps * (1 + 1e-5)).all()
    np.testing.assert_allclose(result.distance[~result.robust], distance[~result.robust], rtol=1e-5)
    assert np.isnan(result.distance[result.robust]).all()
    shares = list(result.robust_accuracy.values())
    assert list(result.robust_accuracy) == ["clean", *names]
    assert shares[0] == 35 / 40
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == result.robust.mean()
    assert result.warnings == () or "square" in result.warnings[0]


def test_is_at_least_as_strong_as_each_member():
    logits_fn, x, y = problem()
    for name in VERSIONS["standard"]:
        alone = run(logits_fn, x, y, KEY, eps=0.05, version=(name,))
        assert not (baseline().robust & ~alone.robust).any()
        assert baseline().robust_accuracy[name] <= alone.robust_accuracy[name]


def test_does_not_depend_on_the_batch_size_and_padding_counts_for_nothing():
    logits_fn, x, y = problem()
    other = run(logits_fn, x, y, KEY, eps=0.05, batch_size=9)
    np.testing.assert_array_equal(baseline().broken_by, other.broken_by)
    np.testing.assert_allclose(baseline().x_adv, other.x_adv, atol=1e-4)
    assert baseline().robust_accuracy == other.robust_accuracy


@pytest.mark.parametrize("method", ["pmap", "shard_map"])
def test_does_not_depend_on_the_number_of_devices(method):
    logits_fn, x, y = problem()
    settings = {"eps": 0.05, "version": ("apgd_ce", "square")}
    one = run(logits_fn, x, y, KEY, **settings)

    def network(scale, x):
        return scale * logits_fn(x)

    mapping = bound(parallel.lifted(network, method, batch_size=16), jnp.ones(()), len(x))
    eight = run(logits_fn, x, y, KEY, map_examples=mapping, **settings)
    assert jax.device_count() == 8
    np.testing.assert_array_equal(one.broken_by, eight.broken_by)
    np.testing.assert_allclose(one.x_adv, eight.x_adv, atol=1e-5)


def test_an_example_takes_its_key_with_it():
    logits_fn, x, y = problem()
    keys = jax.random.split(KEY, 40)
    whole = run(logits_fn, x, y, keys, eps=0.05, version=("square",))
    part = run(logits_fn, x[11:30], y[11:30], keys[11:30], eps=0.05, version=("square",))
    np.testing.assert_array_equal(whole.broken_by[11:30], part.broken_by)


def test_each_attack_sees_only_what_still_stands(monkeypatch):
    logits_fn, x, y = problem()
    seen = {}

    def spy(name, broken):
        def attack(logits_fn, x, y, key, *, eps, norm):
            jax.debug.callback(lambda x: seen.setdefault(name, []).append(np.asarray(x)), x)
            # A move that breaks only the images whose first pixel says so.
            away = jnp.where(x[:, :1, :1, :1] < broken, 1.0, 0.0)
            return x + away * eps * jnp.sign(
                jax.grad(lambda x: losses.cross_entropy(logits_fn(x), y).sum())(x)
            )

        return attack

    monkeypatch.setattr(
        _autoattack,
        "MEMBERS",
        {
            "one": MEMBERS["square"]._replace(attack=spy("one", 0.5)),
            "two": MEMBERS["square"]._replace(attack=spy("two", 1.1)),
        },
    )
    result = autoattack(
        logits_fn, x, y, KEY, eps=0.4, version=("one", "two"), batch_size=8, progress=False
    )
    jax.effects_barrier()
    first = {image.tobytes() for batch in seen["one"] for image in batch}
    second = {image.tobytes() for batch in seen["two"] for image in batch}
    assert first == {image.tobytes() for image in x[5:]}
    assert second == {image.tobytes() for image in x[5:][result.broken_by[5:] != "one"]}
    assert {"one", "two"} <= set(result.broken_by)


def test_stops_when_none_is_left():
    logits_fn, x, y = problem()
    result = run(logits_fn, x, y, KEY, eps=1.0, version=("apgd_ce", "square"))
    assert not result.robust.any()
    assert result.robust_accuracy["square"] == 0
    all_wrong = run(logits_fn, x, (y + 1) % 4, KEY, eps=0.1, version=("square",))
    assert (all_wrong.broken_by[5:] == "clean").all()


def test_resumes_without_doing_finished_attacks_again(tmp_path, monkeypatch):
    logits_fn, x, y = problem()
    path = tmp_path / "state.npz"
    arguments = {"eps": 0.05, "version": ("apgd_ce", "fab_t", "square")}
    expected = run(logits_fn, x, y, KEY, **arguments)

    class Stopped(Exception):
        pass

    started = []

    def attempt(attack, *settings, real=_autoattack._Attempt, stop=True):
        started.append(attack.__name__)
        if stop and started[-1] == "square":
            raise Stopped
        return real(attack, *settings)

    monkeypatch.setattr(_autoattack, "_Attempt", attempt)
    with pytest.raises(Stopped):
        run(logits_fn, x, y, KEY, state_path=path, **arguments)
    assert list(dict.fromkeys(started)) == ["apgd", "fab", "square"]
    started.clear()
    monkeypatch.setattr(_autoattack, "_Attempt", functools.partial(attempt, stop=False))
    resumed = run(logits_fn, x, y, KEY, state_path=path, batch_size=11, **arguments)
    assert started == ["square"]
    np.testing.assert_array_equal(resumed.broken_by, expected.broken_by)
    np.testing.assert_allclose(resumed.x_adv, expected.x_adv, atol=1e-4)
    assert resumed.robust_accuracy == expected.robust_accuracy
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]
    started.clear()
    again = run(logits_fn, x, y, KEY, state_path=path, **arguments)
    assert started == []
    np.testing.assert_array_equal(again.x_adv, resumed.x_adv)


KILLED = """
import os, signal, sys
import numpy as np
from robust_jax.attacks import _autoattack as module
from tests import test_autoattack as t

where, countdown, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
original = getattr(module, where) if where != "replace" else os.replace

def dying(*arguments):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(os if where == "replace" else module, where, dying)
logits_fn, x, y = t.problem()
result = t.run(logits_fn, x, y, t.KEY, eps=0.05, version=("apgd_ce", "fab_t"), state_path=path)
print(countdown)
np.savez(sys.argv[4], broken_by=result.broken_by, x_adv=result.x_adv, margin=result.margin)
"""


@pytest.mark.parametrize(
    "kills",
    [
        [("replace", 2)],  # while the second state is written
        # Killed before that in the first check too, which leaves nothing behind.
        pytest.param([("are_strange", 2), ("replace", 2)], marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_result(kills, tmp_path):
    logits_fn, x, y = problem()
    expected = run(logits_fn, x, y, KEY, eps=0.05, version=("apgd_ce", "fab_t"))
    state, out = tmp_path / "state.npz", tmp_path / "out.npz"

    def child(where, countdown):
        command = [sys.executable, "-c", KILLED, where, str(countdown), str(state), str(out)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    for where, countdown in kills:
        assert child(where, countdown).returncode == -signal.SIGKILL
    with np.load(state) as saved:
        left = 3 - int(saved["passes_done"])  # APGD, and FAB on two targets
    assert 0 < left < 3
    done = child("_Attempt", 99)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 99 - left  # finished passes are not run again
    with np.load(out) as result:
        np.testing.assert_array_equal(result["broken_by"], expected.broken_by)
        np.testing.assert_allclose(result["x_adv"], expected.x_adv, atol=1e-5)
        np.testing.assert_allclose(result["margin"], expected.margin, atol=1e-4)


def test_what_attacks_led_to_is_told_again(tmp_path):
    network, x, y = problem()

    def logits_fn(points):
        logits = network(points)
        return jnp.where((points.max((1, 2, 3)) > 0.999)[:, None], jnp.nan, logits)

    call = functools.partial(run, logits_fn, x, y, KEY, eps=0.3, version=("square",))
    first, again = (call(state_path=tmp_path / "state.npz") for _ in range(2))
    assert any("attacks led" in warning for warning in first.warnings)
    assert again.warnings == first.warnings


def test_a_tuple_of_attacks_has_the_budgets_of_the_norm():
    for norm in ("linf", "l1"):
        standard = _autoattack.ensemble_of(norm=norm)
        chosen = _autoattack.ensemble_of(norm=norm, version=("apgd_ce", "apgd_t"))
        assert chosen == {name: standard[name] for name in chosen}
    assert chosen["apgd_ce"].keywords["num_restarts"] == 5


def test_fab_s_restarts_are_passes_too_and_start_at_random():
    ensemble = _autoattack.ensemble_of(version="plus")
    passes = _autoattack._passes("fab", ensemble["fab"], 4)
    assert [p.salt for p in passes] == ["fab", "fab 1", "fab 2", "fab 3", "fab 4"]
    assert [p.member.keywords.get("random_start") for p in passes] == [None] + 4 * [True]
    assert all(p.member.keywords["num_restarts"] == 1 for p in passes)
    logits_fn, x, y = problem()
    clean, random = (
        fab(logits_fn, x, y, KEY, eps=1.0, num_steps=3, num_targets=None, random_start=start)
        for start in (False, True)
    )
    moved = np.abs(clean - random).max((1, 2, 3)) > 1e-4
    assert moved[5:].mean() > 0.5 and not moved[:5].any()  # misclassified points stay


def test_restarts_are_passes_between_which_the_broken_drop_out():
    logits_fn, x, y = problem()
    settings = {"eps": 0.05, "version": ("apgd_dlr",)}
    weak = {"num_steps": 1}
    one, five = (
        run(logits_fn, x, y, KEY, overrides={"apgd_dlr": {**weak, "num_restarts": n}}, **settings)
        for n in (1, 5)
    )
    assert five.robust.sum() < one.robust.sum()
    np.testing.assert_array_equal(five.x_adv[one.broken_by != ""], one.x_adv[one.broken_by != ""])


def test_margin_is_that_of_the_adversarial_or_the_smallest_left():
    logits_fn, x, y = problem()
    result = baseline()
    margin = np.asarray(losses.margin(logits_fn(result.x_adv), jnp.asarray(y)))
    broken = ~result.robust
    np.testing.assert_allclose(result.margin[broken], margin[broken], atol=1e-5)
    clean = np.asarray(losses.margin(logits_fn(x), jnp.asarray(y)))
    assert (result.margin[result.robust] > 0).all()
    assert (result.margin[result.robust] < clean[result.robust]).all()


def test_refuses_a_state_of_something_else(tmp_path):
    logits_fn, x, y = problem()
    path = tmp_path / "state.npz"
    one = functools.partial(run, version=("apgd_ce",), state_path=path)
    one(logits_fn, x, y, KEY, eps=0.05)
    for arguments, eps in (
        ((logits_fn, x, y, KEY), 0.06),
        ((logits_fn, x, y, jax.random.key(1)), 0.05),
        ((logits_fn, x[::-1], y[::-1], KEY), 0.05),
        ((logits_fn, x[:-1], y[:-1], KEY), 0.05),
    ):
        with pytest.raises(UnusableState, match="belongs to other examples, keys or settings"):
            one(*arguments, eps=eps)
    with pytest.raises(ValueError, match="belongs to another network"):
        one(lambda x: 2 * logits_fn(x), x, y, KEY, eps=0.05)
    for content in (b"", b"nonsense", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(UnusableState, match="is not a state of AutoAttack"):
            one(logits_fn, x, y, KEY, eps=0.05)
    with path.open("wb") as file:
        np.savez(file, x_adv=np.array([object()]))
    with pytest.raises(ValueError, match="is not a state of AutoAttack"):
        one(logits_fn, x, y, KEY, eps=0.05)


def test_a_state_knows_a_partial_loss_by_what_it_says(tmp_path):
    logits_fn, x, y = problem()
    path = tmp_path / "state.npz"

    def attack(label_smoothing):
        loss = functools.partial(losses.cross_entropy, label_smoothing=label_smoothing)
        overrides = {"apgd_ce": {"num_steps": 2, "loss": loss}}
        version = ("apgd_ce",)
        return autoattack(
            logits_fn,
            x,
            y,
            KEY,
            eps=0.05,
            version=version,
            overrides=overrides,
            state_path=path,
            progress=False,
        )

    np.testing.assert_array_equal(attack(0.1).x_adv, attack(0.1).x_adv)  # not refused
    with pytest.raises(ValueError, match="belongs to other examples, keys or settings"):
        attack(0.2)


@dataclasses.dataclass(frozen=True)
class _Margin:
    """A loss that is an object."""

    factor: float = 1.0

    def __call__(self, logits, labels):
        return self.factor * losses.margin_loss(logits, labels)


def test_a_state_knows_a_closure_a_record_and_a_loss_that_is_an_object(tmp_path):
    logits_fn, x, y = problem()

    def times(factor):
        return lambda logits, labels: factor * losses.margin_loss(logits, labels)

    def attack(loss, norm="linf", path="state.npz"):
        return run(
            logits_fn,
            x,
            y,
            KEY,
            eps=0.05,
            norm=norm,
            version=("apgd_ce",),
            overrides={"apgd_ce": {"num_steps": 2, "loss": loss}},
            state_path=tmp_path / path,
        )

    first = attack(times(1.0))
    np.testing.assert_array_equal(attack(times(1.0)).x_adv, first.x_adv)
    for loss, norm in (
        (times(-1.0), "linf"),
        (times(1.0), dataclasses.replace(norms.LINF, size=lambda d: 5 * norms.LINF.size(d))),
    ):
        with pytest.raises(UnusableState, match="belongs to other examples, keys or settings"):
            attack(loss, norm)
    found = attack(_Margin(), path="object.npz")
    np.testing.assert_array_equal(found.x_adv, first.x_adv)
    np.testing.assert_array_equal(attack(_Margin(), path="object.npz").x_adv, first.x_adv)
    with pytest.raises(UnusableState, match="belongs to other examples, keys or settings"):
        attack(_Margin(-1.0), path="object.npz")


def test_one_example_alone():
    logits_fn, x, y = problem()
    expected = baseline()
    for i in (0, 20):  # misclassified from the start, and not
        alone = run(
            logits_fn, x[i : i + 1], y[i : i + 1], jax.random.split(KEY, 40)[i : i + 1], eps=0.05
        )
        assert alone.x_adv.shape == (1, 4, 5, 1)
        assert alone.robust_accuracy["clean"] == float(i == 20)
    keys = jax.vmap(lambda j: jax.random.fold_in(KEY, j))(jnp.arange(40))[20:21]
    alone = run(logits_fn, x[20:21], y[20:21], keys, eps=0.05)
    np.testing.assert_array_equal(alone.broken_by, expected.broken_by[20:21])
    np.testing.assert_allclose(alone.x_adv, expected.x_adv[20:21], atol=1e-5)


def test_a_legacy_key_is_one_key_for_two_examples_too():
    logits_fn, x, y = problem()
    legacy, typed = (
        run(logits_fn, x[5:7], y[5:7], key, eps=0.05) for key in (jax.random.PRNGKey(0), KEY)
    )
    assert str(legacy) == str(typed)


def test_shows_the_attack_and_how_many_still_stand(capsys):
    logits_fn, x, y = problem()
    autoattack(logits_fn, x, y, KEY, eps=0.05, version=("apgd_ce",), overrides=QUICK)
    shown = capsys.readouterr().err
    assert "autoattack" in shown and "apgd_ce: 35 standing" in shown
    run(logits_fn, x, y, KEY, eps=0.05, version=("apgd_ce",))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("num_classes", "names"), [(2, {"apgd_dlr", "apgd_t"}), (3, {"apgd_t"})])
def test_few_classes_get_other_losses_and_say_so(num_classes, names):
    logits_fn, x, y = problem(num_classes)
    result = run(
        logits_fn,
        x,
        y,
        KEY,
        eps=0.05,
        version=("apgd_dlr", "apgd_t"),
        overrides={"apgd_dlr": QUICK["apgd_dlr"]},
    )
    assert {warning.split(" uses the margin")[0] for warning in result.warnings} == names
    assert result.robust.mean() < 0.7


def test_warns_of_probabilities_zero_gradients_and_masked_ones():
    logits_fn, x, y = problem()
    given = run(lambda x: jax.nn.softmax(logits_fn(x)), x, y, KEY, eps=0.1, version=("apgd_ce",))
    assert any("probabilities" in warning for warning in given.warnings)
    masked = run(
        lambda x: jax.lax.stop_gradient(logits_fn(x)),
        x,
        y,
        KEY,
        eps=0.05,
        version=("apgd_ce", "square"),
    )
    assert any("35 of 35 points have a zero gradient" in w for w in masked.warnings)
    assert any("square lowered the robust accuracy" in w for w in masked.warnings)


def test_randomised_networks_are_noticed_and_have_their_own_version():
    logits_fn, x, y = problem()
    rng = np.random.default_rng(0)

    def noisy(x):
        return logits_fn(x) + float(rng.normal())

    assert any(
        'use version="rand"' in warning
        for warning in run(noisy, x, y, KEY, eps=0.05, version=("square",)).warnings
    )

    def keyed(x, key):
        return logits_fn(x) + 0.05 * jax.random.normal(key, (x.shape[0], 4))

    faster = {name: {"num_steps": 5, "eot_samples": 3} for name in ("apgd_ce", "apgd_dlr")}
    results = [
        autoattack(
            keyed,
            x,
            y,
            KEY,
            eps=0.1,
            version="rand",
            batch_size=size,
            overrides=faster,
            progress=False,
        )
        for size in (16, 8)
    ]
    assert list(results[0].robust_accuracy) == ["clean", "apgd_ce", "apgd_dlr"]
    assert 0 < results[0].robust_accuracy["apgd_dlr"] < results[0].robust_accuracy["clean"]
    np.testing.assert_array_equal(results[0].broken_by, results[1].broken_by)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "best"}, "version must be one of standard, plus, rand or a tuple"),
        ({"version": ("pgd",)}, "attack must be one of apgd_ce, .*, not 'pgd'"),
        ({"version": ()}, "version names no attack"),
        ({"overrides": {"square": {"steps": 1}}}, "square has no keyword 'steps'; choices: num_q"),
        ({"overrides": {"squares": {}}}, "attack must be one of .*, not 'squares'"),
        ({"overrides": {"fab": {"steps": 1}}}, "fab has no keyword 'steps'; choices: num_steps"),
        ({"overrides": {"apgd_ce": {"eot_samples": 3}}}, 'eot_samples only in version="rand"'),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"norm": "l0"}, "norm must be one of linf, l2, l1, not 'l0'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"x": np.full((40, 4, 5, 1), 7.0)}, r"x ranges over \[7, 7\]; pixels must be in"),
        ({"x": np.zeros((40, 20))}, r"on images \[B,H,W,C\], and x is \[B, 20\]; .*version=\("),
        ({"y": np.zeros(3, int)}, r"y has the shape \[3\]; one label for each of the 40 examples"),
        ({"y": np.full(40, 9)}, "y has the label 9; the network has 4 classes"),
    ],
)
def test_mistakes_are_told(changes, message):
    logits_fn, x, y = problem()
    arguments = {"x": x, "y": y, "eps": 0.1, "key": KEY, **changes}
    with pytest.raises(ValueError, match=message):
        autoattack(logits_fn, progress=False, **arguments)
