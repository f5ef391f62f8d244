"""Trains a network, attacks it, measures its Jacobians and reports, as a config says.

python launch.py --config=configs/default.py --workdir=runs/demo [--config.field=value …]
python launch.py --config=configs/studies/entm.py --workdir=runs/entm [--config.scale=smoke]
python launch.py … --distributed=10.0.0.1:1234,2,0     # and …,2,1 on the other of two hosts
"""

import argparse
import errno
import logging as python_logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from robust_jax.app import stored
from robust_jax.errors import CannotWrite, UserError

FLAGS = flags.FLAGS
# New attributes pass here and are refused, with the choices, by the config's own check.
config_flags.DEFINE_config_file(
    "config",
    None,
    "The config, a file in configs/; where there is none, that of the run or study in workdir. "
    "--config.field=value changes a field.",
    lock_config=False,
    accept_new_attributes=True,
)
flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, records, results, report.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "measure", "audit", "verify", "report"],
    "train: all of it. Of a finished run, evaluate: all again but training; measure, audit, "
    "report: that part alone; verify: every adversarial made anew from the checkpoint and compared "
    "with the records.",
)
flags.DEFINE_string(
    "only", "", "Of a study: an arm, or arm/seed, to run alone; --mode=report collects them."
)
flags.DEFINE_string(
    "distributed",
    "",
    "Several processes at one run: auto (SLURM, Open MPI, Kubernetes, a TPU pod tell), or "
    "address:port,number of processes,number of this one. Under srun and mpirun: auto.",
)
flags.DEFINE_bool("profile", False, "Leave a trace of ten training steps in workdir/profile.")
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; flags look like --config.seed=1")
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    python_logging.getLogger("absl").addFilter(_not_orbax)

    import jax

    from configs import default
    from robust_jax.app import entries, run, study
    from robust_jax.devices import processes, speed, stopping

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/robust_jax/compiled")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    # By default programs that compile within a second are not kept: a run has hundreds of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config, workdir = FLAGS.config, Path(FLAGS.workdir)
    try:
        processes.initialize(FLAGS.distributed)
        speed.keep_freed_memory()
        if not processes.is_first():
            logging.set_verbosity(logging.ERROR)
        with stopping.watched():
            if study.is_study(config):
                if FLAGS.profile:
                    raise UserError("--profile is for one run: give it a run's config and folder")
                typed: Any = FLAGS["config"]
                config = study.settled(config, typed.override_values)
                study.check(config, default.get_config())
                said = study.execute(config, workdir, FLAGS.mode, only=FLAGS.only)
            else:
                if FLAGS.only:
                    raise UserError("--only is a study's; this config is that of one run")
                entries.check(config, default.get_config())
                said = run.execute(config, workdir, FLAGS.mode, profile=FLAGS.profile)
        if processes.is_first():
            print(said)
    except CannotWrite as error:
        _exit_at_once(f"error: {error}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        _exit_at_once(f"error: {error.strerror}: {error.filename or workdir}; what was saved "
                      "before is kept, and the same command goes on from there")  # fmt: skip


def _exit_at_once(line: str) -> None:
    """Ends with the line: threads that still want to write would bury it under what they raise."""
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line for whatever is wrong with the flags or the config file."""
    try:
        argv = with_fractions(with_stored_config(argv))
        sys.argv[:] = argv  # where ml_collections looks for the overrides
        rest = FLAGS(argv)
        FLAGS.config.keys()  # a config file that failed to load says so when it is first used
        return rest
    except Exception as error:  # a config file is code and may raise anything
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            sys.exit(f"error: {cause}")
        reason = str(cause.args[-1] if cause.args else type(cause).__name__)
        if "Traceback" in reason:  # ml_collections folds one into its message
            reason = reason.strip().splitlines()[-1]
        where = traceback.extract_tb(cause.__traceback__)
        lines = [f" in {Path(f.filename).name}:{f.lineno}" for f in where if "config" in f.filename
                 and "ml_collections" not in f.filename]  # fmt: skip
        sys.exit(f"error: {type(cause).__name__}{lines[-1] if lines else ''}: "
                 f"{' '.join(str(reason).split())} "
                 "(--help lists the flags, configs/default.py the fields)")  # fmt: skip


def with_stored_config(argv: list[str]) -> list[str]:
    """The arguments, with --config where the folder has it: that of its run or study."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--workdir", "-workdir")
    given.add_argument("--config", "-config")
    given.add_argument("--mode", "-mode", default="train")
    known, rest = given.parse_known_args(argv[1:])
    if any(arg.lstrip("-") in ("help", "h", "?", "helpshort", "helpfull") for arg in rest):
        return argv
    if known.config and not Path(known.config.partition(":")[0]).exists():
        sys.exit(f"error: there is no config {known.config}; {configs_there_are()}")
    if not known.workdir:
        sys.exit("error: --workdir is missing: the folder of the run, as in --workdir=runs/demo"
                 f"{'' if known.config else f'; {configs_there_are()}'}")  # fmt: skip
    if known.config:
        return argv
    workdir = Path(known.workdir).absolute()
    if stored.config_of(workdir) is None:
        if known.mode != "train":
            sys.exit(f"error: {workdir} holds no run; --mode={known.mode} needs a finished one")
        sys.exit(f"error: --config is missing and {workdir} holds no run; {configs_there_are()}")
    return [argv[0], f"--config={stored.__file__}:{workdir}", *argv[1:]]


def with_fractions(argv: list[str]) -> list[str]:
    """The arguments with 8/255 as a number in every --config.….eps."""

    def decimal(match):
        return repr(float(match[1]) / float(match[2]))

    return [
        re.sub(r"(\d+(?:\.\d*)?)\s*/\s*(\d+(?:\.\d*)?)", decimal, arg)
        if re.match(r"--?config\.[^=]*eps=", arg) else arg
        for arg in argv
    ]  # fmt: skip


def configs_there_are() -> str:
    folder = Path(__file__).parent / "configs"
    runs = sorted(path.stem for path in folder.glob("*.py"))
    studies = sorted(path.stem for path in (folder / "studies").glob("*.py"))
    studies.remove("common")
    return (f"--config=configs/NAME.py for a run, NAME one of {', '.join(runs)}; "
            f"--config=configs/studies/NAME.py for a study: {', '.join(studies)}")  # fmt: skip


def _not_orbax(record: python_logging.LogRecord) -> bool:
    """Orbax tells each checkpoint's life at INFO, and its errors twice; they are told in a line."""
    return record.levelno == python_logging.WARNING or "orbax" not in record.pathname


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save: no traceback
    app.run(main, flags_parser=parse_flags)
