"""Attacks × eps and Jacobian norms on a test set: one record per example, and their summary.

Random draws depend on (seed, attack, example), never on the batch or the device.
"""

import copy
import dataclasses
import zlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import logging

from robust_jax import audit, data, jacobian, losses
from robust_jax._audit import Audit
from robust_jax._precision import wide
from robust_jax.analysis import calibration
from robust_jax.app.records import What, column
from robust_jax.attacks import distances
from robust_jax.attacks._autoattack import doubt_about_square
from robust_jax.attacks.norms import Norm
from robust_jax.batches import Lift, bound
from robust_jax.devices import processes
from robust_jax.errors import NothingToAudit, UnusableState
from robust_jax.files import UNREADABLE_NPZ, save_arrays
from robust_jax.keys import fold_each, fold_in_each
from robust_jax.progress import progress_bar
from robust_jax.types import LogitsFn


class AttackGrid(NamedTuple):
    """attack(logits_fn, x, y, keys, eps=…) -> x_adv, its kind by name, its norm and its radii.

    num_examples: how many of the split's first examples are attacked; None for all. members:
    AutoAttack's, in their order; it returns an AutoAttackResult. Other attacks have none.
    surrogate: the folder of the run whose network is attacked instead, or "train"; "" for none.
    """

    kind: str
    attack: Callable
    norm: str
    eps: tuple[float, ...]
    num_examples: int | None = None
    members: tuple[str, ...] = ()
    surrogate: str = ""


class Settings(NamedTuple):
    """How a test set is measured; the chunk bounds the Jacobians that a device holds at a time.

    jacobian_projections: 0 for no estimate. spectral_iterations: 0 for the exact spectral norm.
    """

    batch_size: int
    jacobian_chunk: int
    jacobian_projections: int
    spectral_iterations: int
    num_images: int


class AuditSettings(NamedTuple):
    """The threat model and the size of an audit; the loss the network was trained with."""

    norm: Norm
    eps: float
    num_examples: int
    num_queries: int
    training_loss: losses.Loss | None


