"""Trains a network, attacks it, measures its Jacobians and reports, as a config says.

python launch.py --config=configs/default.py --workdir=runs/demo [--config.field=value …]
"""

import logging as python_logging
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
# New attributes pass here and are refused, with the choices, by the config's own check.
config_flags.DEFINE_config_file(
    "config", None, "The config, a file in configs/.", lock_config=False, accept_new_attributes=True
)
flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, records, results, report.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "report"],
    "train: all of it; evaluate, report: that part again, of a finished run.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; flags look like --config.seed=1")
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    python_logging.getLogger("absl").addFilter(_not_orbax)

    import jax

    from configs import default
    from robust_jax import report, run
    from robust_jax.errors import UserError

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/robust_jax/compiled")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    try:
        results = run.run(FLAGS.config, default.get_config(), Path(FLAGS.workdir), FLAGS.mode)
    except UserError as error:
        sys.exit(f"error: {error}")
    if results:  # of several processes only the first has them
        print(report.table(results))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line for whatever is wrong with the flags or the config's path."""
    try:
        rest = FLAGS(argv)
        iter(FLAGS.config)  # a config file that failed to load says so when it is first used
        return rest
    except (flags.Error, KeyError, AttributeError, OSError) as error:
        reason = " ".join(str(error.args[-1]).split())
        sys.exit(f"error: {reason} (--help lists the flags, configs/default.py the fields)")


def _not_orbax(record: python_logging.LogRecord) -> bool:
    """Orbax tells each checkpoint's life through absl at INFO; users want its warnings only."""
    return record.levelno > python_logging.INFO or "orbax" not in record.pathname


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
