"""Finished runs side by side: numbers, figures, audits and differences of their configs.

`python launch.py --mode=compare --workdir=OUT RUN RUN …` writes them as a page; a notebook can use
the parts.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from robust_jax import plots
from robust_jax.analysis.summaries import wilson_interval
from robust_jax.app import stored, threat
from robust_jax.app.config import flatten, to_json
from robust_jax.app.pages import figures as figures_lib
from robust_jax.app.pages import report
from robust_jax.app.pages.html import image, template
from robust_jax.app.stored import Evidence
from robust_jax.app.wording import format_eps, number, percent
from robust_jax.errors import UserError
from robust_jax.files import write_atomically, write_json
from robust_jax.plots import networks
from robust_jax.plots.study import accuracy_by_arm

_FILE = "comparison.json"


def load(folders: Sequence[Path | str]) -> dict[str, Evidence]:
    """Loads the runs, named by the shortest ends of their paths that tell them apart.

    A number alone is no name. Raises UserError if a folder holds no finished run, or if there are
    fewer than two.
    """
    paths = [Path(folder).absolute() for folder in folders]
    if len(set(paths)) < 2:
        raise UserError(
            f"--mode=compare needs two runs or more, not {len(set(paths))}: name their folders, as "
            "in launch.py --mode=compare --workdir=OUT RUN RUN"
        )
    found = {}
    for name, path in _names(paths).items():
        if stored.holds(path) not in ("a run", "an evaluation"):
            raise stored.no_run(path)
        try:
            results, records = stored.results(path), stored.load(path).records["best"]
        except (OSError, KeyError) as error:
            raise UserError(f"{path} has no results yet; finish it with --mode=train") from error
        found[name] = Evidence(results, records, stored.measured(path))
    return found


def table(compared: Mapping[str, Evidence]) -> pd.DataFrame:
    """The numbers as strings: a row for each measure, a column for each run."""
    columns = {name: _numbers(run) for name, run in compared.items()}
    return _side_by_side(columns, "measure")


def audits(compared: Mapping[str, Evidence]) -> pd.DataFrame:
    """The verdict of each check, a column for each run."""
    columns = {
        name: {
            check["name"]: check["verdict"] for check in (run.results["audit"] or _NONE)["checks"]
        }
        for name, run in compared.items()
    }
    return _side_by_side(columns, "check")


def differences(compared: Mapping[str, Evidence]) -> pd.DataFrame:
    """The fields in which the configs differ, a column for each run.

    A radius that follows the threat model is compared as if it were written there.
    """
    given = [flatten(run.results["config"]) for run in compared.values()]
    fields = sorted({field for config in given for field in config})
    configs = {name: flatten(_completed(run.results["config"])) for name, run in compared.items()}

    differ = [
        f for f in fields if len({repr(config.get(f, "–")) for config in configs.values()}) > 1
    ]
    columns = {
        name: {f: str(config.get(f, "–")) for f in differ} for name, config in configs.items()
    }
    return _side_by_side(columns, "field")


def figures(compared: Mapping[str, Evidence]) -> dict[str, tuple[Figure, str]]:
    """The figures by name, each with what it shows."""
    found = {}
    if any(run.results["attacks"] for run in compared.values()):
        found["accuracy"] = (
            accuracy_by_arm({name: _curve(run.results) for name, run in compared.items()}),
            "Worst-case accuracy against ε, with 95 % Wilson intervals over the test images.",
        )
    columns = {**plots.JACOBIANS, "margin": "margin on clean images, logits"}
    for column, label in columns.items():
        tables = {name: run.records for name, run in compared.items() if run.records is not None}
        values = {name: table[column] for name, table in tables.items() if column in table}
        if len(values) == len(compared) and all(np.isfinite(v).any() for v in values.values()):
            found[column] = (
                networks.distributions(values, xlabel=label),
                f"{label[0].upper()}{label[1:]}, of each test image.",
            )
    return found | figures_lib.of_measurements({name: run.arrays for name, run in compared.items()})


def text(compared: Mapping[str, Evidence]) -> str:
    """The numbers, the audits' verdicts and the configs' differences as plain text."""
    parts = [_plain(table(compared)), _plain(differences(compared))]
    return "\n\n".join(part for part in parts if part)


def write(folders: Sequence[Path | str], workdir: Path) -> str:
    """Writes workdir/report.html of the runs in the folders; returns the table as plain text.

    Raises UserError if workdir holds something else, or a folder holds no finished run.
    """
    compared = load(folders)
    if workdir.is_file():
        raise UserError(f"{workdir} is a file; take another --workdir")
    if stored.holds(workdir) != "nothing" and not (workdir / _FILE).exists():
        raise UserError(f"{workdir} holds {stored.holds(workdir)}; take another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    page = template("compare.html.j2").render(
        names=list(compared),
        titles={name: report.title(run.results) for name, run in compared.items()},
        verdicts={name: report.audit_sentence(run.results) for name, run in compared.items()},
        tables=[
            ("Numbers", _CAPTION, table(compared)),
            ("Audits", "What each check says.", audits(compared)),
            ("Configs", "The fields that differ.", differences(compared)),
        ],
        figures=[image(figure, alt) for figure, alt in figures(compared).values()],
    )
    write_atomically(workdir / "report.html", page)
    write_json(workdir / _FILE, {"runs": [str(Path(folder).absolute()) for folder in folders]})
    return f"{text(compared)}\n\nreport: {workdir / 'report.html'}"


_CAPTION = "Accuracies in %, at the best checkpoint; measurements at the one that the config names."
_WIDEST = 44  # column of the plain text
_NONE: Mapping[str, Any] = {"checks": ()}


def _side_by_side(columns: Mapping[str, Mapping[str, str]], index: str) -> pd.DataFrame:
    """A column for each run, with a row for every label that any of them has."""
    rows = dict.fromkeys(label for column in columns.values() for label in column)
    return pd.DataFrame(
        {name: [column.get(label, "–") for label in rows] for name, column in columns.items()},
        index=pd.Index(rows, name=index),
    )


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    # A seed's folder is named by a number, which says nothing without the folder above it.
    numbered = {path: bool(re.fullmatch(r"[0-9.]+", path.name)) for path in paths}
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = {"/".join(path.parts[-depth - numbered[path] :]): path for path in paths}
        if len(names) == len(set(paths)):
            return names
    raise AssertionError("different paths have different names")


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with its radii and norms; unchanged if it is older or from `evaluate`."""
    if "threat" not in config:
        return config
    return to_json(threat.complete(stored.from_json(dict(config))))


