"""A finished run's folder as one self-contained report.html, and as a table in plain text."""

import json
import textwrap
from collections.abc import Mapping
from math import floor, isclose, log10
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robust_jax import plots
from robust_jax.analysis.calibration import expected_calibration_error, reliability
from robust_jax.analysis.summaries import wilson_interval
from robust_jax.app import stored
from robust_jax.app.config import flatten
from robust_jax.app.methods import method
from robust_jax.app.pages import figures as figures_lib
from robust_jax.app.pages.html import image, template
from robust_jax.app.records import fates, first_to_break
from robust_jax.app.stored import Results, is_ours
from robust_jax.app.wording import (
    format_eps,
    number,
    percent,
    threat_in_words,
    with_interval,
    words,
)
from robust_jax.files import write_atomically

_LINE = 80


class Radius(NamedTuple):
    """The perturbation size that the report is about; trained: whether it is the adversary's."""

    norm: str
    eps: float
    trained: bool


def write(workdir: Path, results: Results) -> Path:
    """Writes workdir/report.html from the results and what else the run left; returns its path."""
    run, names = stored.load(workdir), checkpoint_names(results)
    records = {name: run.records[name] for name in names}
    figures = _figures(results, records, run.metrics, run.images)
    drawn = figures_lib.of_measurements(
        {"best": arrays} if (arrays := stored.measured(workdir)) else {}
    )
    page = template("report.html.j2").render(
        title=title(results),
        headline=headline(results),
        verdict=audit_sentence(results),
        audit=results["audit"],
        first=_first_to_break(results, records["best"]),
        figures=figures,
        measurements=_measurements(results),
        elsewhere=_elsewhere(results),
        drawn=[image(figure, alt) for figure, alt in drawn.values()],
        kept=sorted({a["name"] for a in results["attacks"] if a.get("earlier")}),
        is_ours=is_ours(results),
        network=_network(results),
        checkpoints=names,
        steps={name: results[name]["step"] for name in ("best", "last") if name in results},
        summary=_summary(results),
        blocks=_blocks(results),
        facts=_facts(results),
        config={k: json.dumps(v) for k, v in flatten(results["config"]).items()},
    )
    return write_atomically(workdir / "report.html", page)


def table(results: Results) -> str:
    """The numbers as plain text of at most 80 columns, accuracies in percent."""
    names = checkpoint_names(results)
    heads = [f"{name} (step {results[name]['step']})" for name in names]
    lines = [_row("", heads, 34, 20)]
    lines += [_row(label, values, 34, 20) for label, values in _summary(results)]
    lines += ["", *textwrap.wrap(audit_sentence(results), _LINE)]
    for block in _blocks(results):
        per_line = (_LINE - 26) // 9
        for start in range(0, len(block["eps"]), per_line):
            part = slice(start, start + per_line)
            lines += ["", _row(f"{block['norm']}, accuracy in % at ε =", block["eps"][part], 26, 9)]
            for attack, by_checkpoint in block["rows"]:
                for i, (name, cells) in enumerate(by_checkpoint.items()):
                    label = f"{_cut(attack, 19) if i == 0 else '':<19} {name}"
                    values = [cell["accuracy"] for cell in cells[part]]
                    lines.append(_row(label, values, 26, 9))
    return "\n".join(lines)


def _cut(label: str, width: int) -> str:
    """Shortens the name in a label that is too long; the number of examples stays."""
    if len(label) <= width:
        return label
    name, first, count = label.partition(", first ")
    end = f" of {count}" if first else ""
    return name[: width - len(end)] + end


def measurements_text(numbers: Mapping[str, Mapping[str, float | None]]) -> str:
    """The numbers of the measurements, a line each."""
    lines = []
    for label, found in numbers.items():
        lines += [f"{label}:"] + [f"  {words(k):<46}{number(v):>12}" for k, v in found.items()]
    return "\n".join(lines)


def audit_text(results: Results) -> str:
    """The verdict, the evidence of every check and the advice for those that did not pass."""
    lines = textwrap.wrap(audit_sentence(results), _LINE)
    for check in (results["audit"] or {"checks": ()})["checks"]:
        said = f"{check['verdict']:<8}{check['name']}: {check['evidence']}"
        if check["verdict"] != "pass":
            said += f". {check['advice'][0].upper()}{check['advice'][1:]}"
        lines += textwrap.wrap(said, _LINE, subsequent_indent=" " * 8)
    return "\n".join(lines)


