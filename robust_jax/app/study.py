"""A study: arms × seeds of ordinary runs, what the paper claims of them, and the verdicts.

Its config (configs/studies/) holds a base config, scales and arms as changes of it, the measures of
the table, and the claims as tests on them. Nothing here is typed in: a verdict follows from the
intervals over seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from scipy.special import stdtrit

from robust_jax.app import config as config_lib
from robust_jax.app import entries, run, runs, study_report
from robust_jax.app.config import choose
from robust_jax.app.run import Mode
from robust_jax.devices import processes
from robust_jax.errors import UserError

Outcome = Literal["supported", "refuted", "inconclusive"]
_FIELDS = ("title", "paper", "question", "scale", "seeds", "base", "scales", "arms", "measures",
           "pairs", "along_training", "claims", "published", "notes")  # fmt: skip


class Interval(NamedTuple):
    """A mean over seeds with its 95 % confidence interval by Student's t; NaN ends for one seed."""

    mean: float
    low: float
    high: float


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


def check(config: ConfigDict, schema: ConfigDict) -> None:
    """Checks a study's config, and those of its runs against the one that holds every field.

    Raises UserError, naming the field, the value and the choices.
    """
    for field in config:
        choose(_FIELDS, field, "a study's field")
    for field in _FIELDS:
        if field not in config:
            raise UserError(f"config.{field} is missing: a study has {', '.join(_FIELDS)}")
    for trial in trials(config):
        entries.check(trial.config, schema)
    labels = [label for label, _ in config.measures]
    for pair in config.pairs:
        for label in pair:
            choose(labels, label, "config.pairs' measure")
    for name, claim in config.claims.items():
        for test in claim.tests:
            for arm in test["arms"]:
                choose(config.arms, arm, f"config.claims.{name}'s arm")
            relations = ("above", "below", "rises", "falls")
            choose(relations, test["relation"], f"config.claims.{name}'s relation")


def execute(
    config: ConfigDict, workdir: Path, mode: Mode = "train", *, only: str = ""
) -> dict[str, Any]:
    """Trains and evaluates what is missing, then writes the study's results and report.

    only: "arm" or "arm/seed" runs that part alone and writes no report, so that a scheduler can
    spread a study over machines. Each run is an ordinary one in workdir/arm/seed, in the mode
    given; mode "report" collects what there is and runs nothing. Returns what results.json holds.
    Raises UserError for a mistaken config, an unknown arm or mode "verify", before anything runs.
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
    if mode == "train" and jax.default_backend() != "cpu":
        train_seeds_together(chosen, workdir)
    if mode != "report":
        for i, trial in enumerate(chosen):
            logging.info("%s: %s, seed %d (%d of %d)", config.title, trial.arm, trial.seed,
                         i + 1, len(chosen))  # fmt: skip
            run.execute(trial.config, workdir / trial.name, mode)
    if only:
        return {}
    results = collect(config, chosen, workdir)
    processes.on_first(partial(_write, workdir, results))
    return results


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
    """The runs of a study at its scale, seed by seed, so that a part of it is a study too."""
    scale = _scale(config)
    base = changed(config.base, scale.get("base", {}))
    for seed in scale.get("seeds", config.seeds):
        for arm, changes in config.arms.items():
            own = changed(changed(base, changes), scale.get("arms", {}).get(arm, {}))
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


def _scale(config: ConfigDict) -> ConfigDict:
    return config.scales[choose(config.scales, config.scale, "config.scale")]


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
        folder = workdir / trial.name
        if (folder / "results.json").exists():
            found[trial.arm][trial.seed] = runs.results(folder)
        else:
            missing.append(trial.name)
    if missing:
        logging.warning("%d of %d runs are not finished: %s", len(missing), len(chosen),
                        ", ".join(missing[:5]))  # fmt: skip
    radii = _scale(config).get("radii", {})
    measures = {label.format(**radii): m.format(**radii) for label, m in config.measures}
    pairs = [[label.format(**radii) for label in pair] for pair in config.pairs]
    table = {
        arm: {
            label: _summary({seed: value(r, measure) for seed, r in by_seed.items()})
            for label, measure in measures.items()
        }
        for arm, by_seed in found.items()
    }
    curves = {arm: _curves(list(by_seed.values())) for arm, by_seed in found.items()}
    audits = {
        arm: {str(s): r["audit"]["verdict"] if r["audit"] else None for s, r in by_seed.items()}
        for arm, by_seed in found.items()
    }
    claims = {name: judge(c.to_dict(), found, radii) for name, c in config.claims.items()}
    return {
        "title": config.title,
        "paper": config.paper,
        "question": config.question,
        "notes": config.notes,
        "scale": config.scale,
        "seeds": sorted({t.seed for t in chosen}),
        "missing": missing,
        "measures": measures,
        "table": table,
        "audits": audits,
        "curves": curves,
        "pairs": pairs,
        "along_training": {
            name: {
                arm: _history([workdir / arm / str(seed) for seed in by_seed], name)
                for arm, by_seed in found.items()
            }
            for name in config.along_training
        },
        "claims": claims,
        "published": {
            arm: {label.format(**radii): number for label, number in numbers.items()}
            for arm, numbers in _scale(config).get("published", config.published)
        },
        "configs": {t.arm: config_lib.to_json(t.config) for t in chosen},
    }


def judge(
    claim: Mapping[str, Any],
    found: Mapping[str, Mapping[int, dict]],
    radii: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A claim with the outcome of each of its tests, and its verdict.

    It is supported where every test is, refuted where one is, and else inconclusive. radii stand
    for their names in braces, as in "pgd@{trained}".
    """
    tests = [{**t, "measure": t["measure"].format(**(radii or {}))} for t in claim["tests"]]
    tests = [{**test, **_test(test, found)} for test in tests]
    verdicts = {test["verdict"] for test in tests}
    verdict = next((v for v in ("refuted", "inconclusive") if v in verdicts), "supported")
    return {"text": claim["text"], "verdict": verdict, "tests": tests}


