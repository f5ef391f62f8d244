"""A study: arms × seeds of ordinary runs, what the paper claims of them, and the verdicts.

Its config (configs/studies/) holds a base config, scales and arms as changes to it, the measures of
the table, and the claims as tests on them.
"""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from robust_jax.app import config as config_lib
from robust_jax.app import folder, merge, records, run, stored
from robust_jax.app.config import choose, get_field, set_field
from robust_jax.app.folder import Mode
from robust_jax.app.stored import Evidence
from robust_jax.app.studies import arms, claims, measures, report
from robust_jax.app.studies.arms import SWEEP, Trial, changed, trials
from robust_jax.app.studies.claims import Found
from robust_jax.app.studies.intervals import interval
from robust_jax.devices import processes, speed
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
    "claims",
    "notes",
)
# A study may leave these out: then arms are named by their keys, no seeds are added, sweeps use the
# defaults below, nothing is drawn along training and no number is published.
_OPTIONAL = ("labels", "seeds_limit", "sweep", "along_training", "published")
_OF_CLAIMS = ("text", "tests", *claims.SIZES)
_SWEEP_DEFAULTS = {"by": "training.best.robust_accuracy", "seed": 1000, "base": {}}
_AS_SCALED = ("seeds", "seeds_limit", "published")
_OF_SCALES = (*_AS_SCALED, "radii", "base", "arms", "sweep")


def is_study(config: ConfigDict) -> bool:
    """Whether a config is that of a study."""
    return "arms" in config


def settled(config: ConfigDict, typed: Iterable[str] = ()) -> ConfigDict:
    """The study at its scale, whose changes are put into the base, the arms and the seeds.

    typed: the fields that the command line sets; they win over the scale's. Raises UserError for an
    unknown field or scale, and for a typed field that no run of the study uses.
    """
    for field in config:
        choose((*_FIELDS, *_OPTIONAL), field, "a study's field")
    for field in _FIELDS:
        if field not in config:
            raise UserError(f"config.{field} is missing: a study has {', '.join(_FIELDS)}")
    scale = config.scales[choose(config.scales, config.scale, "config.scale")]
    for field in scale:
        choose(_OF_SCALES, field, f"config.scales.{config.scale}'s field")
    for arm in scale.get("arms", {}):
        choose(config.arms, arm, f"config.scales.{config.scale}.arms has a key that")
    result = ConfigDict({field: config[field] for field in _FIELDS})
    result.labels = config.get("labels", ConfigDict())
    result.seeds_limit = config.get("seeds_limit", 0)
    result.along_training = config.get("along_training", ())
    result.published = config.get("published", ())
    typed = set(typed)
    result.base = changed(config.base, scale.get("base", {}))
    result.arms = ConfigDict(
        {
            arm: changed(ConfigDict(changes), scale.get("arms", {}).get(arm, {}))
            for arm, changes in config.arms.items()
        },
        sort_keys=False,
    )
    result.sweep = changed(ConfigDict(_SWEEP_DEFAULTS), config.get("sweep", {}))
    result.sweep = changed(result.sweep, scale.get("sweep", {}))
    for field in result.sweep:
        choose(_SWEEP_DEFAULTS, field, "config.sweep's field")
    for field in set(_AS_SCALED) - typed:
        result[field] = scale.get(field, result[field])
    result.scales = {config.scale: {"radii": scale.get("radii", {})}}
    for path in typed:
        section, _, rest = path.partition(".")
        if section in ("base", "arms", "sweep") and rest:
            set_field(result, path, get_field(config, path))
        if section == "scales" and not rest.startswith(f"{config.scale}."):
            raise UserError(f"config.{path} changes nothing: the scale is {config.scale}")
    for path in typed:
        section, _, field = path.partition(".")
        if section == "base" and all(
            get_field(trial.config, field) != get_field(config, path) for trial in trials(result)
        ):
            raise UserError(
                f"config.{path} changes nothing: every run of the study has a {field} of its own; "
                f"set that of an arm (config.arms.ARM.{field}) or config.seeds"
            )
        if section == "arms":
            arm, _, own = field.partition(".")
            if own == "seed":
                raise UserError(f"config.{path} changes nothing: every arm has config.seeds")
            if own and own == result.arms.get(arm, {}).get(SWEEP, {}).get("field"):
                raise UserError(
                    f"config.{path} changes nothing: the sweep of {arm} sets it; type "
                    f"config.arms.{arm}.sweep.values"
                )
    return result


