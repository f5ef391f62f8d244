"""Checks whether robustness is real or gradients are masked, each with a verdict and evidence.

What they look for is described in arXiv 1802.00420, 1902.06705 (§5) and 2003.01690. Thresholds are
our reading: most shares warn or fail only if the lower end of their 95 % interval is above a limit,
so that sampling noise alone decides nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from robust_jax import _checks, losses
from robust_jax._double import NotInDouble, in_double
from robust_jax._front import Mapper, on_the_host
from robust_jax._network import Network
from robust_jax._outputs import (
    FEW,
    MOST_CHANGE,
    are_probabilities,
    change_with_the_batch,
    is_random,
)
from robust_jax._precision import length_in, wide_dtype
from robust_jax.analysis.summaries import wilson_interval
from robust_jax.attacks import mim, pgd, square
from robust_jax.attacks._perturbations import finite
from robust_jax.attacks.norms import Norm, threat_model
from robust_jax.batches import MapExamples
from robust_jax.errors import NothingToAudit
from robust_jax.keys import example_keys, fold_each, with_keys
from robust_jax.progress import progress_bar
from robust_jax.types import Images, KeyOrKeys, Labels, LogitsFn

Grade = Literal["skipped", "pass", "warn", "fail"]  # from good to bad
_FEW_STEPS, _MANY_STEPS, _RESTARTS, _DRAWS = 10, 50, 5, 10
# Limits (warn, fail) on the share of audited points that only a weaker attack breaks.
_LEFT_OVER = (0.01, 0.05)
# Limits (warn, fail) on how far attacks that ought to agree may differ in accuracy.
_UNLIKE = (0.05, 0.15)
CHECKS = (
    "outputs",
    "randomness",
    "batch",
    "gradients",
    "steps",
    "radius",
    "losses",
    "precision",
    "noise",
    "square",
    "transfer",
)


class Check(NamedTuple):
    """One check: its verdict, the evidence as a sentence, what to do about it, the numbers."""

    name: str
    verdict: Grade
    evidence: str
    advice: str
    values: dict[str, float]


class Audit(NamedTuple):
    """The checks made on num_examples points that the network gets right, and the worst verdict."""

    verdict: Grade
    checks: tuple[Check, ...]
    norm: str
    eps: float
    num_examples: int


@on_the_host
def audit(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    training_loss: losses.Loss | None = None,
    surrogates: Mapping[str, LogitsFn] | None = None,
    num_queries: int = 1000,
    batch_size: int = 128,
    map_examples: MapExamples | None = None,
    progress: bool = True,
) -> Audit:
    """Looks for reasons to distrust a robust accuracy measured by gradient-based attacks.

    A network passes if it has gradients to follow, if attacks get stronger with steps, radius and
    restarts and agree across losses, scales and precision, and if no point that survives them is
    broken by noise, random search or other networks' adversarial examples.

    Args:
        logits_fn: The network, [B,...] in [0,1] -> [B,K].
        x: A few hundred examples [N,...], pixels in [0,1]. Those classified correctly are audited.
        y: Their labels [N].
        key: One key, or one for each example [N].
        eps: The radius of the threat model, in pixel units.
        norm: Its norm.
        training_loss: The loss that the network was trained with.
        surrogates: Other networks for the same task, by name. Give an undefended one.
        num_queries: The budget of Square, which is skipped unless x is [N,H,W,C] and the norm
            has patches.
        batch_size: How many examples are attacked at a time.
        map_examples: How batches reach the devices; by default all local devices share each batch.
        progress: Whether to show a progress bar.

    Returns:
        The worst verdict and the checks, each with its evidence and what to do about it.

    Raises:
        ValueError: eps is not above 0, or x, y, key or logits_fn are not as described.
        NothingToAudit: No example is classified correctly.

    Example:
        >>> import jax, jax.numpy as jnp, robust_jax
        >>> weights = jax.random.normal(jax.random.key(0), (12, 3))
        >>> logits_fn = lambda x: x.reshape(len(x), -1) @ weights
        >>> x = jax.random.uniform(jax.random.key(1), (20, 2, 2, 3))
        >>> y = logits_fn(x).argmax(-1)
        >>> found = robust_jax.audit(logits_fn, x, y, jax.random.key(2), eps=0.01, num_queries=10,
        ...                          progress=False)
        >>> found.verdict
        'pass'

    Reference:
        Athalye et al. 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv 1902.06705, §5; Croce and
        Hein 2020, arXiv 2003.01690. The thresholds are our reading.
    """
    _checks.length("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps must be above 0, not {eps!r} (pixels are in [0,1])")
    _checks.counts(num_queries=num_queries, batch_size=batch_size)
    threat = threat_model(norm)
    x = np.asarray(_checks.pixels(x))
    y = np.asarray(_checks.one_row_each(y, x))
    network = _checks.network(logits_fn, x)
    num_classes = _checks.num_classes(network)
    _checks.labels(y, num_classes)
    y = y.astype(np.int32)
    keys = example_keys(_checks.key(key, len(x)), len(x))
    others = {n: _checks.network(fn, x, f"surrogate {n!r}") for n, fn in (surrogates or {}).items()}
    for n, other in others.items():
        name = f"surrogate {n!r}"
        count = _checks.num_classes(other, name)
        _checks.same_classes(name, count, "the network", num_classes)
    rows = {"x": x, "y": y, "key": np.asarray(jax.random.key_data(keys))}
    mapping = with_keys(map_examples or Mapper(network, batch_size, len(x)), keys)
    logits = mapping(_logits)(rows)
    right = np.asarray(losses.correct(jnp.asarray(logits), jnp.asarray(y)), bool)
    if not right.any():
        raise NothingToAudit(
            f"none of the {len(x)} examples is classified correctly: nothing to audit"
        )
    all_logits = logits
    rows, logits = {name: array[right] for name, array in rows.items()}, logits[right]

    def double_mapping() -> MapExamples:  # map_examples has the network in its own type
        double = in_double(logits_fn, x.shape[1:])
        return with_keys(Mapper(double, batch_size, len(x)), keys)

    lab = _Lab(mapping, double_mapping, rows, logits, eps, norm, training_loss)
    checks = []
    with progress_bar(len(CHECKS), "audit", "check", shown=progress) as bar:
        for found in _checks_of(lab, all_logits, x[:FEW], logits_fn, others, num_queries):
            checks.append(found)
            bar.set_postfix_str(found.name, refresh=False)
            bar.update()
    verdict = _worst(*(check.verdict for check in checks))
    return Audit(verdict, tuple(checks), threat.name, float(eps), len(logits))


def _checks_of(
    lab: "_Lab", logits, x, logits_fn, surrogates: Mapping[str, Network], num_queries: int
) -> Iterator[Check]:
    """CHECKS in turn; the first three also look at examples that the network gets wrong."""
    yield _check_outputs(logits)
    yield _check_randomness(logits_fn, x)
    yield _check_batch(logits_fn, x)
    yield _check_gradients(lab)
    yield _check_steps(lab)
    yield _check_radius(lab)
    yield _check_losses(lab)
    yield _check_precision(lab)
    yield _check_noise(lab)
    yield _check_square(lab, num_queries)
    yield _check_transfer(lab, surrogates)


@dataclasses.dataclass(frozen=True)
class _Attack:
    """PGD for `map_examples` on the loss of a given index, computed on logits times a scale."""

    losses: tuple[losses.Loss, ...]
    norm: Norm
    num_steps: int
    num_restarts: int = 1

    def __call__(self, logits_fn, rows, eps, which, scale):
        def value(loss, logits, labels):  # switch needs branches of one type
            values = _checks.one_number_each(loss(logits, labels))
            return values.astype(wide_dtype(logits.dtype))

        branches = [partial(value, loss) for loss in self.losses]

        def loss(logits, labels):
            return jax.lax.switch(which, branches, logits * scale.astype(logits.dtype), labels)

        settings = {"num_steps": self.num_steps, "num_restarts": self.num_restarts, "loss": loss}
        return _held(pgd, logits_fn, rows, 0, eps=eps, norm=self.norm, **settings)


@dataclasses.dataclass(frozen=True)
class _AttackInDouble:
    norm: Norm

    def __call__(self, logits_fn, rows, eps):
        def wide(x):
            return logits_fn(x).astype(jnp.float64)

        rows = {**rows, "x": rows["x"].astype(jnp.float64)}
        return _held(pgd, wide, rows, 0, eps=eps, norm=self.norm, num_steps=_MANY_STEPS)


class _Lab:
    """The audited points, and which of them hold against each gradient-based attack."""

    def __init__(
        self,
        map_examples: MapExamples,
        double_mapping: Callable[[], MapExamples],
        rows: Mapping[str, np.ndarray],
        logits: np.ndarray,
        eps: float,
        norm: Norm,
        training_loss: losses.Loss | None,
    ):
        self.map_examples, self.rows, self.logits = map_examples, rows, logits
        self._double_mapping = double_mapping
        self.eps, self.norm = float(eps), norm
        self.losses: dict[str, losses.Loss] = {
            "cross_entropy": losses.cross_entropy,
            "margin": losses.margin_loss,
        }
        if logits.shape[-1] >= 3:
            self.losses["dlr"] = losses.dlr
        if training_loss is not None:
            self.losses["training_loss"] = training_loss
        top = np.sort(logits, -1)
        self.gap = float(np.mean(top[:, -1] - top[:, -2]))
        self._held = {name: self.many_steps(name) for name in self.losses}
        self._held["rescaled"] = self.many_steps("cross_entropy", scale=1 / max(self.gap, 1e-30))
        self._held["few_steps"] = self._run(num_steps=_FEW_STEPS)
        self._held["restarts"] = self._run(num_steps=_FEW_STEPS, num_restarts=_RESTARTS)

    def many_steps(self, loss: str, *, eps: float | None = None, scale: float = 1.0):
        """Which points hold; one program serves all losses, scales and radii, as arguments."""
        which = list(self.losses).index(loss)
        return self._run(eps, which, scale, num_steps=_MANY_STEPS)

    def _run(
        self, eps: float | None = None, which: int = 0, scale: float = 1.0, **settings
    ) -> Bool[np.ndarray, " n"]:
        attack = _Attack(tuple(self.losses.values()), self.norm, **settings)
        return self.map_examples(attack)(
            self.rows, self.radius(eps or self.eps), np.int32(which), np.float32(scale)
        )

    def double_precision(self) -> Bool[np.ndarray, " n"]:
        """Which points hold against cross-entropy in float64. Raises NotInDouble."""
        with jax.enable_x64(True):
            mapping = self._double_mapping()
            return mapping(_AttackInDouble(self.norm))(self.rows, np.float64(self.eps))

    def radius(self, eps: float) -> np.ndarray:
        """A radius in the type of the examples."""
        return np.asarray(length_in(eps, self.rows["x"].dtype))

    def share(self, name: str) -> float:
        """The share of the points that held against one of the attacks."""
        return float(self._held[name].mean())

    def standing(self) -> dict[str, np.ndarray]:
        """The points that held against every gradient-based attack."""
        held = np.logical_and.reduce(list(self._held.values()))
        return {name: array[held] for name, array in self.rows.items()}

    def grade(self, share: float, limits: tuple[float, float]) -> Grade:
        """The verdict on a share of points, or a difference of two, by its interval's lower end."""
        low, _ = wilson_interval(min(max(share, 0.0), 1.0), len(self.logits))
        return _grade(low, limits)


