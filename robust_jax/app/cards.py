"""A result as a JSON card, with the fields of RobustBench's model_info."""

from collections.abc import Mapping
from typing import Any

from robust_jax.app.stored import is_ours
from robust_jax.app.wording import format_eps


def card(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The card of the best checkpoint under AutoAttack; None if AutoAttack did not run.

    It is for the threat model's radius if AutoAttack ran there. Accuracies are in percent, both on
    the images that AutoAttack saw. RobustBench leaves link, authors and venue to people. For a
    network that was not trained here, they also fill in additional data and the number of forward
    passes. `unreliable` says whether the audit's verdict is "fail", None without an audit;
    `footnote` says what a reader must know.
    """
    runs = [entry for entry in results["attacks"] if entry["attack"] == "autoattack"]
    if not runs:
        return None
    threat = results.get("threat") or results["trained_against"] or {}
    at = threat.get("norm"), threat.get("eps")
    entry = next((e for e in runs if (e["norm"], e["eps"]) == at), runs[0])
    config, audit = results["config"], results.get("audit")
    version = config["attacks"][entry["name"]].get("version", "standard")
    standard = version == "standard" and not config["attacks"][entry["name"]].get("overrides")
    notes = [
        f"AutoAttack {version if isinstance(version, str) else ', '.join(version)}"
        f"{'' if standard else ' (not the standard budgets)'} on {entry['count']} test images.",
        f"Audit: {audit['verdict']}." if audit else "Not audited.",
    ]
    return {
        "name": f"{config['loss']['name']} on {config['loss_on']}"
        if is_ours(results)
        else results["model"]["name"],
        "dataset": results["data"]["name"].removeprefix("tfds:"),
        "architecture": results["model"]["name"],
        "threat_model": entry["norm"].capitalize(),
        "eps": format_eps(entry["eps"]),
        "clean_acc": f"{100 * entry['members']['clean']:.2f}",
        "autoattack_acc": f"{100 * entry['robust_accuracy']:.2f}",
        "reported": None,
        "additional_data": False if is_ours(results) else None,
        "number_forward_passes": 1 if is_ours(results) else None,
        "unreliable": audit["verdict"] == "fail" if audit else None,
        "footnote": " ".join(notes),
        "link": None,
        "authors": None,
        "venue": None,
    }
