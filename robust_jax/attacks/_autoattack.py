"""AutoAttack: an ensemble of parameter-free attacks, each on the examples still standing.

A loop on the host over compiled attacks. Source: arXiv 2003.01690.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from robust_jax import _checks, losses
from robust_jax._front import Mapper, on_the_host
from robust_jax._outputs import are_strange, doubts
from robust_jax._precision import length_in
from robust_jax.attacks._apgd import apgd, apgd_targeted
from robust_jax.attacks._fab import fab
from robust_jax.attacks._square import check_images, square
from robust_jax.attacks._success import distances
from robust_jax.attacks.norms import Norm, ThreatModel, threat_model
from robust_jax.batches import MapExamples
from robust_jax.errors import UnusableState
from robust_jax.files import UNREADABLE_NPZ, save_arrays
from robust_jax.keys import example_keys, fold_each, with_keys
from robust_jax.progress import progress_bar
from robust_jax.types import Images, KeyOrKeys, Labels, LogitsFn


class Member(NamedTuple):
    """An attack of the ensemble and its keywords."""

    attack: Callable
    keywords: Mapping[str, Any] = {}


MEMBERS: Mapping[str, Member] = {
    "apgd_ce": Member(apgd, {"loss": losses.cross_entropy}),
    "apgd_dlr": Member(apgd, {"loss": losses.dlr}),
    "apgd_t": Member(apgd_targeted),
    "fab": Member(fab, {"num_targets": None}),
    "fab_t": Member(fab),
    "square": Member(square),
}
VERSIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "standard": {"apgd_ce": {}, "apgd_t": {}, "fab_t": {}, "square": {}},
    "plus": {
        "apgd_ce": {"num_restarts": 5},
        "apgd_dlr": {"num_restarts": 5},
        "fab": {"num_restarts": 5},
        "square": {},
        "apgd_t": {},
        "fab_t": {},
    },
    "rand": {"apgd_ce": {"eot_samples": 20}, "apgd_dlr": {"eot_samples": 20}},
}
# AutoAttack splits these into passes, so it checks them; an attack checks its other keywords.
_COUNTS = ("num_targets", "num_restarts")
# The field of a threat model that an attack needs.
_NEEDED = {"fab": "to_boundary", "fab_t": "to_boundary", "square": "patches"}
# Keywords that AutoAttack sets itself, so overrides may not.
_RESERVED = ("eps", "norm", "ranks", "targets", "criterion")


class AutoAttackResult(NamedTuple):
    """What AutoAttack found, for N examples in the order they were given.

    x_adv [N,...]: the adversarial, or x itself where none was found or needed. robust [N].
    broken_by [N]: the attack that broke the example, "clean" where it was misclassified to begin
    with, "" where it is robust. distance [N]: the norm of x_adv - x in pixel units, 0 for "clean",
    NaN where robust. margin [N]: the output margin at x_adv; where robust, the smallest that an
    attack left. robust_accuracy: the share of all N still standing after "clean" and after each
    attack in turn. warnings: reasons to doubt the result, in sentences.
    """

    x_adv: Float[np.ndarray, "n ..."]
    robust: Bool[np.ndarray, " n"]
    broken_by: np.ndarray
    distance: Float[np.ndarray, " n"]
    margin: Float[np.ndarray, " n"]
    robust_accuracy: dict[str, float]
    warnings: tuple[str, ...]


@on_the_host
def autoattack(
    logits_fn: LogitsFn | Callable,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    version: str | tuple[str, ...] = "standard",
    batch_size: int = 128,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    state_path: str | os.PathLike | None = None,
    map_examples: MapExamples | None = None,
    progress: bool = True,
) -> AutoAttackResult:
    """Robust accuracy by AutoAttack, an upper bound on the true one.

    Each attack in turn runs on the correctly classified examples that none has broken yet, from the
    clean image, one class or restart at a time. A fresh forward pass checks what it finds. An
    example's randomness depends only on (key, its place in x, the attack's name), so the result
    does not depend on batch_size.

    Args:
        logits_fn: The network, [B,...] in [0,1] -> [B,K]; with version="rand", for randomised
            networks, logits_fn(x, key) with one key for a batch of one.
        x: Examples [N,...], pixels in [0,1]: images [N,H,W,C] if Square takes part.
        y: Labels [N].
        key: One key, or one for each example [N].
        eps: The radius of the ball, in pixel units.
        norm: A name or a `norms.ThreatModel`.
        version: "standard", "plus" or "rand", or a tuple of attacks, each as in "standard":
            "apgd_ce", "apgd_dlr", "apgd_t", "fab", "fab_t", "square".
        batch_size: How many examples are attacked at a time.
        overrides: Keywords for attacks by name, as in {"square": {"num_queries": 1000}}.
        state_path: An .npz file written after each pass, from which a run with the same arguments
            (apart from batch_size) resumes.
        map_examples: How batches reach the devices; by default all local devices share each batch.
        progress: Whether to show a progress bar.

    Returns:
        For each example the adversarial, what broke it and how far away it is; the share still
        standing after each attack; warnings.

    Raises:
        ValueError: Names are unknown, shapes wrong or pixels outside [0,1], or Square takes part
            and x is not [N,H,W,C]; `version` can name the other attacks.
        UnusableState: The file at state_path belongs to other inputs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> weights = jax.random.normal(jax.random.key(0), (12, 3))
        >>> logits_fn = lambda x: x @ weights
        >>> x = jax.random.uniform(jax.random.key(1), (4, 12))
        >>> y = logits_fn(x).argmax(-1)
        >>> result = attacks.autoattack(
        ...     logits_fn, x, y, jax.random.key(2), eps=0.5, version=("apgd_ce",), progress=False
        ... )
        >>> result.robust_accuracy
        {'clean': 1.0, 'apgd_ce': 0.0}

    Reference:
        Croce & Hein 2020, arXiv 2003.01690.
    """
    _checks.length("eps", eps)
    threat = threat_model(norm)
    ensemble = ensemble_of(norm=norm, version=version, overrides=overrides)
    _checks.counts(batch_size=batch_size)
    is_randomised = version == "rand"
    x = np.asarray(_checks.pixels(x))
    y = np.asarray(_checks.one_row_each(y, x))
    if any(member.attack is square for member in ensemble.values()):
        check_images(x.shape[1:])
    key = _checks.key(key, len(x))
    network = _checks.network(logits_fn, x, key=key if is_randomised else None)
    num_classes = _checks.num_classes(network)
    _checks.labels(y, num_classes)
    keys = example_keys(key, len(x))
    rows = {
        "x": x,
        "y": y.astype(np.int32),
        "key": np.asarray(jax.random.key_data(keys)),
    }
    map_examples = with_keys(map_examples or Mapper(network, batch_size, len(x)), keys)
    classify = map_examples(_Classify(is_randomised))

    clean = classify(rows, _salt("clean"))
    logits, right = clean["logits"], clean["right"]
    ensemble, warnings = _fit_to_classes(ensemble, num_classes)
    warnings += doubts(logits_fn, x, logits, is_randomised)
    if not is_randomised and right.any() and any(m.attack is not square for m in ensemble.values()):
        flat = map_examples(_is_flat)(_take(rows, right))
        if flat.any():
            warnings.append(
                f"{flat.sum()} of {len(flat)} points have a zero gradient: attacks that "
                "follow gradients say little about them"
            )

    inputs = ""
    if state_path is not None:
        inputs = _fingerprint(rows, eps, threat, ensemble, num_classes)
    broken_by = np.where(right, "", "clean").astype("U32")
    strange = np.zeros(len(x), bool)
    state = _State(x.copy(), broken_by, clean["margin"], strange, 0, {"clean": float(right.mean())})
    if state_path is not None and Path(state_path).exists():
        state = _load(Path(state_path), inputs, logits, x.dtype)

    passes = [p for name, c in ensemble.items() for p in _passes(name, c, num_classes)]
    radius = np.asarray(length_in(eps, x.dtype))
    with progress_bar(
        len(passes), "autoattack", "pass", initial=state.passes_done, shown=progress
    ) as bar:
        for i, (name, member, ranks, salt) in enumerate(passes):
            if i < state.passes_done:
                continue
            standing = np.flatnonzero(state.broken_by == "")
            bar.set_postfix_str(f"{name}: {len(standing)} standing")
            if len(standing):
                some = _take(rows, standing)
                attempt = map_examples(_Attempt(member.attack, threat, _frozen(member.keywords)))
                x_try = attempt(some, radius, ranks, _salt(salt))
                fresh = classify({**some, "x": x_try}, _salt(f"check {salt}"))
                holds, margin = fresh["right"], fresh["margin"]
                state.strange[standing] |= are_strange(fresh["logits"])
                state.margin[standing] = np.where(
                    holds, np.minimum(margin, state.margin[standing]), margin
                )
                broken = standing[~holds]
                state.x_adv[broken] = x_try[~holds]
                state.broken_by[broken] = name
            state.robust_accuracy[name] = float((state.broken_by == "").mean())
            state = state._replace(passes_done=i + 1)
            if state_path is not None and jax.process_index() == 0:
                _save(Path(state_path), state, inputs, logits)
            bar.update()
    if state.strange.any():
        warnings.append(
            f"attacks led {state.strange.sum()} points to logits that are NaN or infinite, which "
            "count as misclassified"
        )
    return _result(state, x, threat, warnings)


class _State(NamedTuple):
    """The progress of a run; robust_accuracy holds the attacks started so far, in order.

    strange: the examples for which an attack found logits that are NaN or +inf.
    """

    x_adv: np.ndarray
    broken_by: np.ndarray
    margin: np.ndarray
    strange: np.ndarray
    passes_done: int
    robust_accuracy: dict[str, float]


class _Pass(NamedTuple):
    """One attack with one target rank or restart; broken examples drop out between passes."""

    name: str
    member: Member
    ranks: np.ndarray | None
    salt: str


def ensemble_of(
    *,
    norm: Norm = "linf",
    version: str | tuple[str, ...] = "standard",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Member]:
    """The attacks to run, in order, with the keywords of the version and of the user.

    Raises ValueError as `autoattack` does.
    """
    threat = threat_model(norm)
    overrides = overrides or {}
    if isinstance(version, str):
        if version not in VERSIONS:
            raise ValueError(
                f"version must be one of {', '.join(VERSIONS)} or a tuple of attacks, "
                f"not {version!r}"
            )
        chosen = VERSIONS[version]
    else:
        chosen = {name: {} for name in version}
    for name in (*chosen, *overrides):
        if name not in MEMBERS:
            raise ValueError(f"attack must be one of {', '.join(MEMBERS)}, not {name!r}")
    if not chosen:
        raise ValueError(f"version names no attack; choices: {', '.join(MEMBERS)}")
    for name in chosen:
        threat_model(norm, needs=_NEEDED.get(name, "name"))
    if version not in ("plus", "rand"):
        chosen = {name: threat.autoattack.get(name, {}) for name in chosen}
    ensemble = {}
    for name in dict.fromkeys((*chosen, *overrides)):
        attack, defaults = MEMBERS[name]
        own = {**chosen.get(name, {}), **overrides.get(name, {})}
        known = inspect.signature(attack).parameters.values()
        allowed = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name not in _RESERVED]
        for wrong in own.keys() - set(allowed):
            raise ValueError(f"{name} has no keyword {wrong!r}; choices: {', '.join(allowed)}")
        if "eot_samples" in own and version != "rand":
            raise ValueError(
                f'{name} has eot_samples only in version="rand", whose network draws with a key'
            )
        _checks.counts(**{k: v for k, v in own.items() if k in _COUNTS and v is not None})
        ensemble[name] = Member(attack, {**defaults, **own})
    return {name: ensemble[name] for name in chosen}


def _take(rows, which) -> dict[str, np.ndarray]:
    return {name: array[which] for name, array in rows.items()}


def _fit_to_classes(ensemble, num_classes) -> tuple[dict[str, Member], list[str]]:
    """The ensemble with losses that exist for num_classes, and what had to be replaced."""
    warnings = []
    for name, member in ensemble.items():
        if member.keywords.get("loss") is losses.dlr and num_classes < 3:
            keywords = {**member.keywords, "loss": losses.margin_loss}
            ensemble = {**ensemble, name: member._replace(keywords=keywords)}
            warnings.append(f"{name} uses the margin: DLR needs 3 classes, not {num_classes}")
        if member.attack is apgd_targeted and num_classes < 4:
            warnings.append(
                f"{name} uses the margin: the targeted DLR needs 4 classes, not {num_classes}"
            )
    return ensemble, warnings


def _passes(name: str, member: Member, num_classes: int) -> list[_Pass]:
    """The passes of a member: one for each target it aims at, or for each restart."""
    known = inspect.signature(member.attack).parameters
    keywords = {k: p.default for k, p in known.items() if p.default is not p.empty}
    keywords |= member.keywords
    if num_targets := keywords.get("num_targets"):
        ranks = range(2, 2 + min(num_targets, num_classes - 1))
        return [_Pass(name, member, np.array([rank]), name) for rank in ranks]
    if "num_restarts" not in keywords:
        return [_Pass(name, member, None, name)]
    once = Member(member.attack, {**member.keywords, "num_restarts": 1})
    passes = [_Pass(name, once, None, name)]
    if member.attack is fab:  # its first run starts at the clean image
        once = Member(fab, {**once.keywords, "random_start": True})
    restarts = range(1, keywords["num_restarts"])
    return passes + [_Pass(name, once, None, f"{name} {i}") for i in restarts]


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """An attack in the form that `map_examples` takes; equal instances compile to one program."""

    attack: Callable
    norm: ThreatModel
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, logits_fn, rows, eps, ranks, salt):
        targets = {} if ranks is None else {"ranks": ranks}
        return self.attack(
            logits_fn,
            rows["x"],
            rows["y"],
            fold_each(rows["key"], salt),
            eps=eps,
            norm=self.norm,
            **targets,
            **dict(self.keywords),
        )


def _frozen(keywords: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in keywords.items()))


@dataclasses.dataclass(frozen=True)
class _Classify:
    """The logits of a batch, whether each is right, and its output margin.

    A randomised network takes a key for each example.
    """

    is_randomised: bool

    def __call__(self, logits_fn, rows, salt):
        if self.is_randomised:
            keys = fold_each(rows["key"], salt)
            logits = jax.vmap(lambda x, key: logits_fn(x[None], key)[0])(rows["x"], keys)
        else:
            logits = logits_fn(rows["x"])
        right = losses.correct(logits, rows["y"]).astype(bool)
        return {"logits": logits, "right": right, "margin": losses.margin(logits, rows["y"])}


def _salt(name: str) -> np.uint32:
    """The number that is folded into an example's key for the named use."""
    return np.uint32(zlib.crc32(name.encode()))


