"""What a run, a study or `robust_jax.evaluate` left in its folder: config, results, records.

launch.py uses the stored config if it is given none; tables are pandas', arrays numpy's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from robust_jax.app import records
from robust_jax.errors import UserError
from robust_jax.files import write_json

RUN, STUDY = "config.json", "study.json"
Holds = Literal["nothing", "a run", "a study", "an evaluation", "other files"]
Results = Mapping[str, Any]
# The version of results.json, which goes up when older readers would misread it. A file without
# one has version 0, which reads like 1.
SCHEMA = 1


class Run(NamedTuple):
    """Records of best and, if evaluated, last; a row per line of metrics.jsonl; images, if any."""

    records: dict[str, pd.DataFrame]
    metrics: pd.DataFrame
    images: dict[str, np.ndarray] | None


class Evidence(NamedTuple):
    """A finished run: results.json, and where known its best checkpoint's records and arrays."""

    results: Mapping[str, Any]
    records: pd.DataFrame | None = None
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})


def holds(workdir: Path) -> Holds:
    """What is in the folder, by its config; "an evaluation" is what `robust_jax.evaluate` left."""
    if (workdir / RUN).exists() and "dataset" in _read(workdir / RUN):
        return "a run"
    if (workdir / STUDY).exists():
        return "a study"
    # Another process may be about to write the first file.
    if not workdir.is_dir() or all(path.suffix == ".pending" for path in workdir.iterdir()):
        return "nothing"
    results = workdir / "results.json"
    if not results.exists():
        return "other files"
    # Studies once had no config of their own.
    return "a study" if "claims" in _read(results) else "an evaluation"


def no_run(workdir: Path) -> UserError:
    """The error that the folder holds no run, with what to do."""
    return UserError(
        f"{workdir} holds {holds(workdir)} and no run; train one with launch.py (`make demo` "
        "does), or name the folder of a finished one"
    )


def config_of(workdir: Path) -> ConfigDict | None:
    """The config that a run or a study was made with; None where there is none."""
    name = {"a run": RUN, "a study": STUDY}.get(holds(workdir))
    if name is None or not (workdir / name).exists():
        return None
    return from_json(_upgraded(_read(workdir / name)))


def from_json(tree: dict[str, Any]) -> ConfigDict:
    """Restores a config from JSON, with tuples and with a study's arms in their order."""
    config = ConfigDict(_with_tuples(tree))
    for field in {"arms", "claims"} & set(tree):
        config[field] = ConfigDict(_with_tuples(tree[field]), sort_keys=False)
    return config


def get_config(workdir: str) -> ConfigDict:
    """The config for --config=…/stored.py:WORKDIR, which launch.py adds if --config is missing."""
    config = config_of(Path(workdir))
    if config is None:
        raise UserError(f"{workdir} holds {holds(Path(workdir))}")
    return config


def is_finished(workdir: Path) -> bool:
    """Whether a run has its results, which it writes last except for its page."""
    return (workdir / "results.json").exists()


def results(workdir: Path | str) -> dict[str, Any]:
    """Reads the results.json of a run or a study.

    Raises OSError if it is not finished, UserError if a newer version wrote it.
    """
    found = json.loads((Path(workdir) / "results.json").read_text())
    if found.get("schema", 0) > SCHEMA:
        raise UserError(
            f"{workdir}/results.json has the schema {found['schema']}, and this robust_jax reads "
            f"up to {SCHEMA}; take the version that wrote it or a newer one"
        )
    return found


def is_ours(results: Results) -> bool:
    """Whether the network was trained here; `robust_jax.evaluate` takes networks of any origin."""
    return "title" not in results


def write_results(workdir: Path, results: dict[str, Any]) -> None:
    """Writes results.json, which marks the folder as complete, with the version of its schema."""
    write_json(workdir / "results.json", {**results, "schema": SCHEMA})


def load(workdir: Path | str) -> Run:
    """Reads the rest of an evaluated run; nothing in it is unpickled."""
    workdir = Path(workdir)
    files = ((name, workdir / "records" / f"{name}.csv") for name in ("best", "last"))
    return Run(
        records={name: records.read(path) for name, path in files if path.exists()},
        metrics=metrics(workdir),
        images=_arrays(workdir / "examples.npz"),
    )


def metrics(workdir: Path) -> pd.DataFrame:
    """A row per line of metrics.jsonl; none if nothing was trained, as in `evaluate`."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # The file has null for a value that was not finite.
    return pd.DataFrame([json.loads(line) for line in lines]).astype(float)


def measured(workdir: Path | str) -> dict[str, np.ndarray]:
    """The arrays of a run's measurements, as "measurement/array"; none if it took none."""
    return _arrays(Path(workdir) / "measurements.npz") or {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); take another --workdir") from error


def _upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the fields and names that it would have now.

    In older versions the audit had a norm and an eps of None, meaning the threat model's, margins
    were tracked by one estimate, all images were trained on, and both checkpoints were evaluated.
    """
    tree = _with_estimates(tree)
    if "base" in tree:  # a study's
        return {**tree, "base": _upgraded(tree["base"])}
    if "audit" not in tree:
        return tree
    tree = {"train_size": 0, **tree, "evaluation": {"last": True, **tree["evaluation"]}}
    if "threat" not in tree:
        return _from_0_1_0(tree)
    return {**tree, "audit": {k: v for k, v in tree["audit"].items() if v is not None}}


def _from_0_1_0(tree: dict[str, Any]) -> dict[str, Any]:
    """A config from before there was config.threat, when every norm was linf by default."""
    attacks = (tree["adversary"], tree["validation_attack"], *tree["attacks"].values())
    for entry in (*attacks, *tree["measurements"].values()):
        if entry and "eps" in entry and entry.get("name") not in ("jsma", "carlini_wagner"):
            entry.setdefault("norm", "linf")
    for entry in attacks:
        if entry and entry.get("loss") == "carlini_wagner":
            entry["loss"] = "margin_loss"
    for label, entry in tree["regularizers"].items():
        if label == "average_margin":
            entry["name"] = "input_margin"
        elif label.startswith("energy_"):
            entry.setdefault("norm", "linf")
            if label.endswith("_label_free"):
                entry |= {"name": label.removesuffix("_label_free"), "label_free": True}
    return {**tree, "threat": {"norm": tree["audit"]["norm"], "eps": tree["audit"]["eps"]}}


def _with_estimates(value: Any) -> Any:
    """Replaces the one margin estimate of an older config, or a study's, by a section for all."""
    if not isinstance(value, dict):
        return value
    value = {key: _with_estimates(entry) for key, entry in value.items()}
    if isinstance(count := value.get("track_margins"), int):
        others = {"minimum_norm": 0, "clever": 0, "num_steps": 100, "num_samples": 1024}
        value["track_margins"] = {"first_order": count, **others}
    return value


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _arrays(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)
