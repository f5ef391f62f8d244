"""The name of what a config trains, as the papers call it, with its weights."""

from collections.abc import Mapping
from typing import Any

from robust_jax.app.wording import threat_in_words, words

_TERMS = {
    "entropy": "EntM",
    "complement_entropy": "COT",
    "kl": "KL between the halves",
    "weighted_kl": "weighted KL between the halves",
    "vat": "VAT",
    "jacobian": "Jacobian regularisation",
    "input_gradient": "input-gradient regularisation",
    "output_margin_ramp": "ramp of output margins",
    "orthogonality": "orthogonal weights",
    "input_margin": "input-space margins",
    "energy_mean_square": "mean-square energy",
    "energy_oscillation": "oscillation energy",
    "energy_total_variation": "total variation",
    "energy_path": "path energy",
}
_ON = {"clean": "clean images", "adversarial": "adversarial images", "both": "both halves"}


def method(config: Mapping[str, Any], trained_against: Mapping[str, Any] | None) -> str:
    """The loss, the adversary and the regularisers of a run, in words."""
    terms = [
        (entry.get("name", label), entry["weight"])
        for label, entry in (config.get("regularizers") or {}).items()
        if entry["weight"]
    ]
    names = [term for term, _ in terms]

    def taken(term):
        return terms.pop(names.index(term))[1]

    loss, on = config["loss"], config["loss_on"]
    adversary = config["adversary"] or {}
    if "kl" in names and on == "clean" and adversary.get("loss") == "kl":
        name = f"TRADES (λ = {taken('kl'):g})"
    elif "weighted_kl" in names and loss["name"] == "boosted_cross_entropy":
        name = f"MART (λ = {taken('weighted_kl'):g})"
    elif loss["name"] == "cross_entropy":
        name = {
            "clean": "standard training",
            "adversarial": "adversarial training",
            "both": "adversarial training on both halves",
        }[on]
    else:
        name = f"{words(loss['name'])} on {_ON[on]}"
    if smoothing := loss.get("label_smoothing"):
        name += f" with label smoothing {smoothing:g}"
    parts = [f"{_TERMS.get(term, words(term))} (λ = {weight:g})" for term, weight in terms]
    if gamma := config.get("weight_perturbation"):
        parts.append(f"AWP (γ = {gamma:g})")
    text = " + ".join([name, *parts])
    if trained_against:
        steps = f"-{adversary['num_steps']}" if "num_steps" in adversary else ""
        attack = f"{words(adversary['name'])}{steps}"
        text += f", {attack} at {threat_in_words(trained_against['norm'], trained_against['eps'])}"
    return text