class Evaluator:
    """Compiled measurements of a network on a split; the network's variables are arguments.

    logits_fn(variables) is the network for what runs on one device; lift maps functions of the
    network over all devices; warn receives warnings; shown: whether to show progress bars.
    """

    def __init__(
        self,
        logits_fn: Callable[[Any], LogitsFn],
        lift: Lift,
        split: data.Split,
        grids: Mapping[str, AttackGrid],
        settings: Settings,
        key: jax.Array,
        warn: Callable[[str], None] = logging.warning,
        *,
        shown: bool = True,
    ):
        self.logits_fn, self._lift, self._warn, self._shown = logits_fn, lift, warn, shown
        self._split, self._grids, self._settings, self._key = split, grids, settings, key
        # The key is an argument of the compiled programs, which serve every seed.
        self._key_data = np.asarray(jax.random.key_data(key))
        self._key_impl = jax.random.key_impl(key)

    def with_grids(self, grids: Mapping[str, AttackGrid]) -> "Evaluator":
        """A copy with other attacks."""
        other = copy.copy(self)
        other._grids = grids
        return other

    def temperature(self, variables: Any, held_out: data.Split) -> float:
        """The temperature that minimises cross-entropy on held-out images."""
        rows = data.rows_of(held_out, np.arange(held_out.size))
        logits = self._lift(_logits)(variables, held_out.size, *rows, self._key_data)
        return calibration.temperature(logits, held_out.labels)

    def records(
        self,
        variables: Any,
        description: str,
        unfinished: Path | None = None,
        *,
        without: Collection[str] = (),
    ) -> pd.DataFrame:
        """One row per example of the split: measures, and whether it held for each attack and eps.

        An example broken at an eps stays broken, with the same adversarial, at every larger eps
        (the balls are nested), so an attack sees only the examples that still stand. unfinished: a
        folder in which each pass saves its results, and AutoAttack its state, to resume from.
        without: attacks to leave out.
        """
        count = len(self._split.labels)
        index = np.arange(count)
        grids = {name: grid for name, grid in self._grids.items() if name not in without}
        work = 2 + sum(len(grid.eps) for grid in grids.values())
        done = _Unfinished(
            None if unfinished is None else unfinished / "records.npz",
            lambda: self.on_all(variables, _logits),
        )
        with progress_bar(work, description, "pass", shown=self._shown) as bar:
            columns = done.columns()
            if "key" not in columns:
                columns = self._measure(variables, index)
                columns["correct"] = columns["correct"].astype(bool)
                columns["key"] = hexadecimal(fold_in_each(self._key, jnp.asarray(index)))
                done.save(columns)
            bar.update(2)
            for name, grid in grids.items():
                attacked = index < (grid.num_examples or count)
                held = pd.array(np.where(attacked, columns["correct"], None), dtype="boolean")
                found: dict[What, np.ndarray] = {
                    "distance": np.where(attacked & ~columns["correct"], 0.0, np.nan),
                    "margin": np.where(attacked, columns["margin"], np.nan),
                }
                if grid.members:
                    wrong = attacked & ~columns["correct"]
                    found["broken_by"] = np.where(wrong, "clean", "").astype(object)
                for eps in sorted(grid.eps):
                    bar.set_postfix_str(f"{name} at eps {eps:g}", refresh=False)
                    if column(name, eps, "held") in columns:
                        held = columns[column(name, eps, "held")].copy()
                        found = {what: columns[column(name, eps, what)].copy() for what in found}
                        bar.update()
                        continue
                    standing = np.flatnonzero(held.fillna(False))
                    if len(standing):
                        if grid.members:
                            out = self._autoattack(variables, name, standing, eps, unfinished)
                        else:
                            out = self._attack(variables, name, standing, eps)
                        held[standing] = out["held"].astype(bool)
                        for what, values in found.items():
                            values[standing] = out[what]
                        found["distance"][standing[out["held"]]] = np.nan
                    columns[column(name, eps, "held")] = held.copy()
                    for what, values in found.items():
                        columns[column(name, eps, what)] = values.copy()
                    done.save(columns)
                    bar.update()
        return pd.DataFrame({"index": index, "label": self._split.labels, **columns})

    def audit(self, variables: Any, settings: AuditSettings, surrogates: Mapping) -> Audit | None:
        """The audit on the split's first examples; None, with a warning, if none is correct."""
        images, labels = self._split.take(
            np.arange(len(self._split.labels))[: settings.num_examples]
        )
        try:
            return audit(
                self.logits_fn(variables),
                np.asarray(data.to_pixels(images)),
                labels,
                _named_key(self._key, "audit"),
                eps=settings.eps,
                norm=settings.norm,
                training_loss=settings.training_loss,
                surrogates=surrogates,
                num_queries=settings.num_queries,
                batch_size=self._settings.batch_size,
                map_examples=bound(self._lift, variables, len(labels)),
                progress=self._shown,
            )
        except NothingToAudit as error:
            self._warn(f"no audit: {error}")
            return None

    def on_all(self, variables: Any, fn: Callable) -> Any:
        """fn(logits_fn, batch, key_data) on all examples."""
        size = self._split.size
        return self._on(variables, fn, size, np.arange(size))

    def _on(self, variables: Any, fn: Callable, most: int, index: np.ndarray, *scalars: Any) -> Any:
        """Like `on_all`, with scalars, on the examples of the index, at most `most` of them."""
        rows = data.rows_of(self._split, index)
        return self._lift(fn)(variables, most, *rows, self._key_data, *scalars)

    def _measure(self, variables: Any, index: np.ndarray) -> dict[str, Any]:
        measurement = Measurement(self._settings, self._key_impl)
        return self._on(variables, measurement, self._split.size, index)

    def _attack(self, variables: Any, name: str, index: np.ndarray, eps: float) -> dict:
        grid = self._grids[name]
        attempt = Attempt(grid.attack, grid.norm, name, self._key_impl)
        return self._on(variables, attempt, self._num_attacked(grid), index, eps)

    def _num_attacked(self, grid: AttackGrid) -> int:
        return min(grid.num_examples or self._split.size, self._split.size)

    def _autoattack(self, variables, name, standing, eps, unfinished) -> dict[str, np.ndarray]:
        images, labels = self._split.take(standing)
        state_path = None if unfinished is None else unfinished / f"{name}@{eps:g}.npz"
        attack = partial(
            self._grids[name].attack,
            self.logits_fn(variables),
            data.to_pixels(images),
            labels,
            _attack_keys(self._key, name, standing),
            eps=eps,
            state_path=state_path,
            map_examples=bound(self._lift, variables, self._num_attacked(self._grids[name])),
        )
        try:
            result = attack()
        except UnusableState as error:  # a borderline example may differ on other devices
            self._warn(f"{error}; starting over")
            result = attack(state_path=None)
        # AutoAttack saw only what held at smaller radii: restate its doubt as a share of all.
        of_these = doubt_about_square(result.robust_accuracy)
        share = len(standing) / self._num_attacked(self._grids[name])
        of_all = doubt_about_square(result.robust_accuracy, share)
        for warning in (*(w for w in result.warnings if w not in of_these), *of_all):
            self._warn(f"{name} at eps {eps:g}: {warning}")
        return {
            "held": result.robust,
            "distance": np.asarray(wide(result.distance)),
            "margin": np.asarray(wide(result.margin)),
            "broken_by": result.broken_by,
        }

    def images(
        self, variables: Any, name: str, eps: float, index: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The first examples that an attack breaks, clean and attacked; {} if there are none."""
        index = index[: 4 * self._settings.num_images]
        if not len(index):
            return {}
        out = self._attack(variables, name, index, eps)
        broken = np.flatnonzero(~out["held"])[: self._settings.num_images]
        if not len(broken):
            return {}
        index, out = index[broken], {what: values[broken] for what, values in out.items()}
        measures = self._measure(variables, index)
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


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Measures each example, by column: outputs, losses and norms of the Jacobian."""

    settings: Settings
    key_impl: Any = None

    def __call__(self, logits_fn, batch, key_data):
        settings = self.settings
        key = jax.random.wrap_key_data(key_data, impl=self.key_impl)
        estimate_key, spectral_key = (_named_key(key, name) for name in ("estimate", "spectral"))
        x, y, index = data.to_pixels(batch["image"]), batch["label"], batch["index"]
        logits = wide(logits_fn(x))
        norms_of = {}
        for name, fn in (
            ("logits", logits_fn),
            ("probabilities", jacobian.probabilities(logits_fn)),
        ):
            norms_of[f"frobenius_{name}"] = jacobian.frobenius_norm(
                fn, x, chunk_size=settings.jacobian_chunk
            )
            if not settings.spectral_iterations:
                values = jacobian.singular_values(fn, x, chunk_size=settings.jacobian_chunk)
                norms_of[f"spectral_{name}"] = values[:, 0]
                continue
            norms_of[f"spectral_{name}"] = jacobian.spectral_norm(
                fn,
                x,
                fold_in_each(spectral_key, index),
                num_iterations=settings.spectral_iterations,
                chunk_size=settings.jacobian_chunk,
            )
        estimates = {}
        if settings.jacobian_projections:
            estimate = jacobian.frobenius_norm_estimate(
                logits_fn,
                x,
                fold_in_each(estimate_key, index),
                num_projections=settings.jacobian_projections,
                chunk_size=settings.jacobian_chunk,
            )
            estimates["frobenius_estimate_logits"] = estimate.norm
            estimates["frobenius_estimate_error_logits"] = estimate.standard_error
        return {
            "prediction": jnp.argmax(logits, -1),
            "correct": losses.correct(logits, y),
            "cross_entropy": losses.cross_entropy(logits, y),
            "margin": losses.margin(logits, y),
            "confidence": losses.confidence(logits, y),
            "top_probability": jax.nn.softmax(logits).max(-1),
            "entropy": losses.entropy(logits),
            **norms_of,
            "relative_slope": jacobian.relative_slope(
                logits_fn, x, y, chunk_size=settings.jacobian_chunk
            ),
            **estimates,
        }


@dataclasses.dataclass(frozen=True)
class Attempt:
    """An attack and its outcome for each example; equal ones share one program."""

    attack: Callable
    norm: str
    name: str
    key_impl: Any = None

    def __call__(self, logits_fn, batch, key_data, eps):
        key = jax.random.wrap_key_data(key_data, impl=self.key_impl)
        x, y = data.to_pixels(batch["image"]), batch["label"]
        keys = _attack_keys(key, self.name, batch["index"])
        x_adv = self.attack(logits_fn, x, y, keys, eps=eps)
        logits = wide(logits_fn(x_adv))
        return {
            "held": losses.correct(logits, y).astype(bool),
            "distance": wide(distances(x, x_adv, norm=self.norm)),
            "margin": losses.margin(logits, y),
            "x_adv": x_adv,
            "adversarial_prediction": jnp.argmax(logits, -1),
        }


def _attack_keys(key: jax.Array, name: str, index) -> jax.Array:
    """Each example's key, as the records show it, folded with the attack's name."""
    return fold_each(fold_in_each(key, jnp.asarray(index)), zlib.crc32(name.encode()))


def hexadecimal(keys: jax.Array) -> list[str]:
    """Each key's data in hexadecimal; `attacks` take jax.random.wrap_key_data of the words."""
    return ["".join(f"{word:08x}" for word in words) for words in jax.random.key_data(keys)]


def _named_key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _logits(logits_fn, batch, key_data):
    del key_data
    return wide(logits_fn(data.to_pixels(batch["image"])))


class _Unfinished:
    """What a stopped evaluation of the same network saved, and what this one saves.

    Logits identify the network. path: None to save nothing.
    """

    def __init__(self, path: Path | None, logits: Callable[[], np.ndarray]):
        self._path = path
        self._logits = np.empty(0) if path is None else logits()

    def columns(self) -> dict[str, Any]:
        """The saved columns; none if they cannot be read or belong to another network."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                columns: dict[str, Any] = dict(archive)
        except UNREADABLE_NPZ:
            return {}
        before, now = columns.pop("logits"), self._logits
        if before.shape != now.shape or not np.allclose(
            before, now, rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            return {}
        for name, values in columns.items():
            if name.endswith("/held"):
                columns[name] = pd.array(np.where(values < 0, None, values == 1), dtype="boolean")
            elif values.dtype.kind == "U":
                columns[name] = values.astype(object)
        return columns

    def save(self, columns: dict[str, Any]) -> None:
        """Saves the columns for the next call."""
        if self._path is None or not processes.is_first():
            return
        arrays = {
            name: values.to_numpy("int8", na_value=-1)
            if name.endswith("/held")
            else np.asarray(values)
            for name, values in columns.items()
        }
        arrays = {k: v.astype(str) if v.dtype == object else v for k, v in arrays.items()}
        save_arrays(self._path, logits=self._logits, **arrays)
