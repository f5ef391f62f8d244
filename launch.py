"""Trains a network, attacks it, measures its Jacobians and reports, as a config says.

python launch.py --config=configs/default.py --workdir=runs/demo [--config.field=value …]
python launch.py --config=configs/studies/entm.py --workdir=runs/entm [--config.scale=smoke]
python launch.py --workdir=runs/demo --mode=report     # or evaluate, measure, audit, verify
python launch.py --mode=compare --workdir=runs/both runs/demo runs/other
python launch.py … --distributed=10.0.0.1:1234,2,0     # and …,2,1 on the other of two hosts
"""

import errno
import logging as python_logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from robust_jax.app import command_line
from robust_jax.errors import CannotWrite, UserError

FLAGS = flags.FLAGS
# New attributes pass here; the config's own check refuses them and names the choices.
config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file; if omitted, the one stored in --workdir. --config.field=value changes a field.",
    lock_config=False,
    accept_new_attributes=True,
)
flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, records, results, report.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "measure", "audit", "verify", "report", "compare"],
    "train: train, evaluate, audit and report. The others are for finished runs and need no "
    "--config. evaluate: attack and measure again, added to what there is; measure: only "
    "config.measurements; audit: only the audit; verify: attack again from the checkpoint and "
    "compare with the records; report: only the page; compare: a page of several runs, "
    "--mode=compare --workdir=OUT RUN RUN …",
)
flags.DEFINE_string(
    "only",
    "",
    "Run one arm, ARM/SEED or ARM/sweep of a study; --mode=report collects the results.",
)
flags.DEFINE_string(
    "distributed",
    "",
    "Join several processes into one run: auto takes the addresses from SLURM, Open MPI, "
    "Kubernetes or a TPU pod, and is the default under srun and mpirun; or address:port,number of "
    "processes,number of this one.",
)
flags.DEFINE_bool("profile", False, "Leave a trace of ten training steps in workdir/profile.")
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    python_logging.getLogger("absl").addFilter(_not_orbax)
    try:
        if said := carry_out(argv[1:]):
            print(said)
    except CannotWrite as error:
        _exit_at_once(f"error: {error}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        _exit_at_once(
            f"error: {error.strerror}: {error.filename or FLAGS.workdir}; what was saved before is "
            "kept, and the same command continues from there"
        )


def carry_out(arguments: list[str]) -> str:
    """Does what the flags say; returns what the first process prints."""
    workdir = Path(FLAGS.workdir)
    if FLAGS.mode == "compare":
        from robust_jax.app.pages import compare

        return compare.write(arguments, workdir)
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; flags look like --config.seed=1")

    import jax

    from configs import default
    from robust_jax.app import experiment, folder, run
    from robust_jax.app.studies import study
    from robust_jax.devices import processes, speed, stopping

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/robust_jax/compiled")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    # By default JAX does not keep programs that compile within a second; a run has hundreds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    processes.initialize(FLAGS.distributed)
    speed.keep_freed_memory()
    if not processes.is_first():
        logging.set_verbosity(logging.ERROR)
    config = FLAGS.config
    trains = FLAGS.mode == "train"
    check_run = partial(experiment.check, schema=default.get_config(), trains=trains)
    flag: Any = FLAGS["config"]
    typed = flag.override_values
    with stopping.watched():
        if study.is_study(config):
            if FLAGS.profile:
                raise UserError("--profile is for one run: give it a run's config and folder")
            config = study.settled(config, typed)
            study.check(config, check_run)
            said = study.execute(config, workdir, FLAGS.mode, only=FLAGS.only)
        else:
            if FLAGS.only:
                raise UserError("--only needs a study's config; this one is of a single run")
            check_run(config)
            folder.check_heeded(workdir, config, typed, FLAGS.mode)
            said = run.execute(config, workdir, FLAGS.mode, profile=FLAGS.profile)
    return said if processes.is_first() else ""


def _exit_at_once(line: str) -> None:
    """Prints the line and exits, before threads that still write bury it under their errors."""
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses as absl does, with one line for a mistake in the flags or the config file."""
    try:
        sys.argv[:] = command_line.completed(argv, Path(__file__).parent / "configs")
        rest = FLAGS(sys.argv)
        if FLAGS.config is not None:
            FLAGS.config.keys()  # a config file that failed to load raises on first use
        return rest
    except Exception as error:
        sys.exit(f"error: {command_line.mistake(error)}")


def _not_orbax(record: python_logging.LogRecord) -> bool:
    """Orbax logs each checkpoint at length and each error twice; launch.py says it in one line."""
    return record.levelno == python_logging.WARNING or "orbax" not in record.pathname


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save: no traceback
    app.run(main, flags_parser=parse_flags)