def checkpoint_names(results: Results) -> list[str]:
    """best and last, or only best if they are the same or the last was not evaluated."""
    if "last" not in results or results["best"]["step"] == results["last"]["step"]:
        return ["best"]
    return ["best", "last"]


def title(results: Results) -> str:
    """The data set, the model and the method, with its weights."""
    if not is_ours(results):
        return results["title"]
    what = method(results["config"], results["trained_against"])
    return f"{results['data']['name']}, {words(results['model']['name'])}: {what}"


def _network(results: Results) -> str:
    return "best checkpoint" if is_ours(results) else "network"


def headline(results: Results) -> str:
    """Clean and worst-case accuracy of the best checkpoint, with 95 % intervals, as a sentence."""
    clean = results["clean"]
    text = (
        f"Of {clean['count']:,} test images, the {_network(results)} classifies "
        f"{with_interval(clean['accuracy'], clean['count'])} right"
    )
    radius = reference_radius(results)
    if radius is None:
        return f"{text}. No attack was evaluated."
    entry = _worst_case(results, radius)
    trained = f", {'the size' if radius.trained else 'not a size'} it was trained against"
    some = "" if entry["count"] == clean["count"] else f"of the first {entry['count']:,} "
    text = (
        f"{text}, and {with_interval(entry['robust_accuracy'], entry['count'])} {some}still under "
        f"the worst of all {threat_in_words(radius.norm, radius.eps, 'attacks at ')}"
        f"{trained if is_ours(results) else ''}."
    )
    for entry in results["attacks"]:
        if entry["attack"] == "autoattack" and entry["norm"] == radius.norm:
            at = f" AutoAttack at ε = {format_eps(entry['eps'])} leaves"
            text += f"{at} {percent(entry['robust_accuracy'])} %"
            first = f"worst_case_{radius.norm}_first_{entry['count']}"
            if worst := _find(results, first, entry["eps"]):
                text += f" of the first {entry['count']:,}, all attacks together "
                text += f"{percent(worst['robust_accuracy'])} % of these"
            text += "."
    return text


# The audit's checks of the outputs, which may fail without a masked gradient.
_OF_OUTPUTS = {"outputs", "randomness", "batch"}


def audit_sentence(results: Results) -> str:
    """The audit's verdict on the robust accuracies, as a sentence."""
    audit = results["audit"]
    if audit is None:
        return "Not audited: nothing says that these attacks were not misled by masked gradients."
    at = f"{threat_in_words(audit['norm'], audit['eps'])}, {audit['num_examples']} images"
    flagged = {
        word: [c["name"] for c in audit["checks"] if c["verdict"] == word]
        for word in ("fail", "warn", "skipped", "pass")
    }
    if flagged["fail"]:
        text = f"Audit failed ({at}): {', '.join(flagged['fail'])}. Do not trust robust accuracies"
        text += " here." if set(flagged["fail"]) <= _OF_OUTPUTS else " here: gradients are masked."
    elif flagged["warn"]:
        text = f"Audit passed with warnings ({at}): {', '.join(flagged['warn'])}."
    else:
        text = f"Audit passed ({at}): {len(flagged['pass'])} checks find no masked gradients."
    return text + "".join(f" Skipped: {name}." for name in flagged["skipped"])


def reference_radius(results: Results) -> Radius | None:
    """The threat model's norm and ε if it was evaluated, else the most informative ones.

    Those are the adversary's, or else the largest ε (in ℓ∞ if possible) at which the worst case is
    above chance, or else the smallest ε there is. None without attacks.
    """
    worst = [a for a in results["attacks"] if a["attack"] == "worst_case"]
    trained, told = _trained(results), _pair(results.get("threat"))
    for pair in (told, trained):
        for a in worst:
            if pair and a["norm"] == pair[0] and isclose(a["eps"], pair[1], rel_tol=1e-6):
                return Radius(a["norm"], a["eps"], trained=pair == trained)
    if not worst:
        return None
    norms = {a["norm"] for a in worst}
    preferred = (told or trained or ("linf",))[0]
    norm = preferred if preferred in norms else "linf" if "linf" in norms else min(norms)
    worst = [a for a in worst if a["norm"] == norm]
    above = [a["eps"] for a in worst if a["robust_accuracy"] > 1 / results["data"]["num_classes"]]
    return Radius(norm, max(above, default=min(a["eps"] for a in worst)), trained=False)


