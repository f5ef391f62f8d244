"""The arguments of launch.py before absl reads them, and what is wrong with them in one line."""

import argparse
import re
import traceback
from pathlib import Path

from robust_jax.app import stored
from robust_jax.errors import UserError

_HELP = ("help", "h", "?", "helpshort", "helpfull")


def completed(argv: list[str], configs: Path) -> list[str]:
    """The arguments, with the folder's config if none is given, and fractions as numbers.

    configs: the folder of the configs to choose from. Raises UserError if something is missing.
    """
    return with_fractions(with_stored_config(argv, configs))


def with_stored_config(argv: list[str], configs: Path) -> list[str]:
    """Adds --config, that of the run or study in --workdir, if none is given."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--workdir", "-workdir")
    given.add_argument("--config", "-config")
    given.add_argument("--mode", "-mode", default="train")
    known, rest = given.parse_known_args(argv[1:])
    if any(arg.lstrip("-") in _HELP for arg in rest):
        return argv
    if known.config and not Path(known.config.partition(":")[0]).is_file():
        raise UserError(f"there is no config {known.config}; {_choices(configs)}")
    if not known.workdir:
        choices = "" if known.config or known.mode != "train" else f"; {_choices(configs)}"
        raise UserError(f"--workdir is missing: a folder, as in --workdir=runs/demo{choices}")
    if known.config or known.mode == "compare":
        return argv
    workdir = Path(known.workdir).absolute()
    if stored.config_of(workdir) is None:
        if known.mode != "train":
            raise UserError(f"{workdir} holds no run; --mode={known.mode} needs a finished one")
        raise UserError(f"--config is missing and {workdir} holds no run; {_choices(configs)}")
    return [argv[0], f"--config={stored.__file__}:{workdir}", *argv[1:]]


def with_fractions(argv: list[str]) -> list[str]:
    """Turns fractions such as 8/255 into numbers, in --config.….eps and in tables of entries."""

    def decimal(match):
        if float(match[2]) == 0:
            raise UserError(f"{match[0]} is no number: it divides by 0")
        return repr(float(match[1]) / float(match[2]))

    def in_place(match):
        return match[1] + re.sub(fraction, decimal, match[2])

    fraction = r"(\d+(?:\.\d*)?)\s*/\s*(\d+(?:\.\d*)?)"

    return [
        re.sub(r"(--?config\.[^=]*eps=|['\"]eps['\"]\s*:\s*)([^'\"}]*)", in_place, arg)
        if re.match(r"--?config\.", arg)
        else arg
        for arg in argv
    ]


def mistake(error: Exception) -> str:
    """What is wrong with the flags or the config file, which is code and may raise anything."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UserError):
        return str(cause)
    reason = str(cause.args[-1] if cause.args else type(cause).__name__)
    if "Traceback" in reason:  # ml_collections folds one into its message
        reason = reason.strip().splitlines()[-1]
    places = [
        f" in {Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(cause.__traceback__)
        if "config" in frame.filename and "ml_collections" not in frame.filename
    ]
    return (
        f"{type(cause).__name__}{places[-1] if places else ''}: {' '.join(reason.split())} "
        "(--help lists the flags, configs/default.py the fields)"
    )


def _choices(configs: Path) -> str:
    runs = sorted(path.stem for path in configs.glob("*.py"))
    studies = sorted(path.stem for path in (configs / "studies").glob("*.py"))
    studies.remove("common")
    return (
        f"--config=configs/NAME.py for a run, NAME one of {', '.join(runs)}; "
        f"--config=configs/studies/NAME.py for a study: {', '.join(studies)}"
    )
