"""Training: the same on any number of devices, resumed bit for bit, stopped where it must."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import signal
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import default
from robust_jax import data, margins
from robust_jax.app.experiment import build
from robust_jax.attacks import pgd
from robust_jax.devices import parallel
from robust_jax.errors import UserError
from robust_jax.models import MODELS
from robust_jax.train import loop, optimizer, validate
from robust_jax.train.checkpoint import Checkpoints
from robust_jax.train.metrics import MetricsWriter, reduce_sums
from robust_jax.train.step import StepSettings
from robust_jax.train.validate import Tracked, make_validation
from tests.training import Net, training_of

KEY = jax.random.key(0)


def small_config(**fields):
    """A run of a few steps of a tiny network on digits."""
    config = default.get_config()
    config.model = {"name": "mlp", "hidden": (8,)}
    config.adversary.num_steps = 2
    config.batch_size = 64
    config.duration = "12 steps"
    config.log_every = "5 steps"
    config.validate_every = "6 steps"
    config.checkpoint_every = "4 steps"
    config.validation_attack = {"name": "fgsm", "eps": 0.01}
    config.attacks = ConfigDict()
    config.update(fields)
    return config


@functools.cache
def plan_of(seed=0, parallel="pmap"):
    """The plan of the small run, whose programs are compiled once for all tests."""
    return build(small_config(seed=seed, parallel=parallel)).plan


@pytest.fixture(scope="module")
def whole_step():
    """(train_step, fresh state, batch): BatchNorm, augmentation, averaging and two adversaries.

    One adversary perturbs the weights.
    """
    make_step, init, batch = training_of(Net(), loss_on="both", learning_rate=0.01)
    step = make_step(
        StepSettings(crop_padding=1, flip=True, ema_decay=0.9, weight_perturbation=0.05)
    )
    return step, functools.partial(init, average=True), batch


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    """Holds for attack and loss if there is no BatchNorm; the parts are on two devices."""
    make_step, init, batch = training_of(MODELS["mlp"](num_classes=10, hidden=(8,)), loss_on="both")
    found = []
    for num_parts, devices in ((1, 1), (4, 2)):
        step = make_step(StepSettings(num_parts=num_parts, weight_perturbation=0.01))
        mapped = parallel.map_step(step, "shard_map", jax.devices()[:devices])
        state = init()
        for _ in range(2):
            state, sums = mapped(state, batch, KEY)
        assert float(sums["loss"][1]) == 16
        found.append(jax.device_get((state.params, sums)))
    chex.assert_trees_all_close(*found, rtol=2e-4, atol=1e-5)


def three_steps(whole_step, method, num_devices):
    """The state and the sums after each step."""
    step, fresh, batch = whole_step
    mapped = parallel.map_step(step, method, jax.devices()[:num_devices])
    state, found = fresh(), []
    for _ in range(3):
        state, sums = mapped(state, batch, KEY)
        found.append(jax.device_get((state, sums)))
    return found


@pytest.fixture(scope="module")
def on_one_device(whole_step):
    return three_steps(whole_step, "pmap", 1)


# shard_map on one device is in the test above.
@pytest.mark.parametrize(("method", "num_devices"), [("pmap", 8), ("shard_map", 2)])
def test_any_number_of_devices_gives_the_same_step(whole_step, on_one_device, method, num_devices):
    state, sums = three_steps(whole_step, method, num_devices)[-1]
    expected_state, expected_sums = on_one_device[-1]
    for name in sums:
        value, expected = (totals[name][0] / totals[name][1] for totals in (sums, expected_sums))
        np.testing.assert_allclose(value, expected, rtol=1e-4, err_msg=name)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-3, atol=1e-5)


def test_average_is_the_exponential_one_with_its_warm_up(whole_step, on_one_device):
    _, fresh, _ = whole_step
    state = fresh()
    expected = jax.device_get((state.params, state.batch_stats))
    for t, (state, _) in enumerate(on_one_device):
        keep = min(0.9, (t + 1) / (t + 10))
        expected = jax.tree.map(
            lambda old, new, keep=keep: keep * old + (1 - keep) * new,
            expected,
            (state.params, state.batch_stats),
        )
    chex.assert_trees_all_close(
        (state.average.params, state.average.batch_stats), expected, rtol=1e-4, atol=1e-6
    )
    assert state.variables["params"] is state.average.params


def test_validation_attacks_and_counts_an_example_once():
    """A linear network on two pixels shows plainly which examples are right and can be moved."""
    images = np.array([[0.1, 0.9], [0.45, 0.55], [0.9, 0.1], [0.2, 0.3]], np.float32)
    split = data.Split(images.reshape(4, 1, 2, 1), np.array([1, 1, 0, 0], np.int32))

    def network(variables, x):
        return variables["scale"] * x.reshape(x.shape[0], 2)

    validate = make_validation(
        network,
        functools.partial(pgd, eps=0.1),
        split,
        batch_size=3,
        key=KEY,
        method="pmap",
        tracked=Tracked(first_order=4, minimum_norm=3, clever=2, num_steps=20, num_samples=2),
        margins_of=split,
    )
    values = validate({"scale": np.float32(3)})
    # The first three are correct. At 0.1, which moves the gap by 0.2, the first and third hold.
    assert values["clean_accuracy"] == 0.75
    assert values["robust_accuracy"] == 0.5
    # The distances to the boundary of a linear network are exact, whatever its scale.
    distances = np.array([0.8, 0.1, 0.8, -0.1]) / np.sqrt(2)
    expected = {
        number: value
        # Margins are from the label. Distances are from the predicted class, so never negative.
        for what, of in (("margin", distances), ("distance", np.abs(distances)))
        for number, value in (
            (f"minimum_{what}", of.min()),
            (f"average_{what}", of.mean()),
            *((f"{what}_q{q}", np.percentile(of, q)) for q in (10, 50, 90)),
        )
    }
    # Over the first few: the attack gets as near as it can, and gradients are the same everywhere.
    expected |= {
        "minimum_distance_clever": 0.1 / np.sqrt(2),
        "average_distance_clever": 0.45 / np.sqrt(2),
        "minimum_margin_attack": 0.1 / np.sqrt(2),
        "average_margin_attack": 1.7 / 3 / np.sqrt(2),
    }
    found = {name: value for name, value in values.items() if re.search("margin|distance", name)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = not name.endswith("attack")
        assert found[name] == pytest.approx(value, rel=1e-5 if exact else 0.02), name


def test_validation_leaves_flat_examples_out_of_the_margins():
    images = np.array([[0.1, 0.9], [0.9, 0.1], [0.8, 0.3]], np.float32)
    split = data.Split(images.reshape(3, 1, 2, 1), np.array([1, 0, 0], np.int32))

    def network(variables, x):
        pixels = x.reshape(x.shape[0], 2)
        return jnp.where(pixels[:, :1] > variables["from"], pixels, jnp.array([1.0, 0.0]))

    validate = make_validation(
        network,
        lambda f, x, y, k: x,
        split,
        batch_size=3,
        key=KEY,
        method="pmap",
        tracked=Tracked(first_order=3),
        margins_of=split,
    )
    some = validate({"from": np.float32(0.5)})
    np.testing.assert_allclose(some["average_margin"], (0.8 + 0.5) / 2 / np.sqrt(2), rtol=1e-5)
    assert some["minimum_margin"] == pytest.approx(0.5 / np.sqrt(2), rel=1e-5)
    assert not [name for name in validate({"from": np.float32(2)}) if "margin" in name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return loop.train(plan_of(), workdir), workdir


def test_margins_are_of_the_first_labelled_images_there_are():
    config = small_config(num_labeled=20, labeled_fraction=0.5, train_size=200)
    config.track_margins.first_order = 5000
    run = build(config)
    variables = run.plan.init().variables
    x, y = run.dataset.train.take(run.dataset.train.labeled)
    assert len(y) == 20
    network = jax.tree_util.Partial(run.model.apply, variables)
    expected = margins.first_order(network, data.to_pixels(x), y, norm="l2")
    found = run.plan.validate(variables)
    np.testing.assert_allclose(found["average_margin"], np.mean(expected), rtol=1e-3)
    np.testing.assert_allclose(found["minimum_margin"], np.min(expected), rtol=1e-3)


def test_each_estimate_is_as_thorough_as_it_was_told(monkeypatch):
    asked = {}

    def attack(logits_fn, x, y, key, *, norm, num_steps):
        asked["attack"] = num_steps
        return x

    def clever(logits_fn, x, keys, *, num_samples):
        asked["clever"] = num_samples
        return jax.vmap(jax.random.uniform)(keys)

    monkeypatch.setattr(validate, "fab", attack)
    monkeypatch.setattr(margins, "clever", clever)
    config = small_config()
    config.track_margins.update(minimum_norm=3, clever=2, num_steps=7, num_samples=9)
    plan = build(config).plan
    assert plan.validate_first
    found = plan.validate(plan.init().variables)
    assert asked == {"attack": 7, "clever": 9}
    assert found["minimum_distance_clever"] < found["average_distance_clever"]  # a key for each
    assert "minimum_margin" not in found


def test_margins_are_tracked_from_initialisation_on(tmp_path):
    config = small_config()
    config.track_margins.first_order, config.duration = 20, "6 steps"
    plan = build(config).plan
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')  # stopped before its first checkpoint
    loop.train(plan, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/average_margin" in line] == [0, 6]
    before = plan.validate(plan.init().variables)
    assert lines[0]["validation/average_distance"] == pytest.approx(before["average_distance"])
    assert lines[0]["validation/minimum_margin"] < 0 < lines[0]["validation/minimum_distance"]


def test_loop_writes_what_it_says(undisturbed):
    trained, workdir = undisturbed
    assert int(trained.last.step) == 12
    assert int(trained.best.step) in (6, 12)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 6, 10, 12, 12]
    assert "train/adversarial_accuracy" in lines[0]
    assert "validation/robust_accuracy" in lines[1]
    best = max(
        (line for line in lines if "validation/robust_accuracy" in line),
        key=lambda line: line["validation/robust_accuracy"],
    )
    assert int(trained.best.step) == best["step"]
    assert list(workdir.glob("tensorboard/events.*"))


@pytest.mark.parametrize("stop_at", [4, 7, 11])
def test_resumed_run_is_bit_identical(undisturbed, stop_at, tmp_path):
    """The same command after a crash gives the same bits, with no line lost or doubled."""
    plan = plan_of()

    class Crash(BaseException):
        pass

    def crash(state, batch, key):
        if int(state.step) == stop_at:
            raise Crash
        return plan.train_step(state, batch, key)

    with pytest.raises(Crash):
        loop.train(dataclasses.replace(plan, train_step=crash), tmp_path)
    trained = loop.train(plan, tmp_path)
    expected, workdir = undisturbed
    chex.assert_trees_all_equal(trained.last, expected.last)
    chex.assert_trees_all_equal(trained.best, expected.best)
    assert (tmp_path / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(undisturbed, kind, tmp_path):
    plan = plan_of()

    def terminate(state, batch, key):
        if int(state.step) == 6:
            signal.raise_signal(kind)
        return plan.train_step(state, batch, key)

    with pytest.raises(SystemExit) as stopped:
        loop.train(dataclasses.replace(plan, train_step=terminate), tmp_path)
    assert stopped.value.code == 128 + kind
    checkpoints = Checkpoints(tmp_path, jax.eval_shape(plan.init))
    assert int(checkpoints.restore("last")[0].step) == 7
    checkpoints.close()
    trained = loop.train(plan, tmp_path)
    chex.assert_trees_all_equal(trained.last, undisturbed[0].last)
    text = (undisturbed[1] / "metrics.jsonl").read_text()
    assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize(("killed_at", "keeps", "best"), [(2, 2, 8), (6, 2, 4), (6, 1, 8)])
def test_a_best_of_steps_that_are_taken_again_is_forgotten(
    killed_at, keeps, best, tmp_path, monkeypatch
):
    """The resumed run may come out differently, as on another number of devices.

    keeps: how many best checkpoints; older versions kept one, lost if it is of those steps.
    """
    plan, plain = plan_of(), Checkpoints.save
    assert plan.total_steps >= 8

    def living(*accuracies):
        told = iter([*accuracies] + [0.0] * plan.total_steps)
        return dataclasses.replace(
            plan,
            validate=lambda _: {"robust_accuracy": next(told), "cross_entropy": 1.0},
            validate_every=2,
            validate_first=False,
            checkpoint_every=plan.total_steps,
        )

    def killed(self, kind, state, notes):
        plain(self, kind, state, notes)
        if kind == "best" and int(state.step) == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        loop.train(living(0.1, 0.3, 0.9), tmp_path)
    folder = tmp_path / "checkpoints" / "best"
    for older in sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name))[:-keeps]:
        shutil.rmtree(older)
    after = {2: (0.05, 0.1, 0.1, 0.2), 6: (0.2, 0.25)}[killed_at]  # from the last checkpoint on
    trained = loop.train(living(*after), tmp_path)
    assert int(trained.best.step) == best
    shutil.rmtree(folder / str(best))
    with pytest.raises(UserError, match="the best checkpoint is gone"):
        loop.restore(plan, tmp_path)  # any that is left is of another step


def test_sigterm_in_the_last_step_is_not_swallowed(tmp_path):
    plan = plan_of()

    def terminate(variables):
        signal.raise_signal(signal.SIGTERM)
        return plan.validate(variables)

    at_the_end = dataclasses.replace(plan, validate=terminate, validate_every=100)
    with pytest.raises(SystemExit) as stopped:
        loop.train(at_the_end, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert int(loop.restore(plan, tmp_path).last.step) == plan.total_steps


def test_sigterm_while_nothing_is_left_to_train_is_not_swallowed(
    undisturbed, monkeypatch, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[1], workdir)
    plain = Checkpoints.restore

    def terminate(self, kind):
        if kind == "last":  # a second signal would not wait
            signal.raise_signal(signal.SIGTERM)
        return plain(self, kind)

    monkeypatch.setattr(Checkpoints, "restore", terminate)
    with pytest.raises(SystemExit) as stopped:
        loop.train(plan_of(), workdir)
    assert stopped.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("method", parallel.METHODS)
def test_seeds_trained_together_are_those_trained_alone(undisturbed, method, tmp_path):
    """Terminated midway and continued, the second seed ends as it does alone."""
    folders = [tmp_path / "1", tmp_path / "0"]

    def plans(terminate_at=None):
        first, second = (plan_of(seed, method) for seed in (1, 0))

        def vmapped_train_step(states, batches, keys):
            sizes.append(len(states))
            if int(states[0].step) == terminate_at:
                signal.raise_signal(signal.SIGTERM)
            return first.vmapped_train_step(states, batches, keys)

        return dataclasses.replace(first, vmapped_train_step=vmapped_train_step), second

    sizes = []
    with pytest.raises(SystemExit) as stopped:
        loop.train_seeds(plans(terminate_at=3), folders)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert sizes == [2] * 4
    together = loop.train_seeds(plans(), folders)
    assert sizes == [2] * 12
    expected, workdir = undisturbed
    chex.assert_trees_all_close(together[1].last, expected.last, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(together[1].best, expected.best, rtol=1e-3, atol=1e-5)
    one, other = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (folders[1], workdir)
    )
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for line, right in zip(one, other, strict=True):
        np.testing.assert_allclose(list(line.values()), list(right.values()), rtol=2e-3, atol=1e-4)
    differs = jax.tree.map(lambda a, b: np.abs(a - b).max(), *(t.last.params for t in together))
    assert max(jax.tree.leaves(differs)) > 0.01


def test_seeds_trained_together_stop_together_and_count_the_time_of_steps_alone(
    tmp_path, monkeypatch
):
    """The signal comes in the second run's validation, after the first has checked for one."""
    clock, validations = [0.0], []
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def plan(seed):
        plain = plan_of(seed)

        def step(*arguments):
            clock[0] += 1
            return plain.vmapped_train_step(*arguments)

        def validate(variables):
            clock[0] += 1000
            if seed == 0:
                validations.append(clock[0])
                if len(validations) == 2:
                    signal.raise_signal(signal.SIGTERM)
            return plain.validate(variables)

        return dataclasses.replace(
            plain, validate=validate, validate_first=True, vmapped_train_step=step
        )

    plans, folders = [plan(seed) for seed in (1, 0)], [tmp_path / "1", tmp_path / "0"]
    with pytest.raises(SystemExit):
        loop.train_seeds(plans, folders)
    for folder in folders:
        with contextlib.closing(Checkpoints(folder, jax.eval_shape(plans[0].init))) as checkpoints:
            assert int(checkpoints.restore("last")[0].step) == 7  # both, at the next step
    for trained in loop.train_seeds(plans, folders):
        timings = trained.timings
        assert timings["train_seconds"] == 10  # twelve steps, of which two compiled
        assert timings["compile_seconds"] == 1 and timings["step_milliseconds"] == 1000


