"""A study: arms × seeds of ordinary runs, what the paper claims of them, and the verdicts.

Its config (configs/studies/) holds a base config, scales and arms as changes of it, the measures of
the table, and the claims as tests on them. Nothing here is typed in: a verdict follows from the
intervals over seeds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from robust_jax.app import (
    claims,
    entries,
    folder,
    measures,
    run,
    runs,
    stored,
    study_report,
)
from robust_jax.app import config as config_lib
from robust_jax.app.config import choose
from robust_jax.app.folder import Mode
from robust_jax.devices import processes
from robust_jax.errors import UserError
from robust_jax.files import write_json

_FIELDS = (
    "title",
    "paper",
    "question",
    "scale",
    "seeds",
    "base",
    "scales",
    "arms",
    "measures",
    "pairs",
    "along_training",
    "claims",
    "published",
    "notes",
)


class Trial(NamedTuple):
    """One run of a study, in the folder of its name."""

    arm: str
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.seed}"


def is_study(config: ConfigDict) -> bool:
    """Whether a config is that of a study."""
    return "arms" in config


def settled(config: ConfigDict, typed: Iterable[str] = ()) -> ConfigDict:
    """The study at its scale: what the scale changes is in the base, the arms and the seeds.

    typed: the fields that the command line sets; they win over the scale's. Raises UserError for an
    unknown field or scale, and for a typed field that no run of the study heeds.
    """
    for field in config:
        choose(_FIELDS, field, "a study's field")
    for field in _FIELDS:
        if field not in config:
            raise UserError(f"config.{field} is missing: a study has {', '.join(_FIELDS)}")
    scale = config.scales[choose(config.scales, config.scale, "config.scale")]
    result = ConfigDict({field: config[field] for field in _FIELDS})
    typed = set(typed)
    result.base = changed(config.base, scale.get("base", {}))
    result.arms = ConfigDict(
        {
            arm: changed(ConfigDict(changes), scale.get("arms", {}).get(arm, {}))
            for arm, changes in config.arms.items()
        },
        sort_keys=False,
    )
    for field in {"seeds", "published"} - typed:
        result[field] = scale.get(field, config[field])
    result.scales = {config.scale: {"radii": scale.get("radii", {})}}
    for path in typed:
        section, _, rest = path.partition(".")
        if section in ("base", "arms") and rest:
            _set(result, path, _get(config, path))
        if section == "scales" and not rest.startswith(f"{config.scale}."):
            raise UserError(f"config.{path} changes nothing: the scale is {config.scale}")
    for path in typed:
        section, _, field = path.partition(".")
        if section == "base" and all(
            _get(trial.config, field) != _get(config, path) for trial in trials(result)
        ):
            raise UserError(
                f"config.{path} changes nothing: every run of the study has a {field} of its own; "
                f"set that of an arm (config.arms.ARM.{field}) or config.seeds"
            )
    return result


def check(config: ConfigDict, schema: ConfigDict) -> None:
    """Checks a settled study, and its runs against the config that holds every field.

    Raises UserError, naming the field, the value and the choices.
    """
    for trial in trials(config):
        entries.check(trial.config, schema)
    of_arm = {trial.arm: trial.config for trial in trials(config)}
    radii = _radii(config)
    labels = [label for label, _ in config.measures]
    for label, measure in config.measures:
        path = f"config.measures, {label!r},"
        measures.label_with_radii(label, radii, path)
        for arm_config in of_arm.values():
            measures.check(measures.with_radii(measure, radii, path), arm_config, path)
    for pair in config.pairs:
        for label in pair:
            choose(labels, label, "config.pairs' measure")
    for name in config.along_training:
        for arm_config in of_arm.values():
            measures.check(f"training.last.{name}", arm_config, "config.along_training")
    for name, claim in config.claims.items():
        for test in claim.tests:
            path = f"config.claims.{name}"
            choose(claims.RELATIONS, test["relation"], f"{path}'s relation")
            measure = measures.with_radii(test["measure"], radii, f"{path}'s measure")
            for arm in test["arms"]:
                choose(config.arms, arm, f"{path}'s arm")
                measures.check(measure, of_arm[arm], f"{path}'s measure")


def execute(config: ConfigDict, workdir: Path, mode: Mode = "train", *, only: str = "") -> str:
    """Trains and evaluates what is missing, then writes the study's results and report.

    config: settled and checked. only: "arm" or "arm/seed" runs that part alone and writes no
    report, so that a scheduler can spread a study over machines. Each run is an ordinary one in
    workdir/arm/seed, in the mode given; mode "report" collects what there is and runs nothing.
    Returns what it came to, in lines. Raises UserError for an unknown arm, mode "verify", or a
    folder that holds something else, before anything runs.
    """
    if mode == "verify":
        raise UserError(f"--mode={mode} is for one run: give it a run's config and folder")
    workdir = workdir.absolute()
    chosen = list(trials(config))
    if only:
        arm, _, seed = only.partition("/")
        choose(config.arms, arm, "--only's arm")
        if seed:
            choose(sorted({str(t.seed) for t in chosen}), seed, "--only's seed")
        chosen = [t for t in chosen if t.arm == arm and seed in ("", str(t.seed))]
    if len(config.seeds) < claims.FEWEST_SEEDS:
        logging.warning("%d seeds: no verdicts, an interval needs three", len(config.seeds))
    processes.on_first(partial(folder.claim_study, workdir, config, mode))
    if mode == "train" and jax.default_backend() != "cpu":
        train_seeds_together(chosen, workdir)
    if mode != "report":
        for i, trial in enumerate(chosen):
            logging.info(
                "%s: %s, seed %d (%d of %d)",
                config.title,
                trial.arm,
                trial.seed,
                i + 1,
                len(chosen),
            )
            run.execute(trial.config, workdir / trial.name, mode)
    processes.on_first(partial(write_json, workdir / stored.STUDY, config_lib.to_json(config)))
    if only:
        return f"{len(chosen)} runs of {config.title} are finished; --mode=report collects them"
    results = collect(config, chosen, workdir)
    processes.on_first(partial(_write, workdir, results))
    return study_report.text(results)


def _write(workdir: Path, results: dict[str, Any]) -> None:
    arrays = {
        arm: runs.measured(workdir / arm / min(by_seed, key=int))
        for arm, by_seed in results["audits"].items()
        if by_seed
    }
    study_report.write(workdir, results, {arm: found for arm, found in arrays.items() if found})
    runs.write_results(workdir, results)
    logging.info("report: %s", workdir / "report.html")


def trials(config: ConfigDict) -> Iterator[Trial]:
    """The runs of a settled study, seed by seed, so that a part of it is a study too."""
    for seed in config.seeds:
        for arm, changes in config.arms.items():
            own = changed(config.base, changes)
            own.seed = seed
            yield Trial(arm, seed, own)


def train_seeds_together(chosen: Sequence[Trial], workdir: Path) -> None:
    """Trains the seeds of each arm that have no results yet under one vmap, arm by arm."""
    for arm in dict.fromkeys(trial.arm for trial in chosen):
        left = [
            (trial.config, workdir / trial.name)
            for trial in chosen
            if trial.arm == arm and not (workdir / trial.name / "results.json").exists()
        ]
        if len(left) > 1:
            configs, workdirs = zip(*left, strict=True)
            logging.info("training %d seeds of %s together", len(left), arm)
            run.train_together(configs, workdirs)


def _radii(config: ConfigDict) -> dict[str, float]:
    return config.scales[config.scale].radii.to_dict()


def _get(config: ConfigDict, path: str) -> Any:
    for field in path.split("."):
        config = config.get(field) if isinstance(config, ConfigDict) else None
    return config


def _set(config: ConfigDict, path: str, value: Any) -> None:
    *sections, field = path.split(".")
    for section in sections:
        if not isinstance(config.get(section), ConfigDict):
            config[section] = ConfigDict()
        config = config[section]
    with config.ignore_type():
        config[field] = value


def changed(base: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of base with the changes; an entry that brings a name, and attacks, are replaced."""
    result = ConfigDict(base.to_dict())
    for field, value in changes.items():
        entry = isinstance(value, Mapping | ConfigDict)
        merge = entry and isinstance(result.get(field), ConfigDict)
        if merge and "name" not in value and field != "attacks":
            result[field] = changed(result[field], value)
        else:
            result[field] = ConfigDict(value) if entry else value
    return result


