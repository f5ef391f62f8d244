"""A run that is stopped again and again ends as if nothing had happened: `make test-slow`.

`pytest -m slow -rP tests/test_survival.py` shows how many stops came during which work.
"""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path

import chex
import jax
import pytest
from ml_collections import ConfigDict

from robust_jax.app import training
from robust_jax.train.loop import restore
from tests.conftest import REPOSITORY, environment_of
from tests.launches import flags
from tests.test_demo import AUTOATTACK, TINY

NUM_STOPS = 20
ATTACKS = {"pgd_linf": {"name": "pgd", "eps": (0.1,), "num_steps": 3}, "autoattack": AUTOATTACK}
FLAGS = flags(
    {
        **TINY,
        "duration": "150 steps",
        "checkpoint_every": "5 steps",
        "validate_every": "10 steps",
        "attacks": ATTACKS,
    }
)


def touched(workdir: Path, pattern: str, since: float) -> bool:
    """Whether a file or folder of that pattern has changed since then."""
    times = []
    for path in workdir.glob(pattern):
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # renamed or removed just now
            continue
    return max(times, default=0.0) > since


# The sign that a process is at some work, and the share of a run within which it is stopped.
WORK: Mapping[str, tuple[Callable[[Path, float], bool], float]] = {
    "anywhere": (lambda workdir, since: True, 1.0),
    "training": (lambda workdir, since: touched(workdir, "checkpoints/last/*", since), 0.3),
    "writing a checkpoint": (
        lambda workdir, since: touched(workdir, "checkpoints/*/*tmp*", since),
        0.005,
    ),
    "evaluation": (lambda workdir, since: touched(workdir, "unfinished/*", since), 0.2),
}


def start(workdir):
    return subprocess.Popen(
        [sys.executable, "launch.py", *FLAGS, f"--workdir={workdir}"],
        cwd=REPOSITORY,
        env=environment_of(1, as_users_do=True),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


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
    files = {
        name: (workdir / name).read_text()
        for name in ("metrics.jsonl", "records/best.csv", "records/last.csv")
    }
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    trained = restore(training.build(config).plan, workdir)
    return results, files, jax.device_get((trained.best, trained.last))


def work_of(workdir, since):
    """The work at which a process that began then was stopped, judging by what it left."""
    steps = [path.name for path in (workdir / "checkpoints/last").glob("*")]
    if touched(workdir, "checkpoints/*/*tmp*", since):
        return "writing a checkpoint"
    if (workdir / "unfinished").exists() or (workdir / "records").exists():
        return "evaluation"
    if "150" in steps:
        return "before evaluation"
    return "training" if (workdir / "metrics.jsonl").exists() else "before training"


def stop(workdir, work, seconds, kind):
    """Stops a run so many seconds into a work; returns what it was at, or None if it had ended."""
    since, process = time.time(), start(workdir)
    while not WORK[work][0](workdir, since) and process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.002)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(kind)
        begun = time.perf_counter()
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:  # it ended just before
            return None
        # Before launch.py listens, a signal ends it as it ends any other process.
        expected = {-kind} if kind == signal.SIGKILL else {-kind, 128 + kind}
        assert process.returncode in expected, errors[-3000:]
        assert time.perf_counter() - begun < 30
        return work_of(workdir, since)
    assert process.returncode == 0
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_at_random_moments_a_run_ends_as_undisturbed(tmp_path, kind):
    rng = random.Random(0)
    finish(tmp_path / "first")  # compiles, so that moments are spread over work
    seconds = finish(tmp_path / "undisturbed")
    expected = left_in(tmp_path / "undisturbed")
    stops, runs, works = [], 0, cycle(WORK)
    while len(stops) < NUM_STOPS:
        workdir = tmp_path / f"stopped_{runs}"
        runs += 1
        while len(stops) < NUM_STOPS:
            work = next(works)
            stopped = stop(workdir, work, rng.uniform(0, WORK[work][1]) * seconds, kind)
            if stopped is None:
                break
            stops.append(stopped)
        finish(workdir)
        results, files, variables = left_in(workdir)
        assert results == expected[0]
        assert files == expected[1]
        chex.assert_trees_all_equal(variables, expected[2])
    print(kind.name, Counter(stops))
