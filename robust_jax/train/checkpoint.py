"""Checkpoints of a run, by Orbax: written in the background, atomically, best and last.

A checkpoint holds the state and `notes`, a small JSON dict of what else the run must remember.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from robust_jax.errors import UserError
from robust_jax.train.state import TrainState

Notes = dict[str, Any]


class Checkpoints:
    """The newest checkpoints of a run in workdir/checkpoints/last, the best one in …/best."""

    def __init__(self, workdir: Path, template: TrainState):
        self._template = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        # One more than needed: where the newest is damaged, the one before is used.
        self._managers = {
            "last": _manager(workdir, "last", 2),
            "best": _manager(workdir, "best", 1),
        }

    def save(self, kind: str, state: TrainState, notes: Notes) -> None:
        """Starts writing the state; returns once it may be donated."""
        step = int(state.step)
        if step in self._managers[kind].all_steps():
            return  # a resumed run passes again, with the same bits, through what it has saved
        # Training donates its state while the write goes on, and on CPU Orbax reads in place.
        state = jax.tree.map(jnp.copy, state)
        self._managers[kind].save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
            ),
        )

    def restore(self, kind: str) -> tuple[TrainState, Notes] | None:
        """The newest readable checkpoint, or None where there is none; damaged ones are reported.

        Raises UserError where checkpoints exist and none can be read.
        """
        manager = self._managers[kind]
        steps = sorted(manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(self._template),
                        notes=ocp.args.JsonRestore(),
                    ),
                )
                return restored["state"], restored["notes"]
            except Exception as error:  # whatever a damaged file makes Orbax or TensorStore raise
                logging.warning(
                    "checkpoint %s/%d cannot be read, trying the one before: %s",
                    kind,
                    step,
                    str(error).splitlines()[0],
                )
        if steps:
            raise UserError(
                f"no checkpoint in {manager.directory} can be read; "
                "start in another --workdir, or remove this one"
            )
        return None

    def wait(self) -> None:
        """Returns once everything saved so far is on disk."""
        for manager in self._managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()


def _manager(workdir: Path, kind: str, max_to_keep: int) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        workdir.absolute() / "checkpoints" / kind,
        item_names=("state", "notes"),
        options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep),
    )
