"""What results.json holds: how a run was made, and the means over its records."""

import math
import platform
import subprocess
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pandas as pd

from robust_jax import __version__
from robust_jax._audit import Audit
from robust_jax.analysis.calibration import TEMPERATURES
from robust_jax.app import records as records_lib
from robust_jax.app import stored
from robust_jax.app.evaluator import AttackGrid
from robust_jax.app.records import column, worst_case


def compose(
    tables: Mapping[str, pd.DataFrame],
    grids: Mapping[str, AttackGrid],
    about: Mapping[str, Any],
    *,
    steps: Mapping[str, int] = MappingProxyType({}),
    temperatures: Mapping[str, float] = MappingProxyType({}),
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """Summarises the records of best and, if evaluated, last, and says what they are about.

    about: config, data, model, threat and the like, as results.json has them. temperatures: each
    checkpoint's, on held-out images. kept: the attacks whose results come from an earlier
    evaluation.
    """
    summaries = {
        name: {
            "step": steps.get(name, 0),
            **summarize(table, grids, kept, temperatures.get(name)),
        }
        for name, table in tables.items()
    }
    return {"checkpoint": "best", **summaries["best"], **summaries, **about, "device": device()}


def versions(*packages: str) -> dict[str, str]:
    """The versions of this package, with its commit if known, of Python and of the packages."""
    own = {"robust_jax": __version__} | ({"commit": found} if (found := commit()) else {})
    others = {name: metadata.version(name) for name in packages}
    return {**own, "python": platform.python_version(), **others}


def commit(file: Path = Path(__file__)) -> str:
    """The commit of the git checkout that holds the file, with "-dirty" if files were changed.

    Empty if there is no git, or if it does not track the file, as in an installed package.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return ""


def device() -> dict[str, Any]:
    """The devices that computed the results."""
    first = jax.devices()[0]
    # None is JAX's default, which multiplies in TF32 on a GPU.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # declared at run time
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "matmul_precision": precision,
    }


def audit_to_json(audit: Audit) -> dict[str, Any]:
    """An audit as results.json holds it; None stands for a number that is not finite."""
    checks = [
        {
            **check._asdict(),
            "values": {k: v if np.isfinite(v) else None for k, v in check.values.items()},
        }
        for check in audit.checks
    ]
    return {**audit._asdict(), "checks": checks}


def validations(workdir: Path) -> dict[str, dict[str, float]]:
    """The metrics of the first, the best and the last validation."""
    metrics = stored.metrics(workdir).dropna(subset=["validation/cross_entropy"])
    columns = [name for name in metrics if name.startswith("validation/")]
    # As in training: the earlier on a tie, never the untrained network, logged for its margins.
    trained = metrics["validation/robust_accuracy"].where(metrics["step"] > 0, -np.inf)
    best = int(trained.argmax())
    return {
        when: {
            name.partition("/")[2]: float(value)
            for name, value in metrics[columns].iloc[i].items()
            if np.isfinite(value)
        }
        for when, i in (("first", 0), ("best", best), ("last", -1))
    }


def summarize(
    records: pd.DataFrame,
    grids: Mapping[str, AttackGrid],
    kept: Collection[str] = (),
    temperature: float | None = None,
) -> dict[str, Any]:
    """The means over a table of records: clean, attacks[] and jacobian, as results.json has them.

    The worst case of a norm at an eps is over every attack in that norm with a radius up to eps. It
    is given at the radii and on the examples of the attacks that saw the most. If an attack saw
    fewer, there is also a worst case on those, on which all attacks can be compared.
    kept: the attacks of an earlier evaluation.
    temperature: what the logits are divided by for jacobian.matched, so that networks are equally
    confident.
    """
    attacks = []
    for name, grid in grids.items():
        for eps in sorted(grid.eps):
            held = records_lib.held(records, name, eps).dropna()
            right = records["correct"].astype(bool)
            distance = records[column(name, eps, "distance")][right].mean()
            attacks.append(
                {
                    "name": name,
                    "attack": grid.kind,
                    "norm": grid.norm,
                    "eps": eps,
                    "robust_accuracy": float(held.mean()),
                    "count": len(held),
                    "mean_distance": None if np.isnan(distance) else float(distance),
                    **({"earlier": True} if name in kept else {}),
                    **({"members": _members(records, name, grid, eps)} if grid.members else {}),
                }
            )
    for norm in dict.fromkeys(grid.norm for grid in grids.values()):
        of_norm = {name: grid for name, grid in grids.items() if grid.norm == norm}
        sizes = {name: _count(records, name, grid) for name, grid in of_norm.items()}
        for count in sorted(set(sizes.values()), reverse=True):
            part = "" if count == max(sizes.values()) else f"_first_{count}"
            seen = [grid.eps for name, grid in of_norm.items() if sizes[name] >= count]
            for eps in sorted({eps for radii in seen for eps in radii}):
                held = worst_case(records[:count], of_norm, eps)
                attacks.append(
                    {
                        "name": f"worst_case_{norm}{part}",
                        "attack": "worst_case_of_first" if part else "worst_case",
                        "norm": norm,
                        "eps": eps,
                        "robust_accuracy": float(held.mean()),
                        "count": count,
                        "mean_distance": None,
                    }
                )
    return {
        "clean": {
            "accuracy": float(records["correct"].mean()),
            "cross_entropy": float(records["cross_entropy"].mean()),
            "count": len(records),
        },
        "attacks": attacks,
        "jacobian": {
            **{fn: _jacobian_summary(records, fn) for fn in ("logits", "probabilities")},
            **({} if temperature is None else {"matched": _matched(records, temperature)}),
        },
        "temperature": temperature,
        **(
            {"relative_slope": _statistics(records["relative_slope"])}
            if "relative_slope" in records  # older versions lack it
            else {}
        ),
    }


def _count(records: pd.DataFrame, name: str, grid: AttackGrid) -> int:
    """How many of the first examples were attacked."""
    return int(records_lib.held(records, name, grid.eps[0]).notna().sum())


def _members(records: pd.DataFrame, name: str, grid: AttackGrid, eps: float) -> dict[str, float]:
    """AutoAttack's robust accuracy after "clean" and after each of its members."""
    attacked = records_lib.held(records, name, eps).notna()
    broken_by = records.loc[attacked, column(name, eps, "broken_by")].fillna("")
    standing, shares = len(broken_by), {}
    for member in ("clean", *grid.members):
        standing -= int((broken_by == member).sum())
        shares[member] = standing / len(broken_by)
    return shares


def _statistics(values: pd.Series) -> dict[str, float | None]:
    """Mean, median and standard error; None for what is not finite."""
    error = math.inf if np.isinf(values).any() else values.sem()  # pandas warns of inf - inf
    found = {"mean": values.mean(), "median": values.median(), "standard_error": error}
    return {name: float(v) if np.isfinite(v) else None for name, v in found.items()}


def _matched(records: pd.DataFrame, temperature: float) -> dict[str, dict[str, float | None]]:
    """Norms of the Jacobian of logits / temperature; None if the temperature is at a limit."""
    low, high = TEMPERATURES
    divisor = temperature if 1.001 * low < temperature < high / 1.001 else np.nan
    return {
        norm: _statistics(records[f"{norm}_logits"] / divisor) for norm in ("frobenius", "spectral")
    }


def _jacobian_summary(records: pd.DataFrame, fn: str) -> dict[str, dict[str, float | None]]:
    summary = {norm: _statistics(records[f"{norm}_{fn}"]) for norm in ("frobenius", "spectral")}
    if fn == "logits" and "frobenius_estimate_logits" in records:
        summary["frobenius_estimate"] = {
            **_statistics(records["frobenius_estimate_logits"]),
            "mean_error_of_estimate": float(records["frobenius_estimate_error_logits"].mean()),
        }
    return summary