def _check_outputs(logits) -> Check:
    is_finite = np.isfinite(logits).all(-1)
    share = float(is_finite.mean())
    probabilities = are_probabilities(logits[is_finite])
    values = {"share_finite": share, "probabilities": float(probabilities)}
    if probabilities:
        evidence = "the outputs are in [0, 1] and sum to 1: they are probabilities, not logits"
    else:
        evidence = f"the outputs are logits, {_percent(share)} of them finite"
    return Check(
        "outputs",
        "fail" if probabilities or share < 1 else "pass",
        evidence,
        "return what goes into the softmax: its result saturates and takes the gradient with it"
        if probabilities or share == 1
        else "find what makes logits NaN or infinite: an attack follows no gradient there, and a "
        "label at -inf counts as wrong",
        values,
    )


def _check_randomness(logits_fn, x) -> Check:
    random = is_random(logits_fn, x)
    word = "differ" if random else "agree"
    return Check(
        "randomness",
        "fail" if random else "pass",
        f"two forward passes of the same {len(x)} images {word}",
        'average gradients over draws: autoattack(…, version="rand") with logits_fn(x, key)',
        {"differs": float(random)},
    )


def _check_batch(logits_fn, x) -> Check:
    change = change_with_the_batch(logits_fn, x)
    return Check(
        "batch",
        "fail" if change > MOST_CHANGE else "pass",
        f"an image's logits change by {change:.1g} of their size when it is alone in its batch",
        "use running statistics (train=False): a network that looks at the whole batch lets one "
        "example's attack move another's prediction",
        {"relative_change": change},
    )


