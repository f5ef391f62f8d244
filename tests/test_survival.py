"""A run that is stopped again and again ends as if nothing had happened: `make test-slow`."""

import json
import random
import signal
import subprocess
import sys
import time

import chex
import pytest

from robust_jax import experiment
from robust_jax.train.loop import EXIT_TERMINATED
from tests.conftest import REPOSITORY, environment_of
from tests.test_demo import AUTOATTACK, TINY

NUM_STOPS = 20
ATTACKS = {"pgd_linf": {"name": "pgd", "eps": (0.1,), "num_steps": 3}, "autoattack": AUTOATTACK}
FLAGS = (*TINY, "--config.checkpoint_every=5 steps", "--config.validate_every=10 steps",
         f"--config.attacks={ATTACKS!r}")  # fmt: skip


def start(workdir):
    return subprocess.Popen(
        [sys.executable, "launch.py", *FLAGS, f"--workdir={workdir}"],
        cwd=REPOSITORY, env=environment_of(1, as_users_do=True),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(workdir):
    """Runs to the end; returns the seconds it took."""
    begun = time.perf_counter()
    process = start(workdir)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    return time.perf_counter() - begun


def left_in(workdir):
    """Everything that must be the same: numbers, metrics, records and the best parameters."""
    results = json.loads((workdir / "results.json").read_text())
    del results["timings"]
    files = {name: (workdir / name).read_text()
             for name in ("metrics.jsonl", "records/best.csv", "records/last.csv")}  # fmt: skip
    return results, files, experiment.load(workdir).variables


def stop(workdir, seconds, kind):
    """Starts the run and stops it after so long; whether it was in time to."""
    process = start(workdir)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(kind)
        begun = time.perf_counter()
        _, errors = process.communicate(timeout=60)
        # A SIGTERM before or after training ends the process as it ends any other.
        expected = {-kind, EXIT_TERMINATED} if kind == signal.SIGTERM else {-kind}
        assert process.returncode in expected, errors[-3000:]
        assert time.perf_counter() - begun < 30
        return True
    assert process.returncode == 0
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_random_moments_a_run_ends_as_undisturbed(tmp_path, kind):
    rng = random.Random(0)
    finish(tmp_path / "first")  # compiles, so that moments are spread over work
    seconds = finish(tmp_path / "undisturbed")
    expected = left_in(tmp_path / "undisturbed")
    stops = runs = 0
    while stops < NUM_STOPS:
        workdir = tmp_path / f"stopped_{runs}"
        runs += 1
        while stops < NUM_STOPS and stop(workdir, rng.uniform(0.2, 1) * seconds, kind):
            stops += 1
        finish(workdir)
        results, files, variables = left_in(workdir)
        assert results == expected[0]
        assert files == expected[1]
        chex.assert_trees_all_equal(variables, expected[2])