def collect(config: ConfigDict, chosen: Sequence[Trial], workdir: Path) -> dict[str, Any]:
    """Tables and verdicts from the runs that are finished."""
    found: dict[str, dict[int, dict]] = {arm: {} for arm in config.arms}
    missing = []
    for trial in chosen:
        if (workdir / trial.name / "results.json").exists():
            found[trial.arm][trial.seed] = runs.results(workdir / trial.name)
        else:
            missing.append(trial.name)
    if missing:
        logging.warning(
            "%d of %d runs are not finished: %s", len(missing), len(chosen), ", ".join(missing[:5])
        )
    radii = _radii(config)

    def labelled(label):
        return measures.label_with_radii(label, radii, "config.measures")

    def measured(measure):
        return measures.with_radii(measure, radii, "config.measures")

    by_label = {labelled(label): measured(measure) for label, measure in config.measures}
    table = {
        arm: {
            label: _summary(
                {seed: measures.value(r, measure) for seed, r in by_seed.items()},
                measures.bounds(measure),
            )
            for label, measure in by_label.items()
        }
        for arm, by_seed in found.items()
    }
    curves = {arm: _curves(list(by_seed.values())) for arm, by_seed in found.items()}
    audits = {
        arm: {str(s): r["audit"]["verdict"] if r["audit"] else None for s, r in by_seed.items()}
        for arm, by_seed in found.items()
    }
    judged = {}
    for name, claim in config.claims.items():
        tests = [{**test, "measure": measured(test["measure"])} for test in claim.tests]
        judged[name] = claims.judge({"text": claim.text, "tests": tests}, found)
    return {
        "title": config.title,
        "paper": config.paper,
        "question": config.question,
        "notes": config.notes,
        "scale": config.scale,
        "seeds": sorted({t.seed for t in chosen}),
        "missing": missing,
        "measures": by_label,
        "table": table,
        "audits": audits,
        "curves": curves,
        "pairs": [[labelled(label) for label in pair] for pair in config.pairs],
        "along_training": {
            name: {
                arm: _history([workdir / arm / str(seed) for seed in by_seed], name)
                for arm, by_seed in found.items()
            }
            for name in config.along_training
        },
        "claims": judged,
        "published": {
            arm: {labelled(label): number for label, number in numbers.items()}
            for arm, numbers in config.published
        },
        "configs": {t.arm: config_lib.to_json(t.config) for t in chosen},
    }


