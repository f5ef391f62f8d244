"""A run's folder: whose it is, the lock, what an evaluation clears and what it writes."""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from robust_jax.app import cards, stored, threat
from robust_jax.app import config as config_lib
from robust_jax.app.pages import report
from robust_jax.devices import processes
from robust_jax.errors import UserError
from robust_jax.files import save_arrays, write_json

Mode = Literal["train", "evaluate", "measure", "audit", "verify", "report"]
# The folder of attacks that are not finished yet.
_UNFINISHED = "unfinished"
# Fields that may change in a resumed run, or one that its study finds finished: no number depends
# on them.
_OF_NO_NUMBER = (
    "checkpoint_every",
    "data_dir",
    "parallel",
    "evaluation.batch_size",
    "evaluation.jacobian_chunk",
)
# Fields that every mode but training may change as well: training does not depend on them.
_OF_EVALUATION = ("attacks", "evaluation", "measurements", "audit")
_OF_NO_TRAINING = ("threat", *_OF_EVALUATION)


def claim(workdir: Path, config: ConfigDict, mode: Mode) -> None:
    """Claims workdir for this run, or checks that it holds the run.

    Raises UserError if it holds anything else, or a run of another config, with every field that
    differs.
    """
    if (found := stored.holds(workdir)) != "a run":
        _claim_new(workdir, found, stored.RUN, config, mode)
        return
    if changed := _differences(workdir, config, mode):
        if stored.is_finished(workdir) and not _differences(workdir, config, "report"):
            raise UserError(
                f"{workdir} is finished, and was evaluated with another config "
                f"({'; '.join(changed)}); --mode=evaluate, measure and audit add to it"
            )
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); take another "
            "--workdir or the same config"
        )


def _differences(workdir: Path, config: ConfigDict, mode: Mode) -> list[str]:
    """The fields that differ but must not in this mode.

    Fields that follow the threat model may also be written out. Once a run is trained, a new threat
    model does not count as a difference in them, since training was against the old one.
    """
    old = stored.config_of(workdir)
    assert old is not None
    ignore = (*_OF_NO_NUMBER, *(() if mode == "train" else _OF_NO_TRAINING))
    pairs = [(threat.complete(old), threat.complete(config))]
    if mode != "train":
        pairs.append((old, config))
    found = [
        config_lib.differences(*map(config_lib.to_json, pair), ignore=ignore) for pair in pairs
    ]
    return min(found, key=len)


def claim_study(workdir: Path, config: ConfigDict, mode: Mode) -> None:
    """Claims workdir for this study, or checks that it holds the study, whatever its runs are."""
    found = stored.holds(workdir)
    if found == "a study" and (old := stored.config_of(workdir)) and old.paper != config.paper:
        raise UserError(f"{workdir} holds another study, {old.title!r}; take another --workdir")
    own = {*config.arms, stored.STUDY}  # of an older study, or one that another process starts
    if found == "other files" and own.issuperset(
        path.name for path in workdir.iterdir() if path.suffix != ".pending"
    ):
        return
    if found != "a study":
        _claim_new(workdir, found, stored.STUDY, config, mode)


def check_trained_as(workdir: Path, config: ConfigDict) -> ConfigDict:
    """Checks a finished run's threat model and training against its study; returns its config.

    Raises UserError otherwise.
    """
    if (old := stored.config_of(workdir)) is None:
        raise UserError(f"{workdir} has results and no {stored.RUN}, which says of what")
    trees = (config_lib.to_json(threat.complete(of)) for of in (old, config))
    if changed := config_lib.differences(*trees, ignore=(*_OF_NO_NUMBER, *_OF_EVALUATION)):
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); what trains cannot "
            "be changed in a study that has runs"
        )
    return old


# What a mode takes from the config, besides where the data are and how devices share them.
_HEEDED: Mapping[Mode, tuple[str, ...]] = {
    "measure": ("measurements",),
    "audit": ("audit",),
    "verify": (),
    "report": (),
}


