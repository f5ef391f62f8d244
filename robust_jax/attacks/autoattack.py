"""AutoAttack: an ensemble of attacks without parameters to tune, each on what still stands.

A loop on the host over compiled attacks. Source: arXiv 2003.01690.
"""

import hashlib
import inspect
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from robust_jax import losses
from robust_jax.attacks import norms
from robust_jax.attacks.apgd import apgd, apgd_targeted
from robust_jax.attacks.best import check_counts, check_eps
from robust_jax.attacks.fab import fab
from robust_jax.attacks.norms import Norm
from robust_jax.attacks.pgd import LogitsFn
from robust_jax.attacks.square import square
from robust_jax.keys import KeyOrKeys, example_keys, fold_each
from robust_jax.progress import progress as progress_bar


class Member(NamedTuple):
    """An attack of the ensemble, and what it is called with."""

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


# Keywords that are AutoAttack's own to give.
_RESERVED = ("eps", "norm", "ranks", "targets")


class AutoAttackResult(NamedTuple):
    """What AutoAttack found, for N examples in the order they were given.

    x_adv [N,H,W,C]: the adversarial, or x itself where none was found or needed. robust [N].
    broken_by [N]: the attack that broke the example, "clean" where it was misclassified to begin
    with, "" where it is robust. distance [N]: the norm of x_adv - x in pixel units, 0 for "clean",
    NaN where robust. robust_accuracy: the share of all N that stands after "clean" and each
    attack in turn. warnings: reasons to doubt the result, in sentences.
    """

    x_adv: Float[np.ndarray, "n h w c"]
    robust: Bool[np.ndarray, " n"]
    broken_by: np.ndarray
    distance: Float[np.ndarray, " n"]
    robust_accuracy: dict[str, float]
    warnings: tuple[str, ...]


def autoattack(
    logits_fn: LogitsFn | Callable,
    x: Float[np.ndarray, "n h w c"],
    y: Int[np.ndarray, " n"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    version: str | tuple[str, ...] = "standard",
    batch_size: int = 128,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    state_path: str | os.PathLike | None = None,
    progress: bool = True,
) -> AutoAttackResult:
    """Robust accuracy by AutoAttack, an upper bound on the true one (arXiv 2003.01690).

    Attacks run in turn on the examples classified right that no other has broken, from the clean
    image, targeted ones class by class; what they find is checked by a fresh forward pass. An
    example's randomness follows (key, its place in x, the attack's name), so the result does not
    depend on batch_size. logits_fn: [B,H,W,C] in [0,1] -> [B,K]; with version="rand", for
    randomised networks, logits_fn(x, key) with one key for a batch of one. x: [N,H,W,C]. y: [N].
    key: one key, or one for each example [N]. eps: pixel units. version: "standard", "plus" or
    "rand", or a tuple of the names in MEMBERS. overrides: keywords for members by name, as in
    {"square": {"num_queries": 1000}}. state_path: an .npz file written after each attack, from
    which a run with the same arguments (but for batch_size) goes on. Raises ValueError for
    unknown names, wrong shapes, pixels outside [0,1], a state of other inputs.
    """
    randomised = version == "rand"
    plan = _plan(version, overrides or {})
    x, y, keys = _checked(x, y, key, eps, norm, batch_size)
    over_batches = partial(_over_batches, batch_size)
    classify = jax.jit(_one_by_one(logits_fn) if randomised else lambda x, _: logits_fn(x))

    logits = over_batches(classify, x, _named(keys, "clean"))
    num_classes = logits.shape[-1]
    if y.max() >= num_classes:
        raise ValueError(f"y has label {y.max()}, but the network has {num_classes} classes")
    right = _is_right(logits, y)
    plan, warnings = _fit_to_classes(plan, num_classes)
    if _are_probabilities(logits):
        warnings.append(
            "the outputs are probabilities: give logits, or gradients vanish where they saturate"
        )
    if not randomised:
        if _is_random(logits_fn, x[:batch_size]):
            warnings.append('the network is randomised: use version="rand"')
        if right.any() and any(member.attack is not square for member in plan.values()):
            flat = over_batches(jax.jit(_is_flat(logits_fn)), x[right], y[right])
            if flat.any():
                warnings.append(
                    f"{flat.sum()} of {len(flat)} points have a zero gradient: attacks that "
                    "follow gradients say little about them"
                )

    inputs = _fingerprint(x, y, keys, eps, norm, plan)
    state = _State(
        x.copy(), np.where(right, "", "clean").astype("U32"), {"clean": float(right.mean())}
    )
    if state_path is not None and Path(state_path).exists():
        state = _load(Path(state_path), inputs, logits)

    passes = {name: _passes(member, num_classes) for name, member in plan.items()}
    num_passes = sum(map(len, passes.values()))
    with progress_bar(num_passes, "autoattack", "pass", shown=progress) as bar:
        for name, member in plan.items():
            if name in state.robust_accuracy:
                bar.update(len(passes[name]))
                continue
            attack = jax.jit(partial(_attempt, logits_fn, member, norm))
            attack_keys, check_keys = _named(keys, name), _named(keys, f"check {name}")
            for ranks in passes[name]:
                standing = np.flatnonzero(state.broken_by == "")
                bar.set_postfix_str(f"{name}: {len(standing)} standing")
                if len(standing):
                    x_try = over_batches(
                        partial(attack, eps, ranks),
                        x[standing], y[standing], attack_keys[standing],
                    )  # fmt: skip
                    fresh = over_batches(classify, x_try, check_keys[standing])
                    wrong = ~_is_right(fresh, y[standing])
                    state.x_adv[standing[wrong]] = x_try[wrong]
                    state.broken_by[standing[wrong]] = name
                bar.update()
            state.robust_accuracy[name] = float((state.broken_by == "").mean())
            if state_path is not None:
                _save(Path(state_path), state, inputs, logits)
    return _result(state, x, norm, warnings)


class _State(NamedTuple):
    x_adv: np.ndarray
    broken_by: np.ndarray
    robust_accuracy: dict[str, float]


def _plan(version, overrides) -> dict[str, Member]:
    """The members to run, in order, with the keywords of the version and of the user."""
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
    plan = {}
    for name, keywords in chosen.items():
        attack, defaults = MEMBERS[name]
        own = {**keywords, **overrides.get(name, {})}
        known = inspect.signature(attack).parameters.values()
        allowed = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name not in _RESERVED]
        for wrong in own.keys() - set(allowed):
            raise ValueError(f"{name} has no keyword {wrong!r}; choices: {', '.join(allowed)}")
        plan[name] = Member(attack, {**defaults, **own})
    return plan