def _check_gradients(lab: _Lab) -> Check:
    found = lab.map_examples(_Trajectory(lab.norm))(lab.rows, lab.radius(lab.eps))
    # Every step of a path counts, as attacks start where gradients exist and get stuck later.
    shares = {
        "zero": float((found["cross_entropy"] == 0).mean()),
        "zero_margin": float((found["margin"] == 0).mean()),
        "vanishing": float((found["cross_entropy"] < 1e-20).mean()),
        "not_finite": float((~found["finite"]).mean()),
    }
    worst = max(shares["zero"], shares["zero_margin"], shares["not_finite"])
    verdict = lab.grade(worst, (0.02, 0.1))
    if verdict == "pass" and shares["vanishing"] > 0.1:
        verdict = "warn"
    return Check(
        "gradients",
        verdict,
        f"along the path of an attack {_percent(shares['zero'])} of cross-entropy's gradients are "
        f"zero, {_percent(shares['vanishing'])} below 1e-20, "
        f"{_percent(shares['not_finite'])} not finite; of the margin's "
        f"{_percent(shares['zero_margin'])} are zero",
        "attack the margin or DLR, replace what has no derivative by something that has (BPDA, "
        "arXiv 1802.00420), and trust Square more than PGD",
        shares,
    )


def _check_steps(lab: _Lab) -> Check:
    few, many, restarts = (lab.share(n) for n in ("few_steps", "cross_entropy", "restarts"))
    verdict = _worst(lab.grade(many - few, (0.02, 0.05)), lab.grade(few - restarts, (0.2, 0.4)))
    return Check(
        "steps",
        verdict,
        f"{_percent(few)} hold against {_FEW_STEPS} steps, {_percent(many)} against {_MANY_STEPS}, "
        f"{_percent(restarts)} against {_RESTARTS} restarts of {_FEW_STEPS}",
        "more steps must not help the defence and restarts should not find much more: the loss is "
        "rugged, so quote AutoAttack with Square, not PGD",
        {"few_steps": few, "many_steps": many, "restarts": restarts},
    )