def _summary(
    values: Mapping[int, float | None], bounds: tuple[float, float] = (-np.inf, np.inf)
) -> dict[str, Any]:
    known = {str(seed): v for seed, v in values.items() if v is not None}
    return {"values": known, **_interval(list(known.values()), bounds)}


def _interval(
    values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)
) -> dict[str, float | None]:
    """Mean, low and high; None where there is none."""
    interval = claims.mean_interval(values, bounds=bounds)
    return {k: float(v) if np.isfinite(v) else None for k, v in interval._asdict().items()}


def _curves(results: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The worst case of each norm against eps, by norm: mean and interval over seeds."""
    curves: dict[str, list[dict[str, Any]]] = {}
    if not results:
        return curves
    for entry in results[0]["attacks"]:
        if entry["attack"] == "worst_case":
            measure = f"{entry['name']}@{entry['eps']!r}"
            known = [v for v in (measures.value(r, measure) for r in results) if v is not None]
            point = {"eps": entry["eps"], **_interval(known, (0.0, 1.0))}
            curves.setdefault(entry["norm"], []).append(point)
    clean = _interval([r["clean"]["accuracy"] for r in results], (0.0, 1.0))
    return {
        norm: sorted([{"eps": 0.0, **clean}, *points], key=lambda point: point["eps"])
        for norm, points in curves.items()
    }


def _history(workdirs: Sequence[Path], name: str) -> list[dict[str, Any]]:
    """A number of the validations against the epoch: mean and interval over seeds."""
    by_epoch: dict[float, list[float]] = {}
    for workdir in workdirs:
        metrics = runs.load(workdir).metrics
        steps_per_epoch = (metrics["step"] / metrics["epoch"]).dropna().iloc[0]
        for _, line in metrics.dropna(subset=[f"validation/{name}"]).iterrows():
            epoch = round(line["step"] / steps_per_epoch, 3)
            by_epoch.setdefault(epoch, []).append(line[f"validation/{name}"])
    return [{"epoch": epoch, **_interval(values)} for epoch, values in sorted(by_epoch.items())]
