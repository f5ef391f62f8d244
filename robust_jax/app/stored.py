"""What a folder holds, and the config it was made with: launch.py's, where none is given."""

import json
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from robust_jax.errors import UserError

RUN, STUDY = "config.json", "study.json"
Holds = Literal["nothing", "a run", "a study", "an evaluation", "other files"]


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
    # Studies had no config of their own once.
    return "a study" if "claims" in _read(results) else "an evaluation"


def no_run(workdir: Path) -> UserError:
    """That the folder holds no run, and what to do."""
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
    """A config as it was before it was JSON: with tuples, and a study's arms in their order."""
    config = ConfigDict(_with_tuples(tree))
    for field in {"arms", "claims"} & set(tree):
        config[field] = ConfigDict(_with_tuples(tree[field]), sort_keys=False)
    return config


def get_config(workdir: str) -> ConfigDict:
    """For --config=…/stored.py:WORKDIR, as launch.py writes it where --config is missing."""
    config = config_of(Path(workdir))
    if config is None:
        raise UserError(f"{workdir} holds {holds(Path(workdir))}")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); take another --workdir") from error


def _upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's config from before there was config.threat, when every norm was linf by default.

    Later the audit had a norm and an eps of None, which stood for those of the threat model.
    """
    if "audit" not in tree:
        return tree
    if "threat" in tree:
        audit = {k: v for k, v in tree["audit"].items() if v is not None}
        return {**tree, "audit": audit}
    audit = tree["audit"]
    for entry in (
        tree["adversary"],
        tree["validation_attack"],
        *tree["attacks"].values(),
        *tree["measurements"].values(),
    ):
        if entry and "eps" in entry and entry.get("name") not in ("jsma", "carlini_wagner"):
            entry.setdefault("norm", "linf")
    return {**tree, "threat": {"norm": audit["norm"], "eps": audit["eps"]}}


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
