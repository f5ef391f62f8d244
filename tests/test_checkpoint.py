"""Damaged checkpoints are skipped for the one before or refused, and never give other numbers."""

import contextlib
import functools
import gc
import resource
import shutil
import subprocess
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from robust_jax.devices import parallel
from robust_jax.errors import CannotWrite, UserError
from robust_jax.train.checkpoint import Checkpoints
from robust_jax.train.state import TrainState
from tests.conftest import REPOSITORY, environment_of

# Orbax abandons its pending reads where a file of a checkpoint cannot be read.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Collects what Orbax left behind, so that its warnings come here and not in a later file."""
    yield
    gc.collect()


@functools.cache
def state_at(step, width=40):
    """Random numbers, so that a file does not compress to nothing."""
    rng = np.random.default_rng(step)
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={
            "kernel": jnp.asarray(rng.normal(size=(width, 50)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=width), jnp.float32),
        },
        batch_stats={},
        opt_state=(jnp.asarray(rng.normal(size=width), jnp.float32),),
        average=None,
    )
    return jax.device_put(state, parallel.replicated())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with checkpoints of steps 3 and 5."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, state_at(0))
    for step in (3, 5):
        checkpoints.save("last", state_at(step), {"step": step})
    checkpoints.wait()
    checkpoints.close()
    return workdir


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def flipped(at):
    def flip(file):
        content = bytearray(file.read_bytes())
        content[int(at * (len(content) - 1))] ^= 0x10
        file.write_bytes(bytes(content))

    return flip


def removed(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def emptied_folder(path):
    shutil.rmtree(path)
    path.mkdir()


# What is damaged, in the folder of step 5, and how.
TARGETS = {
    "the arrays": "state/**/d/*",
    "the state's manifest": "state/manifest.ocdbt",
    "the state's metadata": "state/_METADATA",
    "the notes": "notes/metadata",
    "the state": "state",
    "all notes": "notes",
    "the step": "",
}
FILES = ("the arrays", "the state's manifest", "the state's metadata", "the notes")
DAMAGE = {
    "cut": cut,
    "emptied": emptied,
    "removed": removed,
    "flipped early": flipped(0.1),
    "flipped": flipped(0.5),
    "flipped late": flipped(0.9),
}
CASES = [(target, name) for target in FILES for name in DAMAGE]
CASES += [
    (target, name)
    for target in ("the state", "all notes", "the step")
    for name in ("removed", "emptied folder")
]


@pytest.mark.parametrize(("target", "damage"), CASES)
def test_a_damaged_checkpoint_is_skipped_or_as_it_was(target, damage, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    folder = workdir / "checkpoints/last/5"
    paths = list(folder.glob(TARGETS[target])) if TARGETS[target] else [folder]
    assert paths
    for path in paths:
        {**DAMAGE, "emptied folder": emptied_folder}[damage](path)
    checkpoints = Checkpoints(workdir, state_at(0))
    state, notes = checkpoints.restore("last")
    step = int(state.step)
    # A byte that nothing reads may change; what is read is what was saved, to the bit.
    assert step in ((3, 5) if "flipped" in damage or "metadata" in target else (3,))
    assert notes == {"step": step}
    chex.assert_trees_all_equal(state, state_at(step))
    checkpoints.close()


def test_a_step_that_is_damaged_is_set_aside_and_written_again(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    folder = workdir / "checkpoints/last"
    for _ in range(2):
        emptied(folder / "5/notes/metadata")
        checkpoints = Checkpoints(workdir, state_at(0))
        assert int(checkpoints.restore("last")[0].step) == 3
        checkpoints.save("last", state_at(5), {"step": 5})
        checkpoints.wait()
        assert int(checkpoints.restore("last")[0].step) == 5
        checkpoints.close()
    aside = sorted(p.name for p in (workdir / "checkpoints/damaged").iterdir())
    assert aside == ["last_5", "last_5_2"]


def test_where_all_are_damaged_they_are_refused_and_stay(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for manifest in workdir.glob("checkpoints/last/*/state/manifest*"):
        manifest.unlink()
    checkpoints = Checkpoints(workdir, state_at(0))
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        checkpoints.restore("last")
    assert checkpoints.restore("best") is None
    assert sorted(p.name for p in (workdir / "checkpoints/last").iterdir()) == ["3", "5"]
    checkpoints.close()


def test_one_checkpoint_at_a_time_is_written(tmp_path, monkeypatch):
    """Two managers at work make several processes wait for one another, sometimes for ever."""
    may_end, order = threading.Event(), []
    finish, save = ocp.CheckpointManager._wait_for_checkpointers, ocp.CheckpointManager.save

    def finished_late(manager):
        assert may_end.wait(timeout=20)
        finish(manager)
        order.append(f"{manager.directory.name} ended")

    def saved(manager, *args, **kwargs):
        order.append(f"{manager.directory.name} began")
        return save(manager, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "_wait_for_checkpointers", finished_late)
    monkeypatch.setattr(ocp.CheckpointManager, "save", saved)
    checkpoints = Checkpoints(tmp_path, state_at(0))
    checkpoints.save("last", state_at(1), {})
    wait = checkpoints.wait

    def wait_and_tell():
        may_end.set()  # the first may end only once it is waited for
        wait()

    monkeypatch.setattr(checkpoints, "wait", wait_and_tell)
    checkpoints.save("best", state_at(2), {})
    checkpoints.close()
    assert order == ["last began", "last ended", "best began", "best ended"]


def test_a_full_disk_is_told_and_what_was_saved_stays(saved, tmp_path):
    """A limit on the size of files stands in for a disk with that much room."""
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    checkpoints = Checkpoints(workdir, state_at(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CannotWrite, match="a checkpoint could not be written: .* are kept"):
            checkpoints.save("last", state_at(7), {"step": 7})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with contextlib.suppress(CannotWrite):
        checkpoints.close()
    # In another process, as for a user, since Orbax's threads in this one may still be busy.
    done = subprocess.run(
        [sys.executable, "-c", SAVED_AGAIN, str(workdir)],
        cwd=REPOSITORY,
        env=environment_of(len(jax.devices())),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


SAVED_AGAIN = """
import sys
from pathlib import Path
import chex
from robust_jax.train.checkpoint import Checkpoints
from tests.test_checkpoint import state_at
again = Checkpoints(Path(sys.argv[1]), state_at(0))
state, notes = again.restore("last")
assert notes == {"step": 5}
chex.assert_trees_all_equal(state, state_at(5))
again.save("last", state_at(7), {"step": 7})
again.wait()
chex.assert_trees_all_equal(again.restore("last")[0], state_at(7))
again.close()
"""


@pytest.mark.parametrize("width", [20, 41])
def test_a_checkpoint_of_other_shapes_is_refused(width, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    checkpoints = Checkpoints(workdir, state_at(0, width))
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        checkpoints.restore("last")
    assert sorted(p.name for p in (workdir / "checkpoints/last").iterdir()) == ["3", "5"]
    checkpoints.close()