def _test(test: Mapping[str, Any], found: Mapping[str, Mapping[int, dict]]) -> dict[str, Any]:
    """The quantity that a test claims to be above zero: its mean and interval over seeds."""
    shared = set.intersection(*(set(found[arm]) for arm in test["arms"]))
    values = []
    for seed in sorted(shared):
        here = [_entries(found[arm][seed], test["measure"]) for arm in test["arms"]]
        known = [v for v in here if v is not None]
        if len(known) == len(here):
            values.append(_margin(test, np.array(known)))
    interval = mean_interval(values)
    return {"values": values, **interval._asdict(), "verdict": outcome_of(interval)}


def _entries(results: Mapping[str, Any], measure: str) -> list[float] | None:
    """The number of a run, or all of "a.path/*" in the order of their names, for most of them."""
    if not measure.endswith("/*"):
        one = value(results, measure)
        return None if one is None else [one]
    path, _, start = measure[:-1].rpartition(".")
    node = _node(results, path) or {}
    return [float(v) for name, v in sorted(node.items()) if name.startswith(start)] or None


def _margin(test: Mapping[str, Any], values: np.ndarray) -> float:
    """How far one seed is on the claimed side; values [arms, entries].

    "above"/"below" compare the first arm with the second, or with a level; "rises"/"falls" take the
    change from the first arm to the last of a line fitted over the arms, against `at` (or their
    numbers). Of several entries: the share on the claimed side, over one half.
    """
    relation = test["relation"]
    if relation in ("rises", "falls"):
        at = test.get("at", range(len(values)))
        found = np.polyfit(at, values, 1)[0] * (at[-1] - at[0])
    else:
        found = values[0] - (values[1] if len(values) > 1 else test["level"])
    if relation in ("falls", "below"):
        found = -found
    found = found - test.get("by", 0.0)
    return float(found[0] if len(found) == 1 else np.mean(found > 0) - 0.5)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean over seeds and its two-sided confidence interval (Student's t)."""
    array = np.asarray(values, float)
    if not array.size:
        return Interval(np.nan, np.nan, np.nan)
    if array.size == 1:
        return Interval(float(array[0]), np.nan, np.nan)
    half = stdtrit(array.size - 1, (1 + level) / 2) * array.std(ddof=1) / np.sqrt(array.size)
    return Interval(float(array.mean()), float(array.mean() - half), float(array.mean() + half))


def outcome_of(interval: Interval) -> Outcome:
    """supported where the whole interval is above zero, refuted where it is below."""
    if interval.low > 0:
        return "supported"
    return "refuted" if interval.high < 0 else "inconclusive"


def value(results: Mapping[str, Any], measure: str) -> float | None:
    """A number of a run: "attack@eps" for a robust accuracy, else a dotted path in results.json.

    "one - other" is the difference of two. None where the run has no such number.
    """
    if " - " in measure:
        one, other = (value(results, part) for part in measure.split(" - "))
        return None if one is None or other is None else one - other
    if "@" in measure:
        name, _, eps = measure.partition("@")
        for entry in results["attacks"]:
            if entry["name"] == name and np.isclose(entry["eps"], float(eps), rtol=1e-5):
                return entry["robust_accuracy"]
        return None
    node = _node(results, measure)
    return None if node is None else float(node)


def _node(results: Mapping[str, Any], path: str) -> Any:
    """What is at a dotted path, an entry of a list by its name; None where nothing is."""
    node: Any = results
    for part in path.split("."):
        if isinstance(node, list):
            node = {entry["name"]: entry for entry in node}
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _summary(values: Mapping[int, float | None]) -> dict[str, Any]:
    known = {str(seed): v for seed, v in values.items() if v is not None}
    interval = mean_interval(list(known.values()))
    return {"values": known, **{k: _number(v) for k, v in interval._asdict().items()}}


def _curves(results: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The worst case of each norm against eps, by norm: mean and interval over seeds."""
    curves: dict[str, list[dict[str, Any]]] = {}
    if not results:
        return curves
    for entry in results[0]["attacks"]:
        if entry["attack"] == "worst_case":
            measure = f"{entry['name']}@{entry['eps']!r}"
            known = [v for v in (value(r, measure) for r in results) if v is not None]
            interval = {k: _number(v) for k, v in mean_interval(known)._asdict().items()}
            curves.setdefault(entry["norm"], []).append({"eps": entry["eps"], **interval})
    for norm, points in curves.items():
        clean = mean_interval([r["clean"]["accuracy"] for r in results])._asdict()
        points.insert(0, {"eps": 0.0, **{k: _number(v) for k, v in clean.items()}})
        curves[norm] = sorted(points, key=lambda point: point["eps"])
    return curves


def _history(folders: Sequence[Path], name: str) -> list[dict[str, Any]]:
    """A number of the validations against the epoch: mean and interval over seeds."""
    by_epoch: dict[float, list[float]] = {}
    for folder in folders:
        metrics = runs.load(folder).metrics
        steps_per_epoch = (metrics["step"] / metrics["epoch"]).dropna().iloc[0]
        for _, line in metrics.dropna(subset=[f"validation/{name}"]).iterrows():
            epoch = round(line["step"] / steps_per_epoch, 3)
            by_epoch.setdefault(epoch, []).append(line[f"validation/{name}"])
    return [
        {"epoch": epoch, **{k: _number(v) for k, v in mean_interval(values)._asdict().items()}}
        for epoch, values in sorted(by_epoch.items())
    ]


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