def _trained(results: Results) -> tuple[str, float] | None:
    return _pair(results["trained_against"])


def _pair(radius: Mapping[str, Any] | None) -> tuple[str, float] | None:
    return (radius["norm"], radius["eps"]) if radius else None


def _worst_case(results: Results, radius: Radius) -> Mapping[str, Any]:
    return next(
        a
        for a in results["attacks"]
        if a["attack"] == "worst_case" and (a["norm"], a["eps"]) == (radius.norm, radius.eps)
    )


def _attacked(
    results: Results, best: pd.DataFrame, radius: Radius
) -> tuple[pd.DataFrame, set[str]]:
    """The records of the examples that were attacked in that norm, and the attacks' names."""
    names = {a["name"] for a in results["attacks"] if a["norm"] == radius.norm}
    return best[: _worst_case(results, radius)["count"]], names


def _find(results: Results, name: str, eps: float) -> Mapping[str, Any] | None:
    these = (a for a in results["attacks"] if (a["name"], a["eps"]) == (name, eps))
    return next(these, None)


def _attack_table(results: Results) -> pd.DataFrame:
    """The attacks of each checkpoint, one row an ε, as `plots.accuracy_against_eps` takes them.

    The norm that the headline is about comes first. An attack's name leaves out its norm, so that
    name and colour are the same in every norm, unless two attacks of one norm would then share a
    name. If an attack saw only the first examples, its name says how many.
    """
    radius = reference_radius(results)
    rows = [
        {"checkpoint": name, **a}
        for name in checkpoint_names(results)
        for a in results[name]["attacks"]
    ]
    table = pd.DataFrame(
        rows, columns=["checkpoint", "name", "attack", "norm", "eps", "robust_accuracy", "count"]
    )
    names = zip(table["name"], table["norm"], strict=True)
    short = pd.Series([name.removesuffix(f"_{norm}") for name, norm in names], dtype=object)
    clashes = table["name"].groupby([table["norm"], short]).transform("nunique") > 1
    label = short.where(~clashes, table["name"])
    label = label.where(~table["attack"].str.startswith("worst_case"), plots.WORST_CASE)
    part = table["count"] < results["clean"]["count"]
    shown = [f"{name}, first {count}" for name, count in zip(label, table["count"], strict=True)]
    label = label.where(~part, pd.Series(shown, dtype=object))
    table = table.assign(attack=label).rename(columns={"robust_accuracy": "accuracy"})
    return table.sort_values("norm", key=lambda n: n != (radius and radius.norm), kind="stable")


# Tables: strings, shared by the page and the plain text.


def _summary(results: Results) -> list[tuple[str, list[str]]]:
    """Clean accuracy and the Jacobian's means: a label and a value for each checkpoint."""
    entries = [results[name] for name in checkpoint_names(results)]
    rows = [
        ("clean accuracy, %", [percent(e["clean"]["accuracy"]) for e in entries]),
        ("clean cross-entropy, nats", [f"{e['clean']['cross_entropy']:.3f}" for e in entries]),
    ]
    for fn, norms in entries[0]["jacobian"].items():
        for norm in norms:
            values = [e["jacobian"][fn][norm] for e in entries]
            rows.append(
                (
                    f"{JACOBIAN_WORDS.get(norm, norm)}, {OF_WHAT.get(fn, fn)}",
                    [_with_error(v) for v in values],
                )
            )
    if all(e.get("temperature") for e in entries):
        rows.append(("temperature T", [f"{e['temperature']:.3g}" for e in entries]))
    if all("relative_slope" in e for e in entries):
        medians = [number(e["relative_slope"]["median"]) for e in entries]
        rows.append(("relative slope, median", medians))
    return rows


def _with_error(found: Mapping[str, float | None]) -> str:
    """A mean ± its standard error, which one image does not have."""
    mean, error = found["mean"], found["standard_error"]
    if error is None or mean is None:
        return number(mean)
    place = -floor(log10(error)) if error else 6
    if place >= 6:  # rounding to the error's digit would show a string of zeros
        return f"{number(mean)} ± {error:.1g}"
    return " ± ".join(f"{round(v, place):,.{max(place, 0)}f}" for v in (mean, error))


# Dividing by T removes the logits' scale, so that networks are equally confident.
OF_WHAT = {"matched": "logits / T"}


JACOBIAN_WORDS = {
    "frobenius": "‖J‖ Frobenius",
    "spectral": "‖J‖ spectral",
    "frobenius_estimate": "‖J‖ Frobenius est.",
}


def _blocks(results: Results) -> list[dict[str, Any]]:
    """The ε and rows of each norm: an attack with, for each checkpoint, a cell for each ε."""
    blocks = []
    for norm, of_norm in _attack_table(results).groupby("norm", sort=False):
        sizes = sorted(of_norm["eps"].unique())
        rows = [
            (attack, {name: _cells(part, sizes) for name, part in rows.groupby("checkpoint")})
            for attack, rows in of_norm.groupby("attack", sort=False)
        ]
        heads = [format_eps(eps) for eps in sizes]
        partial = bool((of_norm["count"] < results["clean"]["count"]).any())
        symbol = plots.norm_symbol(norm)
        blocks.append({"norm": symbol, "eps": heads, "rows": rows, "partial": partial})
    return blocks


def _cells(rows: pd.DataFrame, sizes: list[float]) -> list[dict[str, str]]:
    """One attack's accuracy at each ε, with the interval of the worst case."""
    found = {row["eps"]: row for row in rows.to_dict("records")}
    cells = []
    for eps in sizes:
        cell = {"accuracy": "–", "interval": ""}
        if row := found.get(eps):
            cell["accuracy"] = percent(row["accuracy"])
            if row["attack"].startswith(plots.WORST_CASE):
                low, high = wilson_interval(row["accuracy"], row["count"])
                cell["interval"] = f"{percent(low)}–{percent(high)}"
        cells.append(cell)
    return cells


def _row(label: str, values: list[str], label_width: int, width: int) -> str:
    return (f"{label:<{label_width}}" + "".join(f"{v:>{width}}" for v in values)).rstrip()


def _first_to_break(results: Results, best: pd.DataFrame) -> list[dict[str, str]]:
    """How many images each attack broke first, up to the headline's radius, and their sum."""
    radius = reference_radius(results)
    if radius is None:
        return []
    found = first_to_break(*_attacked(results, best, radius), radius.eps)
    rows = []
    groups = list(found.groupby(["eps", "by"]))
    for (eps, name), part in sorted(groups, key=lambda group: (group[0][0], -len(group[1]))):
        distance = part["distance"].dropna().median()
        rows.append(
            {
                "eps": format_eps(eps) if np.isfinite(eps) and eps else "–",
                "attack": str(name),
                "images": f"{len(part):,}",
                "distance": "–" if np.isnan(distance) or not eps else f"{distance:.3g}",
            }
        )
    rows.append({"eps": "", "attack": "all", "images": f"{len(found):,}", "distance": ""})
    return rows


def _measurements(results: Results) -> list[dict[str, str]]:
    """A row for each number that was measured."""
    return [
        {"label": label.replace("_", " "), "what": words(name), "value": number(value)}
        for label, found in results.get("measurements", {}).items()
        for name, value in found.items()
    ]


def _elsewhere(results: Results) -> str:
    """The measurements of a checkpoint other than the best, and which one."""
    entries = results["config"].get("measurements") or {}
    places = {label: entry["at"] for label, entry in entries.items() if "at" in entry}
    return ", ".join(
        f"{label.replace('_', ' ')}: {at}"
        for label, at in places.items()
        if at != "best" and label in results["measurements"]
    )


_SPLITS = {"train": "training"}