def _check_radius(lab: _Lab) -> Check:
    whole = float(threat_model(lab.norm).size(jnp.ones(lab.rows["x"].shape[1:])))
    radii = [lab.eps, *(r for r in (2 * lab.eps, 4 * lab.eps) if r < whole), whole]
    shares = {f"{r:g}": float(lab.many_steps("margin", eps=r).mean()) for r in radii[1:]}
    shares = {f"{lab.eps:g}": lab.share("margin"), **shares}
    found = list(shares.values())
    rise = max((b - a for a, b in zip(found, found[1:], strict=False)), default=0.0)
    verdict = _worst(lab.grade(rise, (0.02, 0.05)), lab.grade(found[-1], (0.02, 0.1)))
    listed = ", ".join(f"{_percent(share)} at {r}" for r, share in shares.items())
    return Check(
        "radius",
        verdict,
        f"share that holds by radius: {listed}, where the ball contains every image",
        "no network can hold where every image is allowed: it is the attack that fails there",
        shares,
    )


def _check_losses(lab: _Lab) -> Check:
    shares = {name: lab.share(name) for name in (*lab.losses, "rescaled")}
    usual = shares["cross_entropy"]
    drop = usual - min(shares.values())
    verdict = lab.grade(drop, _UNLIKE)
    own = shares.get("training_loss", usual)
    evidence = f"share that holds by loss: {_listed(shares)}"
    if verdict == "pass" and lab.grade(own - min(shares.values()), _UNLIKE) != "pass":
        verdict = "warn"
        evidence += "; the loss it was trained with is the weak attack"
    return Check(
        "losses",
        verdict,
        evidence,
        "quote the lowest: cross-entropy saturates on confident logits (rescaled: their gap is 1), "
        "and a loss the network was trained to be flat in says nothing",
        shares,
    )


