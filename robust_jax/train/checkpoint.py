"""The best and last checkpoints of a run, which Orbax writes atomically in the background.

A checkpoint holds the state and `notes`, a small JSON dict of what else a run must remember.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from robust_jax.devices import parallel, processes
from robust_jax.errors import CannotWrite, UserError
from robust_jax.train.state import TrainState

Notes = dict[str, Any]


class Checkpoints:
    """The newest checkpoints of a run in workdir/checkpoints/last, and the best in …/best."""

    def __init__(self, workdir: Path, template: TrainState):
        self._workdir = workdir
        # Restored whole to every current device, however many there were when it was saved.
        self._template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=parallel.replicated()
            ),
            template,
        )
        # Each keeps a spare, used if the newest is damaged, or if the newest best is of steps that
        # a resumed run repeats.
        self._managers = {kind: _manager(workdir, kind) for kind in ("last", "best")}

    def save(self, kind: str, state: TrainState, notes: Notes) -> None:
        """Starts writing the state once earlier saves are on disk; it may then be donated.

        Raises CannotWrite if an earlier save could not be written.
        """
        step = int(state.step)
        # One at a time: with several processes, two busy managers would wait for one another, since
        # Orbax gives their barriers the same names. The best must also be on disk before a later
        # `last`, or a resumed run could skip it.
        self.wait()
        # A copy: training donates its state during the write, and on CPU Orbax reads in place.
        state = parallel.on_every_device(state)
        notes = {"digest": _digest(state, notes), **notes}
        with self._writing():
            self._managers[kind].save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
                ),
            )

    def forget_after(self, step: int) -> bool:
        """Drops the best checkpoints of later steps, which a run that resumes here repeats.

        Repeated steps may differ, for instance on another number of devices. Returns whether a
        best checkpoint is left.
        """
        manager = self._managers["best"]
        for later in [known for known in manager.all_steps() if known > step]:
            manager.delete(later)
        return bool(manager.all_steps())

    def restore(self, kind: str) -> tuple[TrainState, Notes] | None:
        """The newest readable checkpoint, or None if there is none.

        Newer ones that cannot be read are reported and moved to workdir/checkpoints/damaged.
        Raises UserError if checkpoints exist but none can be read; they stay where they are.
        """
        manager = self._managers[kind]
        steps = sorted(manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            read, problem = self._read(manager, step)
            if processes.any_of(read is None):  # if one process cannot, none uses it
                logging.warning(
                    "checkpoint %s/%d cannot be read, trying the one before: %s",
                    kind,
                    step,
                    problem or "another process failed to",
                )
                continue
            if i:
                processes.on_first(partial(self._set_aside, kind, steps[:i]))
                manager.reload()
            return read
        if steps:
            raise UserError(
                f"no checkpoint in {manager.directory} can be read (see the warnings above); "
                "start in another --workdir if they are damaged"
            )
        return None

    def _read(
        self, manager: ocp.CheckpointManager, step: int
    ) -> tuple[tuple[TrainState, Notes] | None, str]:
        """What the checkpoint holds, or None and why it cannot be read."""
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(self._template),
                    notes=ocp.args.JsonRestore(),
                ),
            )
            state, notes = restored["state"], restored["notes"]
            if notes.pop("digest", None) != _digest(state, notes):
                return None, "its numbers are not those that were saved"
            return (state, notes), ""
        except Exception as error:  # whatever a damaged file makes Orbax or TensorStore raise
            return None, str(error).splitlines()[0]

    def _set_aside(self, kind: str, steps: list[int]) -> None:
        folder = self._workdir / "checkpoints" / "damaged"
        folder.mkdir(exist_ok=True)
        for step in steps:
            taken = len(list(folder.glob(f"{kind}_{step}*")))
            name = f"{kind}_{step}" + (f"_{taken + 1}" if taken else "")
            (Path(self._managers[kind].directory) / str(step)).rename(folder / name)

    def wait(self) -> None:
        """Waits until everything saved so far is on disk. Raises CannotWrite if a save failed."""
        with self._writing():
            for manager in self._managers.values():
                manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            for manager in self._managers.values():
                manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueError
            reason = " ".join(str(error).split())
            raise CannotWrite(
                f"a checkpoint could not be written: {reason[:120]} … {reason[-60:]}; those in "
                f"{self._workdir / 'checkpoints'} are kept, and the same command resumes from there"
            ) from error


def _digest(state: TrainState, notes: Notes) -> str:
    """A checksum of what is saved, since a flipped bit may still decode, to other numbers."""
    digest = hashlib.blake2b(json.dumps(notes, sort_keys=True).encode(), digest_size=16)
    for leaf in jax.tree.leaves(jax.device_get(state)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _manager(workdir: Path, kind: str) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        workdir.absolute() / "checkpoints" / kind,
        item_names=("state", "notes"),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )
