"""One call that gives the whole verdict on a network of any framework."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from robust_jax import _checks, data, losses, margins
from robust_jax._audit import Audit
from robust_jax._front import Mapper, on_the_host
from robust_jax._network import Network, has_forward_mode
from robust_jax._outputs import doubts
from robust_jax.app import cards, stored
from robust_jax.app import folder as run_folder
from robust_jax.app import records as records_lib
from robust_jax.app.evaluator import AttackGrid, AuditSettings, Evaluator, Settings
from robust_jax.app.results import audit_to_json, compose, versions
from robust_jax.attacks import autoattack
from robust_jax.attacks._autoattack import ensemble_of, values_of_losses, values_of_norm, written
from robust_jax.attacks._square import check_images, square
from robust_jax.attacks.norms import Norm, ThreatModel, threat_model
from robust_jax.batches import Lift
from robust_jax.errors import UserError
from robust_jax.losses import Loss
from robust_jax.types import LogitsFn

_LEFT = {"unfinished", "records", "report.html", "card.json"}  # may exist without results.json
_RECOGNISED_BY = 8  # examples whose margins identify a network


class Evaluation(NamedTuple):
    """What an evaluation found on N examples.

    clean_accuracy and robust_accuracy: shares of the N, the second under AutoAttack at the first
    radius; summary["attacks"] has every radius. records: a row for each example, with its margins,
    Jacobian norms and fate. summary: the means of the records, as results.json holds them. audit:
    None if none was asked for, or no example is classified correctly. card: RobustBench's fields.
    warnings: reasons to doubt the numbers, as sentences.
    """

    clean_accuracy: float
    robust_accuracy: float
    records: pd.DataFrame
    summary: dict[str, Any]
    audit: Audit | None
    card: dict[str, Any] | None
    warnings: tuple[str, ...]


@on_the_host
def evaluate(
    logits_fn: LogitsFn,
    x: Any,
    y: Any,
    key: jax.Array,
    *,
    eps: float | tuple[float, ...],
    norm: Norm = "linf",
    version: str | tuple[str, ...] = "standard",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    training_loss: Loss | None = None,
    surrogates: Mapping[str, LogitsFn] | None = None,
    num_audited: int = 200,
    num_queries: int = 1000,
    batch_size: int = 128,
    folder: str | os.PathLike | None = None,
    name: str = "model",
    dataset: str = "data",
    progress: bool = True,
) -> Evaluation:
    """Clean accuracy, AutoAttack, the audit, Jacobian norms and margins of a network.

    Args:
        logits_fn: The network, [B,H,W,C] in [0,1] -> [B,K].
        x: The examples [N,H,W,C], pixels in [0,1].
        y: Their labels [N].
        key: One key; an example's randomness depends on it and on the place in x.
        eps: The radius of the threat model, in pixel units, or several. The headline and the audit
            use the first. A larger one is tried only on what held at the smaller ones.
        norm: The threat model's norm, a name or a record.
        version: AutoAttack's version, or the names of its members.
        overrides: Keywords for members of AutoAttack by name.
        training_loss: The loss that the network was trained with, for the audit.
        surrogates: Other networks for the same task, for the audit. Give an undefended one.
        num_audited: How many of the first examples are audited; 0 for no audit.
        num_queries: The budget of the audit's random search.
        batch_size: How many examples are in memory at a time.
        folder: Where to save records/best.csv, card.json, results.json and report.html. Repeat a
            stopped call to continue where it left off.
        name: What the model is called in the card and on the page.
        dataset: What the data are called there.
        progress: Whether to show progress bars.

    Returns:
        The numbers, the records of each example, the audit and the card.

    Raises:
        ValueError: An argument is not as described; the message says what to do.
        UserError: The folder holds something else.

    Example:
        >>> import jax, jax.numpy as jnp, robust_jax
        >>> weights = jax.random.normal(jax.random.key(0), (12, 3))
        >>> logits_fn = lambda x: x.reshape(len(x), -1) @ weights
        >>> x = jax.random.uniform(jax.random.key(1), (20, 2, 2, 3))
        >>> y = logits_fn(x).argmax(-1)
        >>> found = robust_jax.evaluate(logits_fn, x, y, jax.random.key(2), eps=0.01,
        ...                             version=("apgd_ce",), num_queries=10, progress=False)
        >>> found.clean_accuracy
        1.0
    """
    start = time.perf_counter()
    radii = tuple(np.atleast_1d(eps).tolist()) if np.ndim(eps) else (eps,)
    for radius in radii:
        _checks.length("eps", radius)
    radii = tuple(float(radius) for radius in radii)
    threat = threat_model(norm)
    _check_settings(radii, version, num_audited, num_queries, batch_size, folder)
    members = ensemble_of(norm=norm, version=version, overrides=overrides)
    x = np.asarray(_checks.pixels(x))
    y = _checks.one_row_each(y, x)
    if any(member.attack is square for member in members.values()):
        check_images(x.shape[1:])
    network = _checks.network(logits_fn, x)
    num_classes = _checks.num_classes(network)
    forwards = _has_forward_mode(network, x)
    _checks.labels(y, num_classes)
    key = _checks.key(key, len(x))
    if key.ndim:
        raise ValueError(f"key has the shape {list(key.shape)}; give one key")
    unfinished, digest = None, ""
    if folder is not None:
        folder = Path(folder)
        said = (written(overrides), *values_of_losses(overrides or {}, num_classes))
        digest = _digest(x, y, key, threat, radii, version, *said)
        _claim(folder, name, digest, logits_fn, x, y)
        unfinished = folder / "unfinished" / digest
        unfinished.mkdir(parents=True, exist_ok=True)
    attack = f"autoattack_{threat.name}"
    run = partial(autoattack, norm=norm, version=version, overrides=overrides, progress=progress)
    grid = AttackGrid("autoattack", run, threat.name, radii, members=tuple(members))
    mapper = Mapper(network, batch_size, len(x))
    # On all examples: AutoAttack sees only those that are classified correctly.
    warnings = doubts(logits_fn, x, mapper(_logits)({"x": x}))
    evaluator = Evaluator(
        lambda _: logits_fn,
        _lift(mapper),
        data.Split(x, np.asarray(y, np.int32)),
        {attack: grid},
        Settings(
            batch_size=batch_size,
            jacobian_chunk=batch_size,
            jacobian_projections=16 if forwards else 0,
            spectral_iterations=20 if forwards else 0,
            num_images=0,
        ),
        key,
        warnings.append,
        shown=progress,
    )
    records = evaluator.records(network, "evaluate", unfinished)
    records["input_margin"] = evaluator.on_all(network, _InputMargin(norm))
    audited: Audit | None = None
    if num_audited:
        settings = AuditSettings(norm, radii[0], num_audited, num_queries, training_loss)
        audited = evaluator.audit(network, settings, surrogates or {})
    about = {
        "title": f"{dataset}, {name}",
        "threat": {"norm": threat.name, "eps": radii[0]},
        "trained_against": None,
        "config": {"attacks": {attack: {"version": version, "overrides": written(overrides)}}},
        "data": {
            "name": dataset,
            "test": len(x),
            "num_classes": num_classes,
            "image_shape": list(x.shape[1:]),
        },
        "model": {"name": name, "parameters": sum(np.size(a) for a in network.arrays)},
        "versions": versions("jax", "jaxlib", "numpy"),
    }
    results = {
        **compose({"best": records}, {attack: grid}, about),
        "audit": None if audited is None else audit_to_json(audited),
        "warnings": warnings,
        "timings": {"evaluate_seconds": time.perf_counter() - start},
        "evaluated": digest,
    }
    if folder is not None:
        run_folder.write_evaluation(folder, results, {"best": records})
    summary = results["best"]
    clean = summary["clean"]["accuracy"]
    robust = next(a["robust_accuracy"] for a in summary["attacks"] if a["eps"] == radii[0])
    return Evaluation(
        clean, robust, records, summary, audited, cards.card(results), tuple(warnings)
    )


def _check_settings(radii, version, num_audited, num_queries, batch_size, folder) -> None:
    """Raises ValueError for mistakes that would show only after hours of AutoAttack, or never."""
    if not radii or not min(radii) > 0:
        raise ValueError(f"eps is {radii}; give a radius above 0, or several")
    if version == "rand":
        raise ValueError('evaluate is for deterministic networks; version="rand" is autoattack\'s')
    if not isinstance(num_audited, int | np.integer) or num_audited < 0:
        raise ValueError(f"num_audited is {num_audited!r}; it must be an integer, 0 or more")
    _checks.counts(num_queries=num_queries, batch_size=batch_size)
    if folder is not None and Path(folder).is_file():
        raise ValueError(f"folder is {str(folder)!r}, which is a file")


def _claim(folder: Path, name: str, digest: str, logits_fn: LogitsFn, x, y) -> None:
    """Checks that the folder holds nothing, or this evaluation, finished or not.

    Margins tell it from another network's evaluation under the same name.
    """
    found = stored.holds(folder)
    names = {path.name for path in folder.iterdir()} if found == "other files" else set()
    whole = {name for name in names if not name.endswith(".pending")}
    begun = "unfinished" in names and whole <= _LEFT  # even if stopped while it wrote
    if found == "an evaluation":
        old = stored.results(folder)
        is_same = old.get("evaluated") == digest and old["model"]["name"] == name
        if is_same:
            records = records_lib.read(folder / "records" / "best.csv")
            known = records["margin"][:_RECOGNISED_BY].to_numpy()
            logits = logits_fn(jnp.asarray(x[:_RECOGNISED_BY]))
            found_now = losses.margin(logits, jnp.asarray(y[:_RECOGNISED_BY], jnp.int32))
            slack = 0.01 * np.abs(known[np.isfinite(known)]).max(initial=0.0)
            is_same = np.allclose(found_now, known, rtol=0.01, atol=slack, equal_nan=True)
        if not is_same:
            raise UserError(f"{folder} holds an evaluation of something else; give another folder")
    elif found != "nothing" and not begun:
        raise UserError(f"{folder} holds {found}; give another folder")


def _has_forward_mode(network: Network, x: np.ndarray) -> bool:
    """Whether the network has forward mode; raises ValueError if it has no derivative at all."""
    image = jnp.asarray(x[:1])
    try:
        jax.eval_shape(jax.grad(lambda image: network(image).sum().astype(jnp.float32)), image)
        return has_forward_mode(network, image)
    except ValueError as error:
        raise ValueError(
            "the network leaves JAX and has no gradient there, which margins and Jacobians need; "
            'attacks.autoattack(…, version=("square",)) does without'
        ) from error


def _digest(
    x: np.ndarray, y: np.ndarray, key: jax.Array, threat: ThreatModel, *settings: Any
) -> str:
    """Names what is evaluated, apart from the network."""
    # Two norms may have the same name, so their values count as well.
    about = (threat.name, *values_of_norm(threat, x[0]), *settings)
    found = hashlib.sha256(repr(about).encode())
    for array in (x, y, jax.random.key_data(key)):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _logits(logits_fn, rows):
    return logits_fn(rows["x"])


@dataclasses.dataclass(frozen=True)
class _InputMargin:
    norm: Norm

    def __call__(self, logits_fn, rows, key_data):
        del key_data
        return margins.first_order(logits_fn, rows["image"], rows["label"], norm=self.norm)


def _lift(mapper: Mapper) -> Lift:
    """Lifts functions of the mapper's network, as an Evaluator expects."""

    def lift(fn):
        return lambda _, *rows_and_scalars: mapper.on_rows(fn, *rows_and_scalars)

    return lift
