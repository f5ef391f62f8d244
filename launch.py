"""Trains a network, attacks it, measures its Jacobians and reports, as a config says.

python launch.py --config=configs/default.py --workdir=runs/demo [--config.field=value …]
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
# New attributes pass here and are refused with the choices by the config's own check.
config_flags.DEFINE_config_file(
    "config", "configs/default.py", "The config.", lock_config=False, accept_new_attributes=True
)
flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, records, results, report.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "report"],
    "train: all of it; evaluate, report: that part again, of a finished run.",
)
flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; flags look like --config.seed=1")
    logging.set_verbosity(logging.INFO)
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
    print(report.table(results))


if __name__ == "__main__":
    app.run(main)
