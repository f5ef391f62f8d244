"""A study's folder as report.html and as results.md with its figures, for a repository."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from robust_jax.app.pages import figures as figures_lib
from robust_jax.app.pages.figures import Arrays
from robust_jax.app.pages.html import image, template
from robust_jax.app.stored import Results
from robust_jax.app.studies import measures
from robust_jax.app.studies.intervals import Interval, least_half_width, seeds_needed
from robust_jax.app.wording import format_eps, number, percent, words
from robust_jax.files import write_atomically
from robust_jax.plots import study as plots

# Rows of panels, times arms, in a figure; more would make a file too large to keep.
_ROWS_BY_ARMS = 20


def write(workdir: Path, results: Results, arrays: Arrays) -> None:
    """Writes report.html, results.md and figures/*.svg into workdir.

    arrays: by arm, what the measurements of one seed left to draw.
    """

    def named(by_arm: Mapping[str, Any]) -> dict[str, Any]:
        return {results["arms"][arm]: of_arm for arm, of_arm in by_arm.items()}

    figures = {
        "accuracy": (
            plots.accuracy_by_arm(named(results["curves"])),
            "Worst-case accuracy against ε: the mean over seeds with its 95 % interval, for other "
            "seeds and images.",
        ),
    }
    of = results["measures"]
    labels = {label: _with_unit(label, measure) for label, measure in of.items()}
    table = {
        arm: {labels[label]: _in_percent(measure, row[label]) for label, measure in of.items()}
        for arm, row in named(results["table"]).items()
    }
    panels = 3 * min(4, max(1, _ROWS_BY_ARMS // len(table)))
    for name, part in _in_parts("measures", list(labels.values()), panels):
        figures[name] = (
            plots.measures_by_arm({arm: {m: row[m] for m in part} for arm, row in table.items()}),
            "Measures of the table: the mean over seeds with its 95 % interval.",
        )
    if results["pairs"]:
        figures["pairs"] = (
            plots.measures_against_each_other(
                table, [[labels[label] for label in pair] for pair in results["pairs"]]
            ),
            "Measures against each other, a point for each arm and seed.",
        )
    if results["sweeps"]:
        words_of = _labels(results)
        figures["sweeps"] = (
            plots.sweeps(
                named(results["sweeps"]),
                {
                    s["by"]: _with_unit(_in_words(s["by"], words_of), s["by"])
                    for s in results["sweeps"].values()
                },
            ),
            "Sweeps: what each value came to, on a seed that the study does not use again. A ring "
            "marks the value that was chosen; where there is a dashed line, the nearest to it."
            + _at_an_edge(named(results["sweeps"])),
        )
    history = {k: named(v) for k, v in results["along_training"].items()}
    panels = 2 * min(4, max(1, _ROWS_BY_ARMS // len(table)))
    for name, part in _in_parts("training", list(history), panels):
        figures[name] = (
            plots.along_training({number: history[number] for number in part}),
            "Along training: the mean over seeds with its 95 % interval.",
        )
    at_start = _at_start(results)
    for name, (figure, alt) in _of_measurements(named(arrays), at_start).items():
        figures[name] = figure, f"{alt} One seed of each arm."
    (workdir / "figures").mkdir(parents=True, exist_ok=True)
    images = []
    for name, (figure, alt) in figures.items():
        images.append(image(figure, alt))
        with matplotlib.rc_context({"svg.hashsalt": "robust_jax"}):
            path = workdir / "figures" / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None}, dpi=64)  # of raster parts within it
    claims, arms, rows = _claims(results), _arms(results), _rows(results)
    chance = _chance(results)
    page = template("study.html.j2").render(
        title=results["title"],
        question=results["question"],
        paper=results["paper"],
        scale=results["scale"],
        seeds=results["seeds"],
        missing=results["missing"],
        claims=claims,
        verdicts=_VERDICTS,
        chance=chance,
        caption=_CAPTION,
        arms=arms,
        rows=rows,
        figures=images,
        notes=results["notes"],
        made_by=_made_by(results),
    )
    write_atomically(workdir / "report.html", page)
    captions = {name: alt for name, (_, alt) in figures.items()}
    write_atomically(
        workdir / "results.md", _markdown(results, claims, arms, rows, captions, chance)
    )


def _in_parts(name: str, shown: Sequence[str], panels: int) -> Iterator[tuple[str, Sequence[str]]]:
    """Splits what is shown into figures of at most that many panels, with their names."""
    for i, start in enumerate(range(0, len(shown), panels)):
        yield (f"{name}_{i + 1}" if i else name), shown[start : start + panels]


def _at_an_edge(sweeps: Mapping[str, Any]) -> str:
    """A sentence on sweeps that chose their least or largest value: a better one may lie beyond."""
    chosen = [
        f"{arm} ({sweep['chosen']:g})"
        for arm, sweep in sweeps.items()
        if len(sweep["values"]) > 1
        and sweep["chosen"] in (min(sweep["values"]), max(sweep["values"]))
    ]
    return f" At an edge, so a better value may lie beyond: {', '.join(chosen)}." if chosen else ""


def _in_percent(measure: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry in the unit of the table."""
    if not measures.unit(measure):
        return dict(entry)
    ends = {end: entry[end] and 100 * entry[end] for end in ("mean", "low", "high")}
    return {"values": {s: 100 * v for s, v in entry["values"].items()}, **ends}


def _with_unit(label: str, measure: str) -> str:
    unit = measures.unit(measure)
    return f"{label},{unit}" if unit else label


def _at_start(results: Results) -> dict[str, str]:
    """The measurements that were also taken at initialisation, with their labels there."""
    config = next(iter(results["configs"].values()))
    entries = {
        label: {"name": label, "at": "best", **entry}
        for label, entry in config["measurements"].items()
    }
    return {
        label: start
        for start, initial in entries.items()
        for label, entry in entries.items()
        if initial["at"] == "initialisation" and entry == {**initial, "at": "best"}
    }


def _of_measurements(arrays: Arrays, at_start: Mapping[str, str]) -> dict[str, tuple[Figure, str]]:
    """Figures of the measurements, with those at initialisation as one more arm.

    All arms must start from the same network; otherwise initialisation keeps its own figure.
    """

    def left_by(measurement: str, found: Mapping[str, np.ndarray], label: str):
        """The arrays of a measurement, under the label."""
        return {
            label + name.removeprefix(measurement): array
            for name, array in found.items()
            if name.partition("/")[0] == measurement
        }

    shared = {
        label: start
        for label, start in at_start.items()
        if arrays and _alike([left_by(start, found, label) for found in arrays.values()])
    }
    others = {
        arm: {n: v for n, v in found.items() if n.partition("/")[0] not in shared.values()}
        for arm, found in arrays.items()
    }
    figures = figures_lib.of_measurements(others)
    for label, start in shared.items():
        beside = {arm: left_by(label, found, label) for arm, found in arrays.items()}
        beside["initialisation"] = left_by(start, next(iter(arrays.values())), label)
        figures |= figures_lib.of_measurements(beside)
    return figures


def _alike(found: Sequence[Mapping[str, np.ndarray]]) -> bool:
    first = found[0]
    return all(
        other.keys() == first.keys() and all(np.array_equal(first[n], other[n]) for n in first)
        for other in found
    )


def text(results: Results) -> str:
    """The verdicts and the table as plain text of at most 80 columns."""
    lines = []
    for claim in results["claims"].values():
        lines += textwrap.wrap(f"{claim['verdict']}: {claim['text']}", 80, subsequent_indent="  ")
    lines += ["", *textwrap.wrap(_chance(results), 80), ""] if lines else []
    arms, rows = _arms(results), _rows(results)
    per_line = (80 - 30) // 12
    for start in range(0, len(arms), per_line):
        part = slice(start, start + per_line)
        lines += [" " * 30 + heading for heading in _headings(arms[part])]
        for row in rows:
            cells = "".join(f"{cell['mean']:>12}" for cell in row["cells"][part])
            *above, last = textwrap.wrap(row["label"], 29, subsequent_indent="  ") or [""]
            lines += [*above, f"{last:<30}{cells}".rstrip()]
        lines.append("")
    return "\n".join(lines).rstrip()


def _headings(arms: Sequence[str]) -> list[str]:
    """The arms' names over columns of 12, in as many lines as the longest takes."""
    wrapped = [textwrap.wrap(arm, 11) for arm in arms]
    height = max(map(len, wrapped))
    padded = [[""] * (height - len(lines)) + lines for lines in wrapped]
    return ["".join(f"{part:>12}" for part in line) for line in zip(*padded, strict=True)]


_VERDICTS = (
    "A difference counts towards the claim: above zero is what it says. Supported: the whole 95 % "
    "interval is above zero. Refuted: it is below the smallest effect that is worth claiming. "
    "Supported, but small: both, so there is an effect, and it is smaller than that. Intervals are "
    "for seeds that were not run and, where they come from images, for images not seen. A claim is "
    "supported where all of its tests are and refuted where one is. An interval as narrow as the "
    "smallest effect gives a verdict: beside an inconclusive test stands what that takes, if "
    "further seeds scatter like these."
)
_CAPTION = (
    "The mean over seeds, with its 95 % interval, which needs three seeds to mean anything; where "
    "a row names images, it is also for images that were not seen. An arm whose audit fails in any "
    "seed is marked †: its robust accuracies are not to be trusted; one that it warns of in any is "
    "marked ⚠. ‡: not audited, or not in every seed."
)


def _chance(results: Results) -> str:
    """How many tests there are, and what that means."""
    tolerances = [
        test.get("by", 0.0) < 0
        for claim in results["claims"].values()
        for test in claim["tests"]
        for _ in test.get("entries", [test])
    ]
    count, tolerant = len(tolerances), sum(tolerances)
    of_them = f", {tolerant} of them with a tolerance" if tolerant else ""
    return (
        f"Number of tests: {count}{of_them}. If none of the effects were real, "
        f"{0.025 * (count - tolerant):.1f} of {'the others' if tolerant else 'them'} "
        "would be supported by chance, each with a probability of 2.5 %; nothing corrects for that."
    )


def _labels(results: Results) -> dict[str, str]:
    return {measure: label for label, measure in results["measures"].items()}


def _claims(results: Results) -> list[dict[str, Any]]:
    labels = _labels(results)
    return [
        {
            "verdict": claim["verdict"],
            "text": claim["text"],
            "lines": [
                {
                    "what": _describe(test, labels, results["arms"]),
                    "found": _found(test),
                    "smallest": _smallest(test),
                    "number": _counted([len(test["values"])], [test["images"]]),
                    "verdict": test["verdict"] + _takes(test),
                }
                for test in claim["tests"]
            ],
        }
        for claim in results["claims"].values()
    ]


def _describe(test: Mapping[str, Any], labels: Mapping[str, str], names: Mapping[str, str]) -> str:
    """The test as a sentence."""
    arms, by = [names[arm] for arm in test["arms"]], test.get("by", 0.0)
    measure, unit = test["measure"], measures.unit(test["measure"])
    what, relation = _in_words(measure, labels), test["relation"]
    if measure.endswith("*"):
        what, relation = f"most of {what}", relation.removesuffix("s")
    is_trend, opposite = test["relation"] in ("rises", "falls"), _OPPOSITES[test["relation"]]
    margin = f" by more than {_size(by, test)}" if by > 0 else ""
    if by < 0:
        size = f"at most {_size(-by, test)}"
        margin = f" or {opposite} by {size}" if is_trend else f" or {size} {opposite} it"
    if is_trend:
        return f"{what} {relation} from {arms[0]} to {arms[-1]}{margin}"
    other = arms[1] if len(arms) > 1 else _number(test["level"], unit) + unit
    return f"{what}: {arms[0]} {relation} {other}{margin}"


_OPPOSITES = {"rises": "falls", "falls": "rises", "above": "below", "below": "above"}


def _in_words(measure: str, labels: Mapping[str, str]) -> str:
    """The label of a measure in the table, or its name in words."""
    if measure in labels:
        return labels[measure]
    if " - " in measure:
        one, other = (_in_words(part, labels) for part in measure.split(" - "))
        return f"{one} minus {other}"
    if "@" in measure:
        name, _, eps = measure.partition("@")
        return f"{words(name)} at {format_eps(float(eps))}"
    if measure.startswith("training."):
        _, when, name = measure.split(".")
        return f"{words(name)} at the {when} validation"
    parts = measure.removeprefix("measurements.").removesuffix("/*").split(".")
    return ", ".join(part.replace("_", " ") for part in parts)


_OF_ENTRIES = {
    "so": ("supported",),
    "so, but small": ("supported, but small",),
    "not so": ("refuted",),
    "open": ("inconclusive", "no verdict"),
}


def _found(test: Mapping[str, Any]) -> str:
    """The mean and the interval; of several entries, those that support the claim come first."""
    if not test["values"]:
        return "not measured"
    percent = measures.is_share(test["measure"])
    if entries := test.get("entries"):
        return "; ".join(
            f"{judged}: {', '.join(found)}"
            for judged, verdicts in _OF_ENTRIES.items()
            if (
                found := [
                    f"{name} {_with_interval(entry, percent)}"
                    for name, entry in entries.items()
                    if entry["verdict"] in verdicts
                ]
            )
        )
    return _with_interval(test, percent)


def _with_interval(known: Mapping[str, Any], percent: bool) -> str:
    """The mean and the interval of a difference."""

    def signed(x):
        return f"{100 * x:+.1f}" if percent else f"{x:+.3g}"

    unit = " points" if percent else ""
    if known["mean"] is None:
        return "not measured"
    if known["low"] is None:
        return f"{signed(known['mean'])}{unit} (one seed)"
    return f"{signed(known['mean'])}{unit} [{signed(known['low'])}, {signed(known['high'])}]"


def _smallest(test: Mapping[str, Any]) -> str:
    """The smallest effect that is worth claiming."""
    if "entries" in test:
        return f"{test.get('smallest_effect', 'any')} in most"
    size = test["smallest_effect"]
    return _size(size, test) if size else "any"


def _size(size: float, test: Mapping[str, Any]) -> str:
    """A difference of the measure."""
    if not measures.is_share(test["measure"]):
        return f"{size:.3g}"
    return f"{100 * size:.3g} point{'' if size == 0.01 else 's'}"


def _takes(test: Mapping[str, Any]) -> str:
    """What an inconclusive test needs for an interval as narrow as its smallest effect.

    Empty if that decides nothing: without such an effect, or if all numbers are the same.
    """
    if "entries" in test or test["verdict"] != "inconclusive":
        return ""
    width, from_images = test["smallest_effect"], test["from_images"] or 0.0
    if not width or test["high"] - test["low"] <= width:
        return ""
    if (excess := 2 * from_images / width) > 1:
        # A share's least width falls with the number of images, other widths with its square root.
        images = test["images"]
        is_least = from_images <= least_half_width(images) * (1 + 1e-6)
        needed = float(f"{images * excess ** (1 if is_least else 2):.2g}")
        return f" (takes {needed:,.0f} images or more)"
    known = Interval(test["mean"], test["low"], test["high"], from_images)
    count = seeds_needed(width, known, len(test["values"]))
    return f" (takes {'over 1,000' if count is None else f'about {count}'} seeds)"


def _counted(num_seeds: Iterable[int], num_images: Iterable[int | None]) -> str:
    """How many seeds and images intervals rest on."""
    known = [(n, images) for n, images in zip(num_seeds, num_images, strict=True) if n]
    if not known:
        return ""
    seeds = " or ".join(map(str, sorted({n for n, _ in known})))
    found = f"{seeds} seed{'' if seeds == '1' else 's'}"
    if images := sorted({count for _, count in known if count}):
        found += f" × {' or '.join(f'{count:,}' for count in images)} images"
        found += ", or seeds alone" if any(not count for _, count in known) else ""
    return found


# The marks for the verdicts of an arm's audits, the worst first.
_MARKS = {"fail": " †", "warn": " ⚠", None: " ‡", "pass": ""}


def _arms(results: Results) -> list[str]:
    """The arms, marked by their audits."""
    marked = []
    for arm, verdicts in results["audits"].items():
        found = set(verdicts.values())
        mark = next((mark for verdict, mark in _MARKS.items() if verdict in found), "")
        marked.append(f"{results['arms'][arm]}{mark}")
    return marked


def _rows(results: Results) -> list[dict[str, Any]]:
    """A row for each measure, a cell for each arm."""
    rows = []
    for label, measure in results["measures"].items():
        unit, cells = measures.unit(measure), []
        for arm, entries in results["table"].items():
            entry = entries[label]
            published = results["published"].get(arm, {}).get(label)
            interval = (
                ""
                if entry["low"] is None
                else (f"{_number(entry['low'], unit)} to {_number(entry['high'], unit)}")
            )
            cells.append(
                {
                    "mean": _number(entry["mean"], unit),
                    "interval": interval,
                    "published": "" if published is None else f"{published:g}",
                }
            )
        measured = [of_arm[label] for of_arm in results["table"].values()]
        number = _counted((len(m["values"]) for m in measured), (m["images"] for m in measured))
        rows.append(
            {
                "label": _with_unit(label, measure),
                "number": number,
                "cells": cells,
            }
        )
    return rows


def _number(x: float | None, unit: str) -> str:
    return percent(x) if unit and x is not None else number(x)


def _made_by(results: Results) -> str:
    """The versions that made the runs; older results.json do not have them."""
    versions = results.get("versions", {})
    named = [f"{name} {' and '.join(of)}" for name, of in versions.items()]
    return f"Made by {', '.join(named)}." if named else ""


def _markdown(results, claims, arms, rows, captions, chance) -> str:
    missing = [f"Not finished: {', '.join(results['missing'])}.", ""] if results["missing"] else []
    lines = [
        f"# {results['title']}: results",
        "",
        results["question"],
        "",
        f"{results['paper']}. Scale `{results['scale']}`, {len(results['seeds'])} seeds.",
        "",
        *([made_by, ""] if (made_by := _made_by(results)) else []),
        *missing,
        "## What is claimed, and what came out",
        "",
    ]
    for claim in claims:
        lines += [f"**{claim['verdict']}**: {claim['text']}", ""]
        lines += ["| test | found | smallest effect | from | verdict |", "| --- |" + " --- |" * 4]
        lines += [f"| {' | '.join(line.values())} |" for line in claim["lines"]] + [""]
    lines += [_VERDICTS, "", chance, ""]
    lines += ["## Numbers", "", f"| | {' | '.join(arms)} | from |"]
    lines += [f"| --- |{' --- |' * (len(arms) + 1)}"]
    for row in rows:
        cells = [
            c["mean"]
            + (f" ({c['interval']})" if c["interval"] else "")
            + (f", published {c['published']}" if c["published"] else "")
            for c in row["cells"]
        ]
        lines.append(f"| {row['label']} | {' | '.join(cells)} | {row['number']} |")
    lines += ["", _CAPTION, ""]
    for name, alt in captions.items():
        lines += [f"![{alt}](figures/{name}.svg)", "", alt, ""]
    lines += [line for note in results["notes"] for line in (note, "")]
    return "\n".join(lines)