def _is_flat(logits_fn, rows):
    """Whether the margin's gradient at x is zero (or not a number), [B]."""
    gradient = jax.grad(lambda x: losses.margin(logits_fn(x), rows["y"]).sum())(rows["x"])
    return ~(jnp.abs(gradient).reshape(len(gradient), -1).max(-1) > 0)


def _fingerprint(rows, eps, norm: ThreatModel, ensemble, num_classes: int) -> str:
    """A hash of what a saved state must share with this run, apart from the network's logits."""
    keywords = {name: dict(sorted(member.keywords.items())) for name, member in ensemble.items()}
    given = [float(eps), norm.name, rows["x"].shape, written(keywords)]
    # A name does not identify a norm or a loss, so some of their values are hashed too.
    given += values_of_norm(norm, rows["x"][0])
    given += values_of_losses(keywords, num_classes)
    digest = hashlib.sha256(json.dumps(given, default=str, sort_keys=True).encode())
    for array in rows.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def values_of_norm(norm: ThreatModel, image: np.ndarray) -> list[str]:
    """The size and dual size that the norm gives a perturbation made from the image."""
    step = jnp.asarray(image, jnp.float32) - 0.25
    return [f"{size(step):.4g}" for size in (norm.size, norm.dual_size)]


def values_of_losses(
    keywords: Mapping[str, Mapping[str, Any]], num_classes: int
) -> list[list[str]]:
    """The values, at fixed logits, of the losses among the keywords of each attack."""
    random = np.random.default_rng(0).normal(size=(num_classes, num_classes))
    logits, labels = jnp.asarray(3 * random, jnp.float32), jnp.arange(num_classes)
    found = (one["loss"](logits, labels) for one in keywords.values() if "loss" in one)
    return [[f"{value:.4g}" for value in np.ravel(values)] for values in found]