def _numbers(run: Evidence) -> dict[str, str]:
    results = run.results
    found = {
        "clean accuracy, %": percent(results["clean"]["accuracy"]),
        "clean cross-entropy, nats": number(results["clean"]["cross_entropy"]),
    }
    for entry in results["attacks"]:
        if entry["attack"] in ("worst_case", "autoattack"):
            norm = plots.norm_symbol(entry["norm"])
            what = "worst case" if entry["attack"] == "worst_case" else entry["name"]
            label = f"{what}, {norm} {format_eps(entry['eps'])}, %"
            part = entry["count"] < results["clean"]["count"]
            found[label] = percent(entry["robust_accuracy"]) + (
                f" of {entry['count']:,}" if part else ""
            )
    for fn, norms in results["jacobian"].items():
        for norm in ("frobenius", "spectral"):
            label = f"{report.JACOBIAN_WORDS[norm]}, {report.OF_WHAT.get(fn, fn)}"
            found[label] = number(norms[norm]["mean"])
    for label, numbers in results.get("measurements", {}).items():
        found |= {f"{label}: {name.replace('_', ' ')}": number(v) for name, v in numbers.items()}
    found["audit"] = results["audit"]["verdict"] if results["audit"] else "not audited"
    return found


def _curve(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The points of the worst case by norm, from ε = 0, in the form of a study's curves."""
    clean = results["clean"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for entry in results["attacks"]:
        if entry["attack"] == "worst_case":
            start = [_point(0.0, clean["accuracy"], clean["count"])]
            curves.setdefault(entry["norm"], start).append(
                _point(entry["eps"], entry["robust_accuracy"], entry["count"])
            )
    return curves


def _point(eps: float, share: float, count: int) -> dict[str, float]:
    low, high = wilson_interval(share, count)
    return {"eps": eps, "mean": share, "low": low, "high": high}


def _plain(frame: pd.DataFrame) -> str:
    """The table in columns, with long cells wrapped over several lines."""
    if frame.empty:
        return ""
    rows = [["", *frame.columns], *([label, *row] for label, row in frame.T.items())]
    cells = [[textwrap.wrap(cell, _WIDEST) or [""] for cell in row] for row in rows]
    widths = [
        max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)
    ]
    lines = []
    for row in cells:
        for label, *values in zip_longest(*row, fillvalue=""):
            parts = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
            lines.append("  ".join([f"{label:<{widths[0]}}", *parts]).rstrip())
    return "\n".join(lines)