def test_a_finished_seed_waits_for_no_other(undisturbed, tmp_path):
    _, finished = undisturbed
    trained = loop.train_seeds([plan_of(seed) for seed in (0, 1)], [finished, tmp_path])
    chex.assert_trees_all_equal(trained[0].last, undisturbed[0].last)
    assert int(trained[1].last.step) == 12


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = small_config(
        optimizer=ConfigDict({"name": "sgd"}),
        schedule=ConfigDict({"name": "piecewise", "boundaries": (0.5,), "factor": 1e38}),
        checkpoint_every="1 step",
    )
    plan = build(config).plan
    with pytest.raises(UserError, match=r"became (nan|inf) at step [78].*last good checkpoint"):
        loop.train(plan, tmp_path)
    checkpoints = Checkpoints(tmp_path, jax.eval_shape(plan.init))
    state, _ = checkpoints.restore("last")
    checkpoints.close()
    assert int(state.step) in (6, 7)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_unfinished_training_cannot_be_evaluated(undisturbed, tmp_path):
    longer = dataclasses.replace(plan_of(), total_steps=13)
    with pytest.raises(UserError, match="is at step 12 of 13; finish it with --mode=train"):
        loop.restore(longer, undisturbed[1])
    with pytest.raises(UserError, match="last is empty: train with --mode=train, or, if"):
        loop.restore(plan_of(), tmp_path)


