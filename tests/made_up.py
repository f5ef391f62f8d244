"""A made-up run whose results follow from its records, and how to read a page."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd

from robust_jax import attacks
from robust_jax.app import results, stored
from robust_jax.app.evaluator import AttackGrid

EPS = {"linf": (0.05, 0.1, 0.2), "l2": (0.5, 1.0)}
EFFORTS = {"fgsm": 1.3, "pgd": 1.0}  # how much further than the nearest boundary each must go
HOSTILE = "<script>alert('x')</script>"


def make_records(seed: int, norms=("linf", "l2")) -> pd.DataFrame:
    """Examples with a distance to the boundary that shrinks as their Jacobian grows."""
    rng, num = np.random.default_rng(seed), 120
    label = rng.integers(0, 10, num)
    margin = rng.normal(3.0, 1.6, num)
    frobenius = rng.lognormal(1.5, 0.4, num)
    correct = margin > 0
    confidence = 1 / (1 + np.exp(-margin))
    error = 0.1 * frobenius
    records = pd.DataFrame(
        {
            "index": np.arange(num),
            "label": label,
            "key": [f"{i:016x}" for i in range(num)],
            "prediction": np.where(correct, label, (label + 1) % 10),
            "correct": correct,
            "cross_entropy": -np.log(confidence),
            "margin": margin,
            "confidence": confidence,
            "entropy": confidence * (1 - confidence),
            "top_probability": np.maximum(confidence, 1 - confidence),
            "frobenius_logits": frobenius,
            "frobenius_probabilities": frobenius * confidence * (1 - confidence),
            "frobenius_estimate_logits": frobenius + error * rng.normal(size=num),
            "frobenius_estimate_error_logits": error,
            "spectral_logits": 0.7 * frobenius,
            "relative_slope": frobenius / np.abs(margin),
            "spectral_probabilities": 0.7 * frobenius * confidence * (1 - confidence),
        }
    )
    columns = {}
    for norm in norms:
        reach = np.where(correct, margin / frobenius, 0) * (0.2 if norm == "linf" else 1.2)
        for attack, effort in EFFORTS.items():
            for eps in EPS[norm]:
                held = correct & (effort * reach > eps)
                columns[f"{attack}_{norm}@{eps:g}/held"] = held
                columns[f"{attack}_{norm}@{eps:g}/distance"] = np.where(held, np.nan, reach)
                columns[f"{attack}_{norm}@{eps:g}/margin"] = np.where(held, margin / 2, -0.1)
    return records.join(pd.DataFrame(columns))


def summarize(records: pd.DataFrame, step: int, norms=("linf", "l2")) -> dict:
    """results.json's entry of one checkpoint."""
    grids = {
        f"{kind}_{norm}": AttackGrid(kind, attacks.pgd, norm, EPS[norm])
        for norm in norms
        for kind in EFFORTS
    }
    return {"step": step, **results.summarize(records, grids, temperature=2.0)}


def make_metrics(steps: int, best: int) -> list[dict]:
    lines = []
    for step in range(10, steps + 1, 10):
        progress = step / steps
        lines.append(
            {
                "step": step,
                "epoch": step / 9,
                "train/loss": 2.3 * np.exp(-3 * progress),
                "train/supervised_loss": 2 * np.exp(-3 * progress),
                "train/adversarial_accuracy": 0.9 - 0.8 * np.exp(-4 * progress),
                "train/regularizers/entropy": -1 + progress,
                "train/learning_rate": 1e-3 * (1 - progress),
                "train/gradient_norm": 1 + progress if step > 10 else None,
            }
        )
        if step % 50 == 0:
            robust = 0.7 - 0.5 * abs(step - best) / steps
            lines.append(
                {
                    "step": step,
                    "validation/clean_accuracy": 0.95 - 0.4 / step,
                    "validation/robust_accuracy": robust,
                    "validation/cross_entropy": 0.2 + 5 / step,
                }
            )
    return lines


def make_run(
    workdir: Path,
    *,
    channels=1,
    adversary=True,
    best=250,
    norms=("linf", "l2"),
    audit=None,
    **config,
) -> dict:
    """Writes what a finished run leaves, and returns its results."""
    tables = {"best": make_records(0, norms), "last": make_records(int(best != 300), norms)}
    (workdir / "records").mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(workdir / "records" / f"{name}.csv", index=False)
    summaries = {
        "best": summarize(tables["best"], best, norms),
        "last": summarize(tables["last"], 300, norms),
    }
    entry = {"name": "pgd", "norm": "linf", "eps": 0.1, "num_steps": 10} if adversary else None
    if isinstance(adversary, dict):
        entry = {**entry, **adversary}
    found = {
        "config": {
            "seed": 0,
            "dataset": "digits",
            "model": {"name": "cnn"},
            "adversary": entry,
            "loss": {"name": "cross_entropy"},
            "regularizers": {"entropy": {"weight": 2.0}},
            "loss_on": "adversarial" if adversary else "clean",
            **config,
        },
        "versions": {"robust_jax": "0.1.0", "python": "3.12.0", "numpy": "2.0.0"},
        "seed": 0,
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "data": {
            "name": "digits",
            "train": 1100,
            "validation": 197,
            "test": 120,
            "num_classes": 10,
            "image_shape": [8, 8, channels],
        },
        "model": {"name": "cnn", "parameters": 12345},
        "timings": {
            "train_seconds": 61.2,
            "compile_seconds": 4.5,
            "evaluate_seconds": 20.25,
            "examples_per_second": 1234.5,
        },
        "trained_against": entry and {"norm": entry["norm"], "eps": entry["eps"]},
        "checkpoint": "best",
        **summaries["best"],
        **summaries,
        "audit": audit,
        "measurements": {},
    }
    stored.write_results(workdir, found)
    lines = map(json.dumps, make_metrics(300, best))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    np.savez(workdir / "examples.npz", attack="pgd_linf", eps=0.1, **make_images(channels))
    return found


def make_images(channels: int, num: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    label = rng.integers(0, 10, num)
    clean = rng.random((num, 8, 8, channels)).astype(np.float32)
    noise = 0.1 * np.sign(rng.normal(size=clean.shape))
    return {
        "clean": clean,
        "adversarial": np.clip(clean + noise, 0, 1).astype(np.float32),
        "label": label,
        "clean_prediction": label,
        "adversarial_prediction": (label + rng.integers(0, 2, num)) % 10,
    }


def make_audit(**verdicts) -> dict:
    checks = [
        {
            "name": name,
            "verdict": verdict,
            "evidence": f"evidence of {name}",
            "advice": f"advice on {name}",
            "values": {},
        }
        for name, verdict in verdicts.items()
    ]
    order = ["skipped", "pass", "warn", "fail"]
    return {
        "verdict": max(verdicts.values(), key=order.index),
        "checks": checks,
        "norm": "linf",
        "eps": 0.1,
        "num_examples": 100,
        "seconds": 1.0,
    }


class Page(HTMLParser):
    """Tags that balance, the attributes of each, and the text in them."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]