def _check_precision(lab: _Lab) -> Check:
    single = lab.share("cross_entropy")
    advice = "gradients underflow in float32: attack rescaled logits, the margin or DLR"
    try:
        double = float(lab.double_precision().mean())
    except NotInDouble as reason:
        return Check("precision", "skipped", f"not compared with float64: {reason}", advice, {})
    return Check(
        "precision",
        lab.grade(single - double, _UNLIKE),
        f"{_percent(single)} hold in float32, {_percent(double)} in float64",
        advice,
        {"float32": single, "float64": double},
    )


def _check_noise(lab: _Lab) -> Check:
    run = lab.map_examples(_Noise(lab.norm))
    faint = 1 - float(run(lab.rows, lab.radius(lab.eps / 100)).mean())
    broken, standing = _broken(lab, lambda rows: run(rows, lab.radius(lab.eps)))
    verdict = _worst(lab.grade(broken, _LEFT_OVER), lab.grade(faint, (0.05, 0.2)))
    return Check(
        "noise",
        verdict,
        f"{_DRAWS} draws of uniform noise break {_percent(broken)} of the points that hold against "
        f"gradients ({standing} of {len(lab.logits)}); noise of eps/100 changes {_percent(faint)}",
        "an attack must beat noise, and predictions that faint noise changes have no useful "
        "gradient: use Square and smooth surrogates",
        {"broken": broken, "changed_by_faint_noise": faint},
    )


def _check_square(lab: _Lab, num_queries: int) -> Check:
    advice = "random search beats gradients only where those mislead: quote AutoAttack with Square"
    if lab.rows["x"].ndim != 4:
        evidence = f"Square's patches need images [N,H,W,C], not {list(lab.rows['x'].shape)}"
        return Check("square", "skipped", evidence, advice, {})
    threat = threat_model(lab.norm)
    if threat.patches is None:
        evidence = f"the norm {threat.name} has no patches, which Square draws"
        return Check("square", "skipped", evidence, advice, {})
    attack = lab.map_examples(_Held(square, lab.norm, 2, (("num_queries", num_queries),)))
    broken, standing = _broken(lab, lambda rows: attack(rows, lab.radius(lab.eps)))
    return Check(
        "square",
        lab.grade(broken, _LEFT_OVER),
        f"{num_queries} queries of random search break {_percent(broken)} of the points that hold "
        f"against gradients ({standing} of {len(lab.logits)})",
        advice,
        {"broken": broken},
    )


