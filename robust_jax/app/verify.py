"""Checks that a finished run's records and table follow from its checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from robust_jax.app import records, stored
from robust_jax.app.experiment import Experiment
from robust_jax.app.results import summarize
from robust_jax.errors import UserError
from robust_jax.train.loop import Trained


def compare(
    experiment: Experiment, trained: Trained, workdir: Path, results: dict[str, Any]
) -> str:
    """Repeats the attacks with the same keys and compares with the records and results.

    Returns the outcome, in a line. Raises UserError with the differences, if an example's records
    differ or the records do not add up to the table.
    """
    saved, wrong = stored.load(workdir).records, []
    kept = {attack["name"] for attack in results["attacks"] if attack.get("earlier")}
    states = {"best": trained.best, "last": trained.last}
    for name in saved:
        state = states[name]
        if name == "last" and int(state.step) == int(trained.best.step):
            fresh = saved["best"]
        else:
            fresh = experiment.evaluator.records(state.variables, f"verify {name}")
            if len(fresh) == len(saved[name]):  # kept attacks may have seen fewer examples
                fresh = records.as_far_as(fresh, saved[name], kept)
        if "relative_slope" not in saved[name]:  # an older version wrote it
            fresh = fresh.drop(columns="relative_slope", errors="ignore")
        found = records.disagreements(saved[name], fresh)
        logging.info("%s: %d columns agree", name, len(saved[name].columns) - len(found))
        wrong += [f"records/{name}.csv {column}: {count} rows" for column, count in found.items()]
        temperature = results[name].get("temperature")
        summary = summarize(saved[name], experiment.grids, kept, temperature)
        for part, value in summary.items():
            if not _alike(value, results[name].get(part)):
                wrong.append(f"results.json {name}.{part} is not what the records add up to")
            if name == "best" and not _alike(value, results.get(part)):
                wrong.append(f"results.json {part} is not what the records add up to")
    if wrong:
        raise UserError(f"{workdir} is not confirmed: {'; '.join(wrong)}")
    count = len(saved["best"])
    return f"confirmed: every adversarial of {workdir} was found again ({count} examples)"


def _alike(one: Any, other: Any) -> bool:
    """Equal apart from the last digits of numbers, which a CSV file rounds."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_alike(one[k], other[k]) for k in one)
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=1e-5, atol=1e-8, equal_nan=True))
    return one == other
