"""A run that is stopped again and again ends as if nothing had happened: `make test-slow`.

`pytest -m slow -rP tests/test_survival.py` shows at what work each stop came.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import chex
import jax
import pytest
from ml_collections import ConfigDict

from robust_jax import experiment
from robust_jax.train.loop import EXIT_TERMINATED, restore
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
    """Everything that must be the same: numbers, metrics, records, best and last parameters."""
    results = json.loads((workdir / "results.json").read_text())
    del results["timings"]
    files = {name: (workdir / name).read_text()
             for name in ("metrics.jsonl", "records/best.csv", "records/last.csv")}  # fmt: skip
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    trained = restore(experiment.build(config, config).plan, workdir)
    return results, files, jax.device_get((trained.best, trained.last))


def work_of(workdir):
    """What a process that was stopped had been at, by what it left."""
    last = workdir / "checkpoints/last"
    steps = [path.name for path in last.glob("*")] if last.exists() else []
    if any("tmp" in name for name in steps):
        return "writing a checkpoint"
    if (workdir / "unfinished").exists() or (workdir / "records").exists():
        return "evaluation"
    if "26" in steps:
        return "before evaluation"
    return "training" if (workdir / "metrics.jsonl").exists() else "before training"


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
        if process.returncode == 0:  # it ended just before
            return False
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
    stops, runs = [], 0
    while len(stops) < NUM_STOPS:
        workdir = tmp_path / f"stopped_{runs}"
        runs += 1
        while len(stops) < NUM_STOPS and stop(workdir, rng.uniform(0, 1) * seconds, kind):
            stops.append(work_of(workdir))
        finish(workdir)
        results, files, variables = left_in(workdir)
        assert results == expected[0]
        assert files == expected[1]
        chex.assert_trees_all_equal(variables, expected[2])
    print(kind.name, Counter(stops))