def check(config: ConfigDict, check_run: Callable[[ConfigDict], None]) -> None:
    """Checks a settled study; check_run checks the config of each of its runs.

    Raises UserError, naming the field, the value and the choices.
    """
    if not config.seeds or len({*config.seeds}) < len(config.seeds):
        raise UserError(f"config.seeds is {tuple(config.seeds)}; give one at least, and each once")
    if not all(type(seed) is int and seed >= 0 for seed in config.seeds):
        raise UserError(f"config.seeds is {tuple(config.seeds)}; give whole numbers from 0 on")
    arms.check_sweeps(config, check_run)
    # One seed will do, since the runs of an arm differ only in their seeds.
    of_arms = {t.arm: t.config for t in trials(config, seeds=config.seeds[:1])}
    for own in of_arms.values():
        check_run(own)
    known = {arm: measures.known(own) for arm, own in of_arms.items()}
    radii = _radii(config)
    labels = [label for label, _ in config.measures]
    for label, measure in config.measures:
        path = f"config.measures, {label!r},"
        measures.label_with_radii(label, radii, path)
        for of_arm in known.values():
            measures.check(measures.with_radii(measure, radii, path), of_arm, path)
    for pair in config.pairs:
        for label in pair:
            choose(labels, label, "config.pairs' measure")
    for arm, numbers in config.published:
        choose(config.arms, arm, "config.published's arm")
        for label in numbers:
            choose(labels, label, "config.published's measure")
    for name in config.along_training:
        for of_arm in known.values():
            measures.check(f"training.last.{name}", of_arm, "config.along_training")
    for name, claim in config.claims.items():
        path = f"config.claims.{name}"
        for key in claim:
            choose(_OF_CLAIMS, key, f"{path}'s key")
        for key in ("text", "tests"):
            if key not in claim:
                raise UserError(f"{path}.{key} is missing: a claim has a text and tests")
        if not claim.tests:
            raise UserError(f"{path}.tests is empty; a claim has one test at least")
        for field in ("measure", "relation", "arms"):
            if any(field not in test for test in claim.tests):
                raise UserError(
                    f"{path} has a test without {field!r}; it has a measure, a relation and arms"
                )
        for test in _tests(config, name):
            for key in test:
                choose(claims.KEYS, key, f"{path}'s test has a key that")
            choose(claims.RELATIONS, test["relation"], f"{path}'s relation")
            claims.check_form(test, path)
            for arm in test["arms"]:
                choose(config.arms, arm, f"{path}'s arm")
                measures.check(test["measure"], known[arm], f"{path}'s measure")
            for field in claims.SIZES:
                claims.check_size(test, field, f"{path}'s {field}")
    for arm in config.labels:
        choose(config.arms, arm, "config.labels' arm")
    if config.seeds_limit and config.seeds_limit < len(config.seeds):
        raise UserError(
            f"config.seeds_limit is {config.seeds_limit}, and there are {len(config.seeds)} seeds; "
            "0 means that no more are added"
        )


def _tests(config: ConfigDict, name: str) -> list[dict[str, Any]]:
    """The tests of a claim with their radii, and with what the claim sets for all of them."""
    claim, radii, path = config.claims[name], _radii(config), f"config.claims.{name}'s measure"
    of_all = {field: claim[field] for field in claims.SIZES if field in claim}
    return [
        {**of_all, **test, "measure": measures.with_radii(test["measure"], radii, path)}
        for test in claim.tests
    ]