def _counts(data: Mapping[str, Any]) -> str:
    splits = [name for name in ("train", "validation", "test") if name in data]
    return ", ".join(f"{data[name]:,} {_SPLITS.get(name, name)}" for name in splits)


def _facts(results: Results) -> list[tuple[str, str]]:
    data, device, timings = results["data"], results["device"], results["timings"]
    shape = "×".join(map(str, data["image_shape"]))
    return [
        (
            "data",
            f"{data['name']}: {_counts(data)} images of {shape}, {data['num_classes']} classes",
        ),
        ("model", f"{results['model']['name']}, {results['model']['parameters']:,} parameters"),
        ("device", f"{device['count']} × {device['kind']} ({device['platform']})"),
        *([("seed", str(results["seed"]))] if "seed" in results else []),
        *((words(k), f"{v:,.0f}" if v >= 100 else f"{v:.3g}") for k, v in timings.items()),
        ("versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items())),
    ]


# Figures by name: each an image with its text, if the run holds what it needs.


def _figures(
    results: Results,
    records: Mapping[str, pd.DataFrame],
    metrics: pd.DataFrame,
    examples: Mapping[str, np.ndarray] | None,
) -> dict[str, dict[str, Any]]:
    best, radius = records["best"], reference_radius(results)
    figures = {}
    if results["attacks"]:
        figures["accuracy"] = image(
            plots.accuracy_against_eps(
                _attack_table(results),
                {name: results[name]["clean"]["accuracy"] for name in records},
                chance=1 / results["data"]["num_classes"],
                trained=_trained(results),
            ),
            "Accuracy against perturbation size, one panel for each norm, a line for each attack.",
        )
    if len(metrics):
        figures["training"] = image(
            plots.training_curves(metrics, best_step=results["best"]["step"]),
            "Loss, accuracy and learning rate against the training step.",
        )
    figures["jacobian"] = image(
        plots.jacobian_histograms(records),
        "Histograms of Frobenius and spectral norms of the Jacobian, of logits and probabilities.",
    )
    if "frobenius_estimate_logits" in best:
        figures["estimate"] = image(
            plots.estimate_against_exact(
                best["frobenius_logits"],
                best["frobenius_estimate_logits"],
                best["frobenius_estimate_error_logits"],
            ),
            "Scatter of the estimated against the exact Frobenius norm, with the diagonal.",
        )
    if "top_probability" in best:
        known = best[np.isfinite(best["top_probability"])]
        curve = reliability(known["top_probability"], known["correct"])
        error = expected_calibration_error(curve)
        figures["reliability"] = image(
            plots.reliability_diagram({"best": curve}),
            f"Accuracy against top probability; expected calibration error {100 * error:.1f} %.",
        )
    if radius is not None:
        seen, of_norm = _attacked(results, best, radius)
        fate = fates(seen, of_norm, radius.eps)
        at = threat_in_words(radius.norm, radius.eps)
        figures["fate"] = image(
            plots.fate_histograms(seen, fate),
            f"Histograms of margin and confidence by what the worst case at {at} does.",
            at=at,
        )
        figures["jacobian_fate"] = image(
            plots.jacobian_by_fate(seen, fate),
            f"Box plots of Jacobian norms by what the worst case at {at} does.",
            at=at,
            medians=_median_sentence(seen, fate),
        )
    if examples is not None:
        figures["images"] = image(
            plots.image_grid(
                examples["clean"],
                examples["adversarial"],
                examples["label"],
                examples["clean_prediction"],
                examples["adversarial_prediction"],
            ),
            "Clean images, adversarial images and their differences, with labels and predictions.",
            attack=str(examples["attack"]),
            eps=format_eps(float(examples["eps"])),
            scale=f"{plots.difference_scale(examples['clean'], examples['adversarial']):.3g}",
            is_gray=examples["clean"].shape[-1] != 3,
        )
    return figures


def _median_sentence(records: pd.DataFrame, fate: pd.Series) -> str:
    medians = records["frobenius_logits"].groupby(fate).median()
    if not {"held", "broken"} <= set(medians.index):
        return ""
    return (
        f"The median Frobenius norm of the logits is {medians['held']:.3g} where the label "
        f"held and {medians['broken']:.3g} where it was broken."
    )