def is_autoattack(attack: Callable) -> bool:
    """Whether the attack is `autoattack`, or a partial of it."""
    return attack is autoattack or getattr(attack, "func", None) is autoattack


def written(value: Any) -> Any:
    """Keywords in a JSON form that is the same in every process; functions become their names."""
    if isinstance(value, Mapping):
        return {key: written(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [written(one) for one in value]
    if isinstance(value, partial):
        return [written(value.func), written(value.args), written(value.keywords)]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value


def _save(path: Path, state: _State, inputs: str, logits: np.ndarray) -> None:
    fields = state._asdict() | {"robust_accuracy": json.dumps(state.robust_accuracy)}
    save_arrays(path, **fields, inputs=inputs, logits=logits)


def _load(path: Path, inputs: str, logits: np.ndarray, dtype: np.dtype) -> _State:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            state = _State(
                _typed(saved["x_adv"], dtype),
                saved["broken_by"],
                saved["margin"],
                saved["strange"],
                int(saved["passes_done"]),
                json.loads(str(saved["robust_accuracy"])),
            )
            same_inputs = str(saved["inputs"]) == inputs
            same_network = same_inputs and np.allclose(
                _typed(saved["logits"], logits.dtype), logits, rtol=1e-3, atol=1e-3, equal_nan=True
            )
    except UNREADABLE_NPZ as error:
        raise UnusableState(f"{path} is not a state of AutoAttack: {error}") from error
    if not same_network:
        other = "another network" if same_inputs else "other examples, keys or settings"
        raise UnusableState(f"{path} belongs to {other}; give another state_path or delete it")
    return state


def _typed(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Restores the dtype of an array that numpy read as raw bytes, as it does bfloat16."""
    return array.view(dtype) if array.dtype.kind == "V" else array


def doubt_about_square(robust_accuracy: Mapping[str, float], share: float = 1.0) -> list[str]:
    """A warning if Square breaks examples that gradient attacks do not.

    share: the share of all examples that robust_accuracy covers.
    """
    tolerated = 0.002  # of all examples; the reference warns above this
    names = list(robust_accuracy)
    for before, name in zip(names[1:], names[2:], strict=False):
        drop = share * (robust_accuracy[before] - robust_accuracy[name])
        if name == "square" and drop > tolerated + 1e-9:
            return [
                f"square lowered the robust accuracy of the others by {100 * drop:.1f} points: "
                "their gradients may be masked; give it more queries"
            ]
    return []


def _result(state: _State, x, norm, warnings) -> AutoAttackResult:
    warnings = [*warnings, *doubt_about_square(state.robust_accuracy)]
    robust = state.broken_by == ""
    sizes = np.asarray(distances(jnp.asarray(x), jnp.asarray(state.x_adv), norm=norm))
    return AutoAttackResult(
        state.x_adv,
        robust,
        state.broken_by,
        np.where(robust, np.nan, sizes),
        state.margin,
        state.robust_accuracy,
        tuple(warnings),
    )