def execute(config: ConfigDict, workdir: Path, mode: Mode = "train", *, only: str = "") -> str:
    """Trains and evaluates what is missing, then writes the study's results and report.

    Sweeps come first, then the seeds. Seeds are added, up to config.seeds_limit, while the interval
    of a test is wider than its config asks.

    config: settled and checked. only: "arm", "arm/sweep" or "arm/seed" runs that part alone and
    writes no report, so that a scheduler can spread a study over machines. Each run is an ordinary
    one in workdir/arm/seed, in the mode given; mode "report" collects what there is and runs
    nothing. Returns the outcome, in lines. Before anything runs, raises UserError for an unknown
    arm, a mode that studies or their sweeps do not have, or a folder that holds something else.
    """
    if mode == "verify":
        raise UserError(f"--mode={mode} is for one run: give it a run's config and folder")
    workdir = workdir.absolute()
    arm, _, part = only.partition("/")
    if only:
        choose(config.arms, arm, "--only's arm")
    if part:
        sweep = [SWEEP] if SWEEP in config.arms[arm] else []
        seeds = map(str, (*config.seeds, *arms.extra_seeds(config)))
        choose([*seeds, *sweep], part, "--only's seed")
    if only and mode == "report":
        raise UserError("--mode=report is about the whole study; leave --only out")
    if part == SWEEP and mode != "train":
        raise UserError(f"--mode={mode} is for the seeds of {arm}, as in --only={arm}/0")
    if len(config.seeds) < claims.FEWEST_SEEDS:
        logging.warning("%d seeds: no verdicts, an interval needs three", len(config.seeds))
    processes.on_first(partial(folder.claim_study, workdir, config, mode))
    if mode == "train" and part in ("", SWEEP):
        for swept in arms.with_sweep(config):
            if arm in ("", swept):
                _run(config, list(arms.sweep_trials(config, swept)), workdir, mode)
    if mode != "report" and part != SWEEP:
        chosen = _chosen(config, workdir)
        seeds_of_part = config.seeds if not part else (int(part),)
        first = [t for t in trials(config, chosen, seeds_of_part) if arm in ("", t.arm)]
        for trial in first:
            _check_chosen(config, trial.arm, chosen)
            if stored.is_finished(workdir / trial.name):
                folder.check_trained_as(workdir / trial.name, trial.config)
        if mode == "train" and jax.default_backend() != "cpu":
            train_seeds_together(first, workdir)
        if mode != "train" and not only:
            extra = trials(config, chosen, arms.extra_seeds(config))
            first += [trial for trial in extra if stored.is_finished(workdir / trial.name)]
        _run(config, first, workdir, mode)
        if mode == "train" and not only:
            _add_seeds(config, chosen, workdir)
    write = partial(write_json, workdir / stored.STUDY, config_lib.to_json(config))
    if only:
        processes.on_first(write)
        return f"{only} of {config.title} is finished; --mode=report collects it"
    results = collect(config, workdir)
    processes.on_first(write)
    processes.on_first(partial(_write, workdir, results))
    return report.text(results)


def _run(config: ConfigDict, chosen: Sequence[Trial], workdir: Path, mode: Mode) -> None:
    for i, trial in enumerate(chosen):
        logging.info("%s: %s (%d of %d)", config.title, trial.name, i + 1, len(chosen))
        run.execute(trial.config, workdir / trial.name, mode)
        _forget_a_run()


def _forget_a_run() -> None:
    """Drops a run's programs, which no other run uses, and its peak memory.

    A process has a limited number of memory maps, and programs use them up.
    """
    jax.clear_caches()
    gc.collect()
    speed.forget_memory_high_water()