def _check_transfer(lab: _Lab, surrogates: Mapping[str, Network]) -> Check:
    attack = lab.map_examples(_Held(mim, lab.norm, 3, (("num_steps", 2 * _FEW_STEPS),)))
    shares = {}
    for name, network in surrogates.items():

        def held(rows, network=network):
            return attack(rows, lab.radius(lab.eps), network)

        shares[name], _ = _broken(lab, held)
    if not shares:
        return Check(
            "transfer",
            "skipped",
            "no surrogate was given",
            "give the logits of an undefended network for the same task",
            {},
        )
    return Check(
        "transfer",
        lab.grade(max(shares.values()), _LEFT_OVER),
        "of the points that hold against gradients, adversarials made on other networks break: "
        f"{_listed(shares)}",
        "another network's gradients beat its own, which mislead: attack it through surrogates",
        shares,
    )


@dataclasses.dataclass(frozen=True)
class _Held:
    """Which points hold against an attack on this network or on a given surrogate."""

    attack: Callable
    norm: Norm
    use: int  # folded into each point's key
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, logits_fn, rows, eps, surrogate=None):
        settings = {"eps": eps, "norm": self.norm, **dict(self.settings)}
        return _held(self.attack, logits_fn, rows, self.use, surrogate, **settings)


@dataclasses.dataclass(frozen=True)
class _Trajectory:
    """Largest gradient entry along PGD's path, [B,T] by loss, and whether gradients are finite."""

    norm: Norm

    def __call__(self, logits_fn, rows, eps):
        norm = threat_model(self.norm)

        def follow(loss, x, y, key):
            def step(x_adv, _):
                gradient = jax.grad(lambda z: loss(logits_fn(z[None]), y[None])[0])(x_adv)
                found = jnp.abs(gradient).max(), jnp.isfinite(gradient).all()
                move = norm.steepest(finite(gradient))
                x_adv = x_adv + 2.5 * eps / _FEW_STEPS * move
                return norm.project_to_ball_and_box(x_adv, x, eps), found

            start = norm.random_neighbour(key, x, eps)
            return jax.lax.scan(step, start, length=_FEW_STEPS)[1]

        largest, are_finite = {}, []
        for name, loss in (
            ("cross_entropy", losses.cross_entropy),
            ("margin", losses.margin_loss),
        ):
            one = jax.vmap(lambda x, y, key, loss=loss: follow(loss, x, y, key))
            largest[name], is_finite = one(rows["x"], rows["y"], fold_each(rows["key"], 1))
            are_finite.append(is_finite)
        return {**largest, "finite": are_finite[0] & are_finite[1]}


@dataclasses.dataclass(frozen=True)
class _Noise:
    """Which points keep their label under every draw of noise, uniform in the ball."""

    norm: Norm

    def __call__(self, logits_fn, rows, eps):
        def held(keys):
            def one(x, key):
                return threat_model(self.norm).random_neighbour(key, x, eps)

            return losses.correct(logits_fn(jax.vmap(one)(rows["x"], keys)), rows["y"])

        draws = jnp.arange(4, 4 + _DRAWS)
        return jax.lax.map(lambda i: held(fold_each(rows["key"], i)), draws).all(0)


def _broken(lab: _Lab, held: Callable) -> tuple[float, int]:
    """Share of audited points that survive gradients but not `held`, and how many survive."""
    rows = lab.standing()
    count = len(rows["y"])
    return (float((~held(rows)).sum()) / len(lab.logits) if count else 0.0), count


def _logits(logits_fn, rows):
    return logits_fn(rows["x"])


def _held(attack, logits_fn, rows, use, surrogate=None, **settings):
    """Which points hold against an attack on the network or a surrogate; use: see `_Held`."""
    attacked = logits_fn if surrogate is None else surrogate
    x_adv = attack(attacked, rows["x"], rows["y"], fold_each(rows["key"], use), **settings)
    return losses.correct(logits_fn(x_adv), rows["y"]).astype(bool)


def _grade(value: float, limits: tuple[float, float]) -> Grade:
    warn, fail = limits
    return "fail" if value > fail else "warn" if value > warn else "pass"


def _worst(*verdicts: Grade) -> Grade:
    return max(verdicts, key=get_args(Grade).index)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_percent(s)}" for name, s in shares.items())