def _checked(x, y, key, eps, norm, batch_size):
    """x as float32, y, and a key for each example, on the host but for the keys."""
    check_eps(eps)
    norms.check(norm)
    check_counts(batch_size=batch_size)
    x, y = np.asarray(x, np.float32), np.asarray(y)
    if x.ndim != 4 or not x.size:
        raise ValueError(f"x must be [N,H,W,C] and not empty, not {list(x.shape)}")
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"x ranges over [{x.min():g}, {x.max():g}]; pixels must be in [0, 1]")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise ValueError(f"y must hold {len(x)} labels from 0 on, not {y.dtype} {list(y.shape)}")
    return x, y.astype(np.int32), example_keys(key, len(x))


def _fit_to_classes(plan, num_classes) -> tuple[dict[str, Member], list[str]]:
    """The plan with losses that exist for so many classes, and what had to be replaced."""
    warnings = []
    for name, member in plan.items():
        if member.keywords.get("loss") is losses.dlr and num_classes < 3:
            keywords = {**member.keywords, "loss": losses.carlini_wagner}
            plan = {**plan, name: Member(member.attack, keywords)}
            warnings.append(f"{name} uses the margin: DLR needs 3 classes, not {num_classes}")
        if member.attack is apgd_targeted and num_classes < 4:
            warnings.append(
                f"{name} uses the margin: the targeted DLR needs 4 classes, not {num_classes}"
            )
    return plan, warnings


def _passes(member: Member, num_classes: int) -> list[np.ndarray | None]:
    """The ranks of each pass: targeted attacks take one at a time, so the broken drop out."""
    known = inspect.signature(member.attack).parameters
    if "num_targets" not in known:
        return [None]
    num_targets = member.keywords.get("num_targets", known["num_targets"].default)
    if num_targets is None:
        return [None]
    return [np.array([rank]) for rank in range(2, 2 + min(num_targets, num_classes - 1))]


