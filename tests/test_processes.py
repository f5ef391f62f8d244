"""Several real processes on this machine share one run, each with its own devices."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pandas as pd
import pytest

from robust_jax.app.run import execute
from robust_jax.devices import parallel, processes, speed
from robust_jax.errors import UserError
from tests.conftest import REPOSITORY, environment_of, pages_undrawn
from tests.launches import default_with, flags
from tests.test_demo import AUTOATTACK

ATTACKS = {
    "pgd_linf": {"name": "pgd", "eps": (0.05,), "num_steps": 3},
    "autoattack": {**AUTOATTACK, "eps": (0.05,), "version": ("square",), "num_examples": 40},
}
FIELDS = {
    "model": {"name": "mlp", "hidden": (8,)},
    "adversary.num_steps": 2,
    "audit.num_examples": 0,
    "attacks": ATTACKS,
    "evaluation.num_examples": 100,
    "evaluation.num_images": 2,
    "checkpoint_every": "17 steps",
    "duration": "4 epochs",
}


def start(workdir, num_processes, num_devices, *more):
    """Starts one process or several, each with its own devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = [f"--distributed={address},{num_processes},{i}" for i in range(num_processes)]
    return [
        subprocess.Popen(
            [
                sys.executable,
                "launch.py",
                *flags(FIELDS),
                f"--workdir={workdir}",
                *more,
                *([one] if num_processes > 1 else []),
            ],
            cwd=REPOSITORY,
            env=environment_of(num_devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for one in joined
    ]


def finish(started, code=0):
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == code, errors[-3000:]
    return outputs


def left_in(workdir):
    """The results, metrics and records of a finished run."""
    results = json.loads((workdir / "results.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    return results, pd.DataFrame(lines), pd.read_csv(workdir / "records" / "best.csv")


def assert_the_same(one, other):
    """Compares to float tolerance, since the devices add up their sums in another order."""
    results, metrics, records = one
    other_results, other_metrics, other_records = other
    pd.testing.assert_frame_equal(metrics, other_metrics, rtol=1e-4, atol=1e-5)
    assert results["best"]["step"] == other_results["best"]["step"]
    for attack, same in zip(results["attacks"], other_results["attacks"], strict=True):
        assert attack["name"] == same["name"]
        np.testing.assert_allclose(attack["robust_accuracy"], same["robust_accuracy"], atol=0.01)
    for name in ("cross_entropy", "margin", "frobenius_logits", "spectral_logits"):
        np.testing.assert_allclose(records[name], other_records[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What this process leaves by itself, with eight devices."""
    workdir = tmp_path_factory.mktemp("processes") / "undisturbed"
    with pages_undrawn():
        execute(default_with(FIELDS), workdir, "train")
    return left_in(workdir)


@pytest.fixture(scope="module", params=["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def terminated(request, tmp_path_factory):
    """The folder of two processes with two devices each, one sent SIGTERM; and how they map."""
    workdir = tmp_path_factory.mktemp("processes") / "terminated"
    started = start(workdir, 2, 2, f"--config.parallel={request.param}")
    deadline = time.monotonic() + 300
    while not list((workdir / "checkpoints" / "last").glob("[0-9]*")):
        assert time.monotonic() < deadline and started[0].poll() is None, started[0].communicate()
        time.sleep(0.02)  # polling uses the cores that they train on
    started[1].send_signal(signal.SIGTERM)
    (_, told), (_, silent) = finish(started, 128 + signal.SIGTERM)
    assert "stopped at step" in told and "saving at the end of this step" in told
    assert "stopped" not in silent and "saving" not in silent  # the first process speaks for all
    assert not (workdir / "results.json").exists()
    return workdir, request.param


def test_two_processes_go_on_and_end_as_one_would(terminated, undisturbed, tmp_path):
    workdir, method = tmp_path / "run", terminated[1]
    shutil.copytree(terminated[0], workdir)
    (printed, told), (nothing, _) = finish(start(workdir, 2, 2, f"--config.parallel={method}"))
    assert "continuing from step" in told
    assert "clean accuracy" in printed and "clean accuracy" not in nothing
    found = left_in(workdir)
    assert found[0]["device"]["count"] == 4
    assert_the_same(undisturbed, found)


@pytest.mark.slow
def test_one_process_with_one_device_goes_on(terminated, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(terminated[0], workdir)
    finish(start(workdir, 1, 1, f"--config.parallel={terminated[1]}"))
    assert_the_same(undisturbed, left_in(workdir))


def test_a_mistake_of_one_is_told_by_all(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    # --mode=report looks at the folder soonest.
    for _, errors in finish(start(tmp_path, 2, 1, "--mode=report"), code=1):
        line = [line for line in errors.splitlines() if line.startswith("error")]
        assert line == [f"error: {tmp_path} holds other files and no run; take another --workdir"]
        assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("where", ["nowhere", "host:1,two,0", "host:1,2"])
def test_where_the_others_are_must_be_said(where):
    with pytest.raises(UserError, match="--distributed is '.*'; choices: auto, or address:port"):
        processes.initialize(where)


def test_a_step_s_operations_are_counted_where_arrays_belong_to_several(monkeypatch):
    """They are counted from tracers, as at the end of training on a chip with a known peak."""
    monkeypatch.setattr(jax, "make_array_from_process_local_data", None)
    step = parallel.map_step(lambda state, batch, key: (state @ batch["x"].T, {}), "shard_map")
    state, batch = np.ones((2, 3)), {"x": np.ones((8, 3))}
    assert speed.flops(step, state, batch, jax.random.key(0)) == 2 * 2 * 3 * 8