def check_heeded(workdir: Path, config: ConfigDict, typed: Iterable[str], mode: Mode) -> None:
    """Checks the typed fields and the threat model of a config against a finished run.

    Raises UserError for what the mode would ignore.
    """
    old = stored.config_of(workdir)
    if mode not in _HEEDED or old is None:
        return
    was, asked = (config_lib.flatten(config_lib.to_json(c)) for c in (old, config))
    for path in typed:
        if path.partition(".")[0] in (*_HEEDED[mode], "data_dir", "parallel"):
            continue
        for field in {*was, *asked}:
            if config_lib.is_within(field, (path,)) and was.get(field) != asked.get(field):
                raise UserError(f"--mode={mode} ignores config.{path}; use --mode=evaluate")
    # Measurements and the audit follow the threat model.
    if _HEEDED[mode] and threat.complete(old).threat != threat.complete(config).threat:
        raise UserError(f"--mode={mode} ignores config.threat; use --mode=evaluate")


def _claim_new(
    workdir: Path, found: stored.Holds, name: str, config: ConfigDict, mode: Mode
) -> None:
    kind = "run" if name == stored.RUN else "study"
    if found != "nothing":
        raise UserError(f"{workdir} holds {found} and no {kind}; take another --workdir")
    if mode != "train":
        raise UserError(f"{workdir} holds no {kind}; --mode={mode} needs a finished one")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / name, config_lib.to_json(config))
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of workdir; the lock goes with the process, however it ends."""
    with contextlib.ExitStack() as stack:

        def lock():
            try:
                file = stack.enter_context((workdir / ".lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is at work in {workdir}; wait for it or take another "
                    "--workdir"
                ) from error
            except OSError as error:
                raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error

        processes.on_first(lock)
        yield


class Earlier(NamedTuple):
    """What earlier evaluations left: records by checkpoint, measurements, their arrays, audit."""

    records: dict[str, pd.DataFrame]
    measurements: dict[str, Any]
    arrays: dict[str, np.ndarray]
    audit: dict[str, Any] | None


def earlier(workdir: Path) -> Earlier:
    """What the folder holds if results.json marks it as complete; else nothing."""
    if not stored.is_finished(workdir):
        return Earlier({}, {}, {}, None)
    results = stored.results(workdir)
    found = stored.load(workdir).records
    return Earlier(found, results["measurements"], stored.measured(workdir), results["audit"])


def unfinished(workdir: Path, config: ConfigDict, name: str, step: int) -> Path:
    """The folder, one per evaluation, in which attacks on a checkpoint save their state."""
    tree = config_lib.flatten(config_lib.to_json(config))
    others = (*_OF_NO_NUMBER, "measurements", "audit")
    kept = {k: v for k, v in tree.items() if not config_lib.is_within(k, others)}
    what = json.dumps([kept, name, step], sort_keys=True)
    return workdir / _UNFINISHED / hashlib.sha256(what.encode()).hexdigest()[:16]


def write_evaluation(
    workdir: Path,
    results: dict[str, Any],
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, np.ndarray] = MappingProxyType({}),
    images: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Replaces an evaluation with one that contains more.

    A folder with results.json is complete, so that file is deleted first and written last. Before
    that, the tables and arrays are written beside the old ones, so that a full disk is noticed
    while the old ones are still there.
    """
    (workdir / "records").mkdir(exist_ok=True)
    pending = {workdir / "records" / f"{name}.csv.pending": table for name, table in tables.items()}
    for path, table in pending.items():
        table.to_csv(path, index=False)
    found = {"examples": images, "measurements": arrays}
    saved = {workdir / f"{name}.npz.pending": of for name, of in found.items() if of}
    for path, of_name in saved.items():
        save_arrays(path, **of_name)
    for name in ("results.json", "examples.npz", "card.json"):
        (workdir / name).unlink(missing_ok=True)
    for path in (*pending, *saved):
        path.rename(path.with_suffix(""))
    write(workdir, results)
    shutil.rmtree(workdir / _UNFINISHED, ignore_errors=True)


def write_arrays(workdir: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays of the measurements."""
    save_arrays(workdir / "measurements.npz", **arrays)


def write(workdir: Path, results: dict[str, Any]) -> None:
    """Writes the card, a run's config.json, results.json and the report.

    The report comes last, since a run is whole without it.
    """
    (workdir / "report.html").unlink(missing_ok=True)  # an old one would pass for that of these
    if card := cards.card(results):
        write_json(workdir / "card.json", card)
    if (workdir / stored.RUN).exists():
        write_json(workdir / stored.RUN, results["config"])
    stored.write_results(workdir, results)
    write_report(workdir, results)


def write_report(workdir: Path, results: dict[str, Any]) -> None:
    """Writes only report.html."""
    logging.info("report: %s", report.write(workdir, results))
