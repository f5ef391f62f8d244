"""Attacks × eps and Jacobian norms on a test set: one record per example, and their summary.

Anything drawn at random follows (seed, attack, example): never the batch or the device.
"""

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from robust_jax import data, jacobian, losses
from robust_jax.attacks import norms
from robust_jax.attacks.jsma import num_changed
from robust_jax.keys import fold_in_each
from robust_jax.progress import progress
from robust_jax.records import column, worst_case
from robust_jax.train import parallel

Network = Callable[[Any, jax.Array], jax.Array]


class AttackGrid(NamedTuple):
    """attack(logits_fn, x, y, keys, eps=…) -> x_adv, its kind by name, its norm and its radii."""

    kind: str
    attack: Callable
    norm: norms.Norm | Literal["l0"]
    eps: tuple[float, ...]


class Settings(NamedTuple):
    """How a test set is measured; the chunk bounds the Jacobians that a device holds at a time."""

    batch_size: int
    jacobian_chunk: int
    jacobian_projections: int
    spectral_iterations: int
    num_images: int


class Evaluator:
    """Compiled measurements of one network(variables, x) -> logits; variables are arguments."""

    def __init__(
        self,
        network: Network,
        split: data.Split,
        grids: Mapping[str, AttackGrid],
        settings: Settings,
        key: jax.Array,
        method: parallel.Method,
    ):
        self._split, self._grids, self._num_images = split, grids, settings.num_images
        mapped = partial(parallel.map_split, method=method, batch_size=settings.batch_size)
        self._measure = mapped(_measurement(network, settings, key))
        self._attacks = {
            name: mapped(_attempt(network, grid, _named_key(key, name)))
            for name, grid in grids.items()
        }

    def records(self, variables: Any, description: str) -> pd.DataFrame:
        """One row per example of the split: measures, and for each attack and eps if it held.

        An example broken at an eps stays broken, with the same adversarial, at every larger eps
        (the balls are nested), so an attack sees only the examples that still stand.
        """
        index = np.arange(len(self._split.labels))
        work = 2 + sum(len(grid.eps) for grid in self._grids.values())
        with progress(work, description, "pass") as bar:
            columns = self._measure(variables, self._split, index)
            bar.update(2)
            for name, grid in self._grids.items():
                held = columns["correct"].astype(bool)
                distance = np.where(held, np.nan, 0.0)
                for eps in sorted(grid.eps):
                    bar.set_postfix_str(f"{name} at eps {eps:g}", refresh=False)
                    standing = np.flatnonzero(held)
                    if len(standing):
                        out = self._attacks[name](variables, self._split, standing, eps)
                        held[standing] = out["held"]
                        distance[standing] = np.where(out["held"], np.nan, out["distance"])
                    columns[column(name, eps, "held")] = held.copy()
                    columns[column(name, eps, "distance")] = distance.copy()
                    bar.update()
        columns["correct"] = columns["correct"].astype(bool)
        return pd.DataFrame({"index": index, "label": self._split.labels, **columns})

    def images(self, variables: Any, name: str, eps: float) -> dict[str, np.ndarray]:
        """The first examples of the split, clean and attacked, for people to look at."""
        index = np.arange(min(self._num_images, len(self._split.labels)))
        measures = self._measure(variables, self._split, index)
        out = self._attacks[name](variables, self._split, index, eps)
        clean = np.asarray(data.to_pixels(self._split.images[index]))
        return {
            "clean": clean,
            "adversarial": out["x_adv"],
            "label": self._split.labels[index],
            "clean_prediction": measures["prediction"],
            "adversarial_prediction": out["adversarial_prediction"],
            "attack": np.asarray(name),
            "eps": np.asarray(eps),
        }