def _attempt(logits_fn, member, norm, eps, ranks, x, y, keys):
    targets = {} if ranks is None else {"ranks": ranks}
    return member.attack(logits_fn, x, y, keys, eps=eps, norm=norm, **targets, **member.keywords)


def _over_batches(batch_size: int, fn: Callable, *arrays) -> np.ndarray:
    """fn over batches of one size; the last is filled up with copies, whose results are dropped."""
    count, results = len(arrays[0]), []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        results.append(np.asarray(fn(*(array[rows] for array in arrays))))
    return np.concatenate(results)[:count]


def _one_by_one(logits_fn):
    """A randomised network on a batch, a key for each example."""
    return jax.vmap(lambda x, key: logits_fn(x[None], key)[0])


def _is_right(logits, y) -> np.ndarray:
    return np.asarray(losses.correct(jnp.asarray(logits), jnp.asarray(y)), bool)


def _named(keys, name):
    return fold_each(keys, zlib.crc32(name.encode()))


def _are_probabilities(logits) -> bool:
    in_range = logits.min() > -1e-5 and logits.max() < 1 + 1e-5
    return bool(in_range and np.allclose(logits.sum(-1), 1, atol=1e-4))


def _is_random(logits_fn, x) -> bool:
    """Whether two calls differ; not compiled, as that would freeze what Python draws."""
    one, two = np.asarray(logits_fn(x)), np.asarray(logits_fn(x))
    size = np.linalg.norm(one, axis=-1) + 1e-10
    return bool((np.linalg.norm(one - two, axis=-1) / size > 1e-4).any())


def _is_flat(logits_fn):
    """Whether the margin's gradient at x is zero (or not a number), [B,H,W,C], [B] -> [B]."""

    def is_flat(x, y):
        gradient = jax.grad(lambda x: losses.margin(logits_fn(x), y).sum())(x)
        return ~(jnp.abs(gradient).max((1, 2, 3)) > 0)

    return is_flat


def _fingerprint(x, y, keys, eps, norm, plan) -> str:
    """What a saved state must have been made with to be of use; the network's logits aside."""
    steps = {
        name: {k: getattr(v, "__name__", v) for k, v in sorted(member.keywords.items())}
        for name, member in plan.items()
    }
    text = json.dumps([float(eps), norm, x.shape, steps], default=str)
    digest = hashlib.sha256(text.encode())
    for array in (x, y, np.asarray(jax.random.key_data(keys))):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _save(path: Path, state: _State, inputs: str, logits: np.ndarray) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez_compressed(
            file,
            x_adv=state.x_adv,
            broken_by=state.broken_by,
            robust_accuracy=json.dumps(state.robust_accuracy),
            inputs=inputs,
            logits=logits,
        )
    os.replace(part, path)


def _load(path: Path, inputs: str, logits: np.ndarray) -> _State:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            state = _State(
                saved["x_adv"], saved["broken_by"], json.loads(str(saved["robust_accuracy"]))
            )
            same_inputs = str(saved["inputs"]) == inputs
            same_network = np.allclose(saved["logits"], logits, rtol=1e-3, atol=1e-3)
    except (OSError, EOFError, KeyError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a state of AutoAttack: {error}") from error
    if not (same_inputs and same_network):
        other = "another network" if same_inputs else "other examples, keys or settings"
        raise ValueError(f"{path} belongs to {other}; give another state_path or delete it")
    return state


def _result(state: _State, x, norm, warnings) -> AutoAttackResult:
    share = 0.002  # of all examples: what the reference tolerates before it speaks up
    names = list(state.robust_accuracy)
    for before, name in zip(names[1:], names[2:], strict=False):
        drop = state.robust_accuracy[before] - state.robust_accuracy[name]
        if name == "square" and drop > share:
            warnings.append(
                f"square lowered the robust accuracy of the others by {100 * drop:.1f} points: "
                "their gradients may be masked; give it more queries"
            )
    robust = state.broken_by == ""
    sizes = [float(norms.size(delta, norm)) for delta in state.x_adv - x]
    distance = np.where(robust, np.nan, np.asarray(sizes, np.float32))
    return AutoAttackResult(
        state.x_adv, robust, state.broken_by, distance, state.robust_accuracy, tuple(warnings)
    )