def test_sums_are_reduced_over_examples_not_over_steps():
    steps = [{"a": (3.0, 1.0)}, {"a": (1.0, 3.0)}, {"b": (0.0, 0.0)}]
    assert reduce_sums(steps) == {"a": 1.0}


def test_metrics_drop_lines_after_the_resumed_step_and_half_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 4, "x"')
    writer = MetricsWriter(tmp_path, resumed_at=3)
    writer.write(4, {"x": float("nan")})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 4, "x": null}\n'


def test_decay_spares_biases_and_norms():
    model = MODELS["wide_resnet"](num_classes=10, depth=10, width=1)
    params = jax.eval_shape(model.init, KEY, jnp.zeros((1, 8, 8, 1)))["params"]
    flat = {
        jax.tree_util.keystr(path): value
        for path, value in jax.tree_util.tree_leaves_with_path(optimizer.is_kernel(params))
    }
    assert all(value == ("kernel" in path) for path, value in flat.items())
    assert 0 < sum(flat.values()) < len(flat)


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_schedules_reach_their_peak_and_their_end(name):
    values = [float(optimizer.SCHEDULES[name](0.4, 100)(t)) for t in range(101)]
    np.testing.assert_allclose(max(values), 0.4, rtol=1e-5)
    end = {"constant": 0.4, "piecewise": 0.004, "cosine": 0.0, "one_cycle": 0.0}[name]
    np.testing.assert_allclose(values[-1], end, atol=1e-5)