def _chosen(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The values that finished sweeps chose, by arm."""
    found = arms.swept(config, workdir)
    return {arm: sweep.chosen for arm, sweep in found.items() if sweep.chosen is not None}


def _check_chosen(config: ConfigDict, arm: str, chosen: Mapping[str, float]) -> None:
    if (sweep := config.arms[arm].get(SWEEP)) and arm not in chosen:
        others = [arm] if "nearest" not in sweep else [sweep["nearest"], arm]
        needed = " and ".join(f"--only={other}/{SWEEP}" for other in others)
        raise UserError(f"the value of {arm} is not chosen yet: run {needed} first")


def _add_seeds(config: ConfigDict, chosen: Mapping[str, float], workdir: Path) -> None:
    """Runs one more seed of the arms whose tests have too wide an interval, until none has."""
    for seed in arms.extra_seeds(config):
        found, _ = _found(config, workdir)
        judged = [test for claim in _judged(config, found).values() for test in claim["tests"]]
        wide = {arm for test in judged if claims.needs_more_seeds(test) for arm in test["arms"]}
        more = [trial for trial in trials(config, chosen, (seed,)) if trial.arm in wide]
        if not more:
            return
        logging.info("seed %d of %s: intervals are too wide", seed, ", ".join(t.arm for t in more))
        _run(config, more, workdir, "train")


def _write(workdir: Path, results: dict[str, Any]) -> None:
    arrays = {
        arm: stored.measured(workdir / arm / min(by_seed, key=int))
        for arm, by_seed in results["audits"].items()
        if by_seed
    }
    report.write(workdir, results, {arm: found for arm, found in arrays.items() if found})
    stored.write_results(workdir, results)
    logging.info("report: %s", workdir / "report.html")


def train_seeds_together(chosen: Sequence[Trial], workdir: Path) -> None:
    """Trains the seeds of each arm that have no results yet under one vmap, arm by arm."""
    for arm in dict.fromkeys(trial.arm for trial in chosen):
        left = [
            (trial.config, workdir / trial.name)
            for trial in chosen
            if trial.arm == arm and not stored.is_finished(workdir / trial.name)
        ]
        if len(left) > 1:
            configs, workdirs = zip(*left, strict=True)
            logging.info("training %d seeds of %s together", len(left), arm)
            run.train_together(configs, workdirs)


def _radii(config: ConfigDict) -> dict[str, float]:
    return config.scales[config.scale].radii.to_dict()


def _found(config: ConfigDict, workdir: Path) -> tuple[Found, list[str]]:
    """The finished runs by arm and seed, and the names of the missing ones of config.seeds."""
    found: dict[str, dict[int, Evidence]] = {arm: {} for arm in config.arms}
    missing = []
    chosen = _chosen(config, workdir)
    for trial in trials(config, chosen, seeds=(*config.seeds, *arms.extra_seeds(config))):
        here = workdir / trial.name
        if stored.is_finished(here):
            old = folder.check_trained_as(here, trial.config)
            merge.check_alike(old, trial.config, here)
            found[trial.arm][trial.seed] = Evidence(
                stored.results(here),
                records.read(here / "records" / "best.csv"),
                {k: v for k, v in stored.measured(here).items() if "/of_images/" in k},
            )
        elif trial.seed in config.seeds:
            missing.append(trial.name)
    return found, missing


def _judged(config: ConfigDict, found: Found) -> dict[str, dict[str, Any]]:
    adds_seeds = bool(arms.extra_seeds(config))
    return {
        name: claims.judge(claim.text, _tests(config, name), found, adds_seeds=adds_seeds)
        for name, claim in config.claims.items()
    }


def collect(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Tables and verdicts from the finished runs, whichever seeds they have."""
    found, missing = _found(config, workdir)
    if missing:
        logging.warning(
            "%d of %d runs are not finished: %s",
            len(missing),
            len(config.arms) * len(config.seeds),
            ", ".join(missing[:5]),
        )
    radii = _radii(config)

    def labelled(label):
        return measures.label_with_radii(label, radii, "config.measures")

    def measured(measure):
        return measures.with_radii(measure, radii, "config.measures")

    by_label = {labelled(label): measured(measure) for label, measure in config.measures}
    table = {
        arm: {label: _summary(measure, by_seed) for label, measure in by_label.items()}
        for arm, by_seed in found.items()
    }
    curves = {arm: _curves(by_seed) for arm, by_seed in found.items()}
    audits = {
        arm: {
            str(s): r.results["audit"]["verdict"] if r.results["audit"] else None
            for s, r in by_seed.items()
        }
        for arm, by_seed in found.items()
    }
    judged = _judged(config, found)
    configs = {t.arm: t.config for t in trials(config, _chosen(config, workdir), config.seeds[:1])}
    return {
        "title": config.title,
        "paper": config.paper,
        "question": config.question,
        "notes": config.notes,
        "scale": config.scale,
        "seeds": sorted({*config.seeds, *(s for by_seed in found.values() for s in by_seed)}),
        "seeds_limit": config.seeds_limit or len(config.seeds),
        "missing": missing,
        "arms": {arm: config.labels.get(arm, arm.replace("_", " ")) for arm in config.arms},
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
        "sweeps": {arm: sweep._asdict() for arm, sweep in arms.swept(config, workdir).items()},
        "published": {
            arm: {labelled(label): number for label, number in numbers.items()}
            for arm, numbers in config.published
        },
        "configs": {arm: config_lib.to_json(own) for arm, own in configs.items()},
        "versions": _versions(found),
    }


def _versions(found: Found) -> dict[str, list[str]]:
    """The versions that made the runs, by package."""
    runs = (run for by_seed in found.values() for run in by_seed.values())
    known = pd.DataFrame([run.results["versions"] for run in runs])
    return {name: sorted(known[name].dropna().unique()) for name in known}


def _summary(measure: str, by_seed: Mapping[int, Evidence]) -> dict[str, Any]:
    """The measure of an arm: by seed, and its mean and interval over seeds and images."""
    values = {str(seed): measures.value(r.results, measure) for seed, r in by_seed.items()}
    known = {seed: v for seed, v in values.items() if v is not None}
    by_image = claims.by_image(measure, [[run] for run in by_seed.values()])
    if by_image is not None:  # a difference is over the images that both have
        known = dict(zip(known, by_image[:, 0].mean(-1).tolist(), strict=True))
    outcomes = list(known.values()) if by_image is None else by_image[:, 0]
    images = None if by_image is None else by_image.shape[2]
    found = _interval(outcomes, measures.bounds(measure), shares=measures.is_share(measure))
    return {"values": known, **found, "images": images}


def _interval(
    outcomes: Sequence[float] | np.ndarray,
    bounds: tuple[float, float],
    *,
    shares: bool = True,
) -> dict[str, float | None]:
    """Mean, low and high; None where there is none."""
    known = interval(outcomes, bounds=bounds, shares=shares)._asdict()
    return {k: known[k] if np.isfinite(known[k]) else None for k in ("mean", "low", "high")}


def _curves(by_seed: Mapping[int, Evidence]) -> dict[str, list[dict[str, Any]]]:
    """The worst case of each norm against eps, by norm: mean and interval."""
    curves: dict[str, list[dict[str, Any]]] = {}
    if not by_seed:
        return curves
    for entry in next(iter(by_seed.values())).results["attacks"]:
        if entry["attack"] == "worst_case":
            found = _summary(f"{entry['name']}@{entry['eps']!r}", by_seed)
            curves.setdefault(entry["norm"], []).append({**found, "eps": entry["eps"]})
    clean = {**_summary("clean.accuracy", by_seed), "eps": 0.0}
    return {
        norm: sorted(
            ({k: p[k] for k in ("eps", "mean", "low", "high")} for p in (clean, *points)),
            key=lambda point: point["eps"],
        )
        for norm, points in curves.items()
    }


def _history(workdirs: Sequence[Path], name: str) -> list[dict[str, Any]]:
    """A number of the validations against the epoch: mean and interval over seeds."""
    by_epoch: dict[float, list[float]] = {}
    for workdir in workdirs:
        metrics, column = stored.metrics(workdir), f"validation/{name}"
        if column not in metrics:  # the folder may have been copied without metrics.jsonl
            continue
        steps_per_epoch = (metrics["step"] / metrics["epoch"]).dropna().iloc[0]
        for _, line in metrics[metrics[column].notna()].iterrows():
            epoch = round(line["step"] / steps_per_epoch, 3)
            by_epoch.setdefault(epoch, []).append(line[column])
    bounds = measures.bounds(f"training.last.{name}")
    return [
        {"epoch": epoch, **_interval(values, bounds)} for epoch, values in sorted(by_epoch.items())
    ]
