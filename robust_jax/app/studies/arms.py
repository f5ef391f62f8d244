"""The runs of a study: its arms over seeds, and the sweeps that choose a value for an arm."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from robust_jax.app import stored
from robust_jax.app.config import choose, get_field, set_field
from robust_jax.app.studies import measures
from robust_jax.errors import UserError

# What an arm's sweep says; see docs/studies/verdicts.md.
_SWEEP_KEYS = ("field", "values", "by", "nearest")
SWEEP = "sweep"  # the folder of an arm's sweep, beside those of its seeds


class Trial(NamedTuple):
    """One run of a study, in the folder of its name.

    swept: the value that it tries, if it belongs to a sweep.
    """

    arm: str
    seed: int
    config: ConfigDict
    swept: float | None = None

    @property
    def name(self) -> str:
        part = self.seed if self.swept is None else f"{SWEEP}/{self.swept}"
        return f"{self.arm}/{part}"


class Sweep(NamedTuple):
    """What a sweep found.

    by: the measure that chooses. found: the measure at each value, None where it is missing.
    target: the measure of the arm `nearest`, to which it should be close; None if the highest is
    chosen. chosen: None before the sweep is finished.
    """

    field: str
    values: tuple[float, ...]
    by: str
    found: list[float | None]
    nearest: str | None
    target: float | None
    chosen: float | None


def changed(base: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of base with the changes; entries with a name, and attacks, are replaced whole."""
    result = ConfigDict(base.to_dict())
    for field, value in changes.items():
        entry = isinstance(value, Mapping | ConfigDict)
        merge = entry and isinstance(result.get(field), ConfigDict)
        if merge and "name" not in value and field != "attacks":
            result[field] = changed(result[field], value)
        else:
            with result.ignore_type():  # mistakes are reported when fields are checked
                result[field] = ConfigDict(value) if entry else value
    return result


def extra_seeds(config: ConfigDict) -> tuple[int, ...]:
    """The seeds that may be added to the first ones if intervals are too wide."""
    after = max(config.seeds) + 1
    return tuple(range(after, after + max(config.seeds_limit - len(config.seeds), 0)))


def trials(
    config: ConfigDict,
    chosen: Mapping[str, float] | None = None,
    seeds: Iterable[int] | None = None,
) -> Iterator[Trial]:
    """The runs of a settled study, seed by seed, so that a part of it is a study too.

    chosen: the value that the sweep of an arm chose; an arm without one keeps its own. seeds:
    replace the first ones, config.seeds.
    """
    for seed in config.seeds if seeds is None else seeds:
        for arm in config.arms:
            own = _config(config, arm)
            own.seed = seed
            if chosen and arm in chosen:
                set_field(own, config.arms[arm][SWEEP]["field"], chosen[arm])
            yield Trial(arm, seed, own)


def sweep_trials(config: ConfigDict, arm: str) -> Iterator[Trial]:
    """The runs of an arm's sweep: trained on a seed of their own, and neither attacked nor audited.

    config.sweep.base can change this and anything else. The seed is not one of the study's, so that
    a value is not chosen on the runs that it is then judged by.
    """
    sweep = config.arms[arm][SWEEP]
    for value in sweep["values"]:
        own = _config(config, arm)
        own.seed = config.sweep.seed
        own.attacks, own.measurements = ConfigDict(), ConfigDict()
        own.audit.num_examples = 0
        own = changed(own, config.sweep.base)
        set_field(own, sweep["field"], value)
        yield Trial(arm, own.seed, own, value)


def swept(config: ConfigDict, workdir: Path) -> dict[str, Sweep]:
    """What the sweeps of a study in workdir found so far, by arm; those without `nearest` first."""
    found: dict[str, Sweep] = {}
    for arm in with_sweep(config):
        sweep = config.arms[arm][SWEEP]
        by, nearest = sweep.get("by", config.sweep.by), sweep.get("nearest")
        folders = [workdir / trial.name for trial in sweep_trials(config, arm)]
        numbers = [_measured(folder, by) for folder in folders]
        target = None
        if (other := found.get(nearest)) is not None and other.chosen is not None:
            trial = list(sweep_trials(config, nearest))[other.values.index(other.chosen)]
            target = _measured(workdir / trial.name, by)
        values = tuple(sweep["values"])
        distance = {
            value: -number if target is None else abs(number - target)
            for value, number in zip(values, numbers, strict=True)
            if number is not None
        }
        finished = all(stored.is_finished(folder) for folder in folders)
        chosen = None
        if distance and finished and (not nearest or target is not None):
            chosen = min(distance, key=distance.__getitem__)  # the first of equals
        found[arm] = Sweep(sweep["field"], values, by, numbers, nearest, target, chosen)
    return found


def with_sweep(config: ConfigDict) -> list[str]:
    """The arms that have a sweep, in the order in which values can be chosen."""
    arms = [arm for arm in config.arms if SWEEP in config.arms[arm]]
    return sorted(arms, key=lambda arm: "nearest" in config.arms[arm][SWEEP])


def check_sweeps(config: ConfigDict, check_run: Callable[[ConfigDict], None]) -> None:
    """Checks the sweeps of a settled study and each of their runs. Raises UserError."""
    arms = with_sweep(config)
    if arms and config.sweep.seed in (*config.seeds, *extra_seeds(config)):
        raise UserError(
            f"config.sweep.seed is {config.sweep.seed}, a seed of the study; take one that is not"
        )
    for arm in arms:
        sweep, path = config.arms[arm][SWEEP], f"config.arms.{arm}.sweep"
        for key in sweep:
            choose(_SWEEP_KEYS, key, f"{path}'s key")
        for key in ("field", "values"):
            if key not in sweep:
                raise UserError(f'{path}.{key} is missing; it has a "field" and its "values"')
        old = get_field(_config(config, arm), sweep["field"])
        if old is None:
            raise UserError(
                f"{path}.field is {sweep['field']!r}, which the arm does not have; give it a value "
                "in the arm as well"
            )
        values = (*sweep["values"], old) if isinstance(sweep["values"], tuple) else (None,)
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise UserError(
                f"{path} sweeps {sweep['field']} = {old!r} over {sweep['values']!r}; "
                "a sweep takes a numeric field and a tuple of numbers"
            )
        if not sweep["values"] or len(set(sweep["values"])) < len(sweep["values"]):
            raise UserError(f"{path}.values is {sweep['values']!r}; give different numbers")
        if nearest := sweep.get("nearest"):
            others = [a for a in arms if "nearest" not in config.arms[a][SWEEP]]
            choose(others, nearest, f"{path}.nearest")
        by = sweep.get("by", config.sweep.by)
        for trial in [t for a in filter(None, (arm, nearest)) for t in sweep_trials(config, a)]:
            check_run(trial.config)
            measures.check(by, measures.known(trial.config), f"{path}.by")


def _config(config: ConfigDict, arm: str) -> ConfigDict:
    """The config of an arm before it is given a seed or a value of its sweep."""
    changes = {field: v for field, v in config.arms[arm].items() if field != SWEEP}
    return changed(config.base, changes)


def _measured(workdir: Path, measure: str) -> float | None:
    if not stored.is_finished(workdir):
        return None
    return measures.value(stored.results(workdir), measure)