def summarize(records: pd.DataFrame, grids: Mapping[str, AttackGrid]) -> dict[str, Any]:
    """The means over a table of records: clean, attacks[] and jacobian, as results.json has them.

    The worst case of a norm at an eps is over every attack of that norm with a radius up to it.
    """
    count = len(records)
    attacks = []
    for name, grid in grids.items():
        for eps in sorted(grid.eps):
            held = records[column(name, eps, "held")]
            distance = records[column(name, eps, "distance")][records["correct"]].mean()
            attacks.append(
                {
                    "name": name,
                    "attack": grid.kind,
                    "norm": grid.norm,
                    "eps": eps,
                    "robust_accuracy": float(held.mean()),
                    "count": count,
                    "mean_distance": None if np.isnan(distance) else float(distance),
                }
            )
    for norm in dict.fromkeys(grid.norm for grid in grids.values()):
        of_norm = {name: grid for name, grid in grids.items() if grid.norm == norm}
        for eps in sorted({eps for grid in of_norm.values() for eps in grid.eps}):
            attacks.append(
                {
                    "name": f"worst_case_{norm}",
                    "attack": "worst_case",
                    "norm": norm,
                    "eps": eps,
                    "robust_accuracy": float(worst_case(records, of_norm, eps).mean()),
                    "count": count,
                    "mean_distance": None,
                }
            )
    return {
        "clean": {
            "accuracy": float(records["correct"].mean()),
            "cross_entropy": float(records["cross_entropy"].mean()),
            "count": count,
        },
        "attacks": attacks,
        "jacobian": {fn: _jacobian_summary(records, fn) for fn in ("logits", "probabilities")},
    }


def _jacobian_summary(records: pd.DataFrame, fn: str) -> dict[str, dict[str, float]]:
    def statistics(values):
        return {
            "mean": float(values.mean()),
            "median": float(values.median()),
            "standard_error": float(values.sem()),
        }

    summary = {norm: statistics(records[f"{norm}_{fn}"]) for norm in ("frobenius", "spectral")}
    if fn == "logits":
        summary["frobenius_estimate"] = {
            **statistics(records["frobenius_estimate_logits"]),
            "mean_error_of_estimate": float(records["frobenius_estimate_error_logits"].mean()),
        }
    return summary


def _measurement(network: Network, settings: Settings, key: jax.Array) -> Callable:
    estimate_key, spectral_key = (_named_key(key, name) for name in ("estimate", "spectral"))

    def measure(variables, batch):
        def logits_fn(x):
            return network(variables, x)

        x, y, index = data.to_pixels(batch["image"]), batch["label"], batch["index"]
        logits = logits_fn(x)
        estimate = jacobian.frobenius_norm_estimate(
            logits_fn,
            x,
            fold_in_each(estimate_key, index),
            num_projections=settings.jacobian_projections,
            chunk_size=settings.jacobian_chunk,
        )
        norms_of = {}
        for name, fn in (
            ("logits", logits_fn),
            ("probabilities", jacobian.probabilities(logits_fn)),
        ):
            norms_of[f"frobenius_{name}"] = jacobian.frobenius_norm(
                fn, x, chunk_size=settings.jacobian_chunk
            )
            norms_of[f"spectral_{name}"] = jacobian.spectral_norm(
                fn,
                x,
                fold_in_each(spectral_key, index),
                num_iterations=settings.spectral_iterations,
                chunk_size=settings.jacobian_chunk,
            )
        return {
            "prediction": jnp.argmax(logits, -1),
            "correct": losses.correct(logits, y),
            "cross_entropy": losses.cross_entropy(logits, y),
            "margin": losses.margin(logits, y),
            "confidence": losses.confidence(logits, y),
            "entropy": losses.entropy(logits),
            **norms_of,
            "frobenius_estimate_logits": estimate.norm,
            "frobenius_estimate_error_logits": estimate.standard_error,
        }

    return measure


def _attempt(network: Network, grid: AttackGrid, key: jax.Array) -> Callable:
    size = num_changed if grid.norm == "l0" else partial(norms.size, norm=grid.norm)

    def attempt(variables, batch, eps):
        def logits_fn(x):
            return network(variables, x)

        x, y = data.to_pixels(batch["image"]), batch["label"]
        x_adv = grid.attack(logits_fn, x, y, fold_in_each(key, batch["index"]), eps=eps)
        logits = logits_fn(x_adv)
        return {
            "held": losses.correct(logits, y).astype(bool),
            "distance": jax.vmap(size)(x_adv - x),
            "x_adv": x_adv,
            "adversarial_prediction": jnp.argmax(logits, -1),
        }

    return attempt


def _named_key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