def test_piecewise_drops_where_it_says():
    schedule = optimizer.piecewise(1.0, 100, boundaries=(0.5,), factor=0.1)
    np.testing.assert_allclose([schedule(49), schedule(50)], [1.0, 0.1], rtol=1e-5)
    schedule = optimizer.piecewise(1.0, 100, boundaries=(0.29, 0.57, 0.57))
    expected = {28: 1.0, 29: 0.1, 56: 0.1, 57: 1e-3}
    found = [schedule(step) for step in expected]
    np.testing.assert_allclose(found, [*expected.values()], rtol=1e-5)
    for total_steps in (1, 2):  # both drops fall on the one step there is
        short = optimizer.piecewise(1.0, total_steps)
        np.testing.assert_allclose([short(0), short(1)], [1.0, 0.01], rtol=1e-5)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_optimisers_decay_kernels_only_and_descend(name):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = optimizer.OPTIMIZERS[name](optax.constant_schedule(0.1), 0.5, optimizer.is_kernel)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert (updates["kernel"] < 0).all()
    assert (updates["bias"] == 0).all()


def test_clipping_bounds_the_gradient_before_decay_and_step():
    sgd = optimizer.sgd(optax.constant_schedule(0.5), 0.1, optimizer.is_kernel, momentum=0.0)
    tx = optimizer.with_clipping(sgd, 2.0)
    params = {"w": jnp.ones((2, 2))}
    gradient = {"w": jnp.full((2, 2), 100.0)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    # 100s of norm 200 become 1s of norm 2; decay adds 0.1; the step is half of that.
    np.testing.assert_allclose(updates["w"], np.full((2, 2), -0.55), rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "at", "expected"),
    [
        (optimizer.cosine(1.0, 100), 25, (1 + np.cos(np.pi / 4)) / 2),
        (optimizer.cosine(1.0, 100, warmup=0.2), 10, 0.5),
        (optimizer.cosine(1.0, 100, warmup=0.2), 60, 0.5),
        (optimizer.one_cycle(1.0, 100, warmup=0.4), 20, 0.5),
        (optimizer.one_cycle(1.0, 100, warmup=0.4), 70, 0.5),
        (optimizer.one_cycle(1.0, 100, warmup=0.0), 50, 0.5),
    ],
)
def test_schedules_in_between(schedule, at, expected):
    np.testing.assert_allclose(schedule(at), expected, rtol=1e-4)
