"""The network of a finished run, ready to be measured."""

from functools import partial
from pathlib import Path
from typing import Literal, get_args

import jax

from robust_jax.app import stored, training
from robust_jax.app.config import choose
from robust_jax.app.measurements import Subject
from robust_jax.app.training import Training
from robust_jax.devices import parallel
from robust_jax.train.loop import Trained, restore

At = Literal["best", "last", "initialisation"]


def load(workdir: Path | str, at: At = "best") -> Subject:
    """Loads a finished run's network and data: its best, last or initial state.

    Raises UserError if workdir holds no run, or if `at` is none of these.
    """
    choose(get_args(At), at, "at")
    workdir = Path(workdir).absolute()
    config = stored.config_of(workdir)
    if config is None or stored.holds(workdir) != "a run":
        raise stored.no_run(workdir)
    run = training.build(config)
    return subject_of(run, restore(run.plan, workdir), at)


def subject_of(run: Training, trained: Trained, at: At = "best") -> Subject:
    """The network of a trained run: its best, last or initial state."""
    state = run.plan.init() if at == "initialisation" else getattr(trained, at)
    variables = parallel.on_this_device(state.variables)
    return Subject(
        run.model,
        variables,
        partial(training.network(run.model), variables),
        run.dataset,
        jax.random.key(run.config.seed),
    )
