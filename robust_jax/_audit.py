"""Is this robustness real? Checks for masked gradients, each with its verdict and evidence.

What they look for: arXiv 1802.00420, 1902.06705 (§5) and 2003.01690. Thresholds are our reading.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from robust_jax import losses
from robust_jax.attacks import mim, norms, pgd, square
from robust_jax.attacks._autoattack import are_probabilities, is_random
from robust_jax.attacks.norms import Norm
from robust_jax.batches import MapExamples, on_one_device
from robust_jax.errors import NothingToAudit
from robust_jax.keys import example_keys, fold_each
from robust_jax.progress import progress as progress_bar
from robust_jax.types import KeyOrKeys, LogitsFn

Verdict = Literal["skipped", "pass", "warn", "fail"]  # from good to bad
_FEW_STEPS, _MANY_STEPS, _RESTARTS, _DRAWS = 10, 50, 5, 10
# Of the audited points: what a weaker attack may break and stronger ones leave, by (warn, fail).
_LEFT_OVER = (0.01, 0.05)
# How far attacks that ought to be alike may differ in accuracy.
_UNLIKE = (0.05, 0.15)


class Check(NamedTuple):
    """One check: its verdict, the evidence as a sentence, what to do about it, the numbers."""

    name: str
    verdict: Verdict
    evidence: str
    advice: str
    values: dict[str, float]


class Audit(NamedTuple):
    """The checks made on num_examples points that the network gets right, and the worst verdict."""

    verdict: Verdict
    checks: tuple[Check, ...]
    norm: Norm
    eps: float
    num_examples: int


def audit(
    logits_fn: LogitsFn,
    x: Float[np.ndarray, "n h w c"],
    y: Int[np.ndarray, " n"],
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
    """Looks for reasons not to believe a robust accuracy measured by following gradients.

    A network passes where gradients are there to follow, attacks get stronger with steps, radius
    and restarts, agree across losses, scales and precision, and leave nothing that noise, random
    search or other networks' adversarials break. logits_fn: [B,H,W,C] in [0,1] -> [B,K]. x, y:
    some hundred examples [N,H,W,C], [N]; those classified right are audited. key: one key, or one
    for each example [N]. eps, norm: the threat model, pixel units. training_loss: the loss that
    the network was trained with. surrogates: other networks for the same task, by name; give an
    undefended one. num_queries: of Square. map_examples: as in `autoattack`. Raises ValueError
    where no example is classified right or eps is not above 0.
    """
    if not eps > 0:
        raise ValueError(f"eps must be above 0, not {eps!r} (pixels are in [0,1])")
    norms.check(norm)
    map_examples = map_examples or on_one_device(logits_fn, batch_size)
    x, y = np.asarray(x, np.float32), np.asarray(y, np.int32)
    keys = np.asarray(jax.random.key_data(example_keys(key, len(x))))
    rows = {"x": x, "y": y, "key": keys}
    logits = map_examples(_logits)(rows)
    right = np.asarray(losses.correct(jnp.asarray(logits), jnp.asarray(y)), bool)
    if not right.any():
        raise NothingToAudit(f"none of the {len(x)} examples is classified right: nothing to audit")
    all_rows, all_logits = rows, logits
    rows, logits = {name: array[right] for name, array in rows.items()}, logits[right]

    lab = _Lab(map_examples, rows, logits, eps, norm, training_loss)
    checks = []
    with progress_bar(11, "audit", "check", shown=progress) as bar:
        looked_at = all_logits, all_rows["x"], logits_fn
        for found in _checks(lab, *looked_at, surrogates or {}, num_queries):
            checks.append(found)
            bar.set_postfix_str(found.name, refresh=False)
            bar.update()
    verdict = max((check.verdict for check in checks), key=get_args(Verdict).index)
    return Audit(verdict, tuple(checks), norm, float(eps), len(logits))


def _checks(lab: "_Lab", logits, x, logits_fn, surrogates, num_queries) -> Iterator[Check]:
    """The checks in turn; the first three look at all examples, also those it gets wrong."""
    yield _check_outputs(logits)
    yield _check_randomness(logits_fn, x[:16])
    yield _check_batch(logits_fn, x[:16])
    yield _check_gradients(lab)
    yield _check_steps(lab)
    yield _check_radius(lab)
    yield _check_losses(lab)
    yield _check_precision(lab)
    yield _check_noise(lab)
    yield _check_square(lab, num_queries)
    yield _check_transfer(lab, surrogates)


class _Lab:
    """The audited points and what attacks that follow gradients leave of them."""

    def __init__(
        self,
        map_examples: MapExamples,
        rows: Mapping[str, np.ndarray],
        logits: np.ndarray,
        eps: float,
        norm: Norm,
        training_loss: losses.Loss | None,
    ):
        self.map_examples, self.rows, self.logits = map_examples, rows, logits
        self.eps, self.norm = float(eps), norm
        self.losses: dict[str, losses.Loss] = {
            "cross_entropy": losses.cross_entropy,
            "margin": losses.carlini_wagner,
        }
        if logits.shape[-1] >= 3:
            self.losses["dlr"] = losses.dlr
        if training_loss is not None:
            self.losses["training_loss"] = training_loss
        top = np.sort(logits, -1)
        self.gap = float(np.mean(top[:, -1] - top[:, -2]))
        # One program for all losses, scales and radii: they are arguments of it.
        self._many_steps = map_examples(self._attack(num_steps=_MANY_STEPS))
        self._held = {name: self.many_steps(name) for name in self.losses}
        self._held["rescaled"] = self.many_steps("cross_entropy", scale=1 / max(self.gap, 1e-30))
        self._held["few_steps"] = self.run(self._attack(num_steps=_FEW_STEPS))
        self._held["restarts"] = self.run(
            self._attack(num_steps=_FEW_STEPS, num_restarts=_RESTARTS)
        )

    def _attack(self, **keywords) -> Callable:
        """PGD as `map_examples` takes it, on the loss of a number, of logits times a scale."""
        branches = list(self.losses.values())

        def attack(logits_fn, rows, eps, which, scale):
            def loss(logits, labels):
                return jax.lax.switch(which, branches, logits * scale, labels)

            x_adv = pgd(
                logits_fn, rows["x"], rows["y"], _keys(rows, 0),
                eps=eps, norm=self.norm, loss=loss, **keywords,
            )  # fmt: skip
            return losses.correct(logits_fn(x_adv), rows["y"]).astype(bool)

        return attack

    def many_steps(self, loss: str, *, eps: float | None = None, scale: float = 1.0):
        which = list(self.losses).index(loss)
        return self._many_steps(self.rows, eps or self.eps, np.int32(which), np.float32(scale))

    def run(self, attack: Callable) -> Bool[np.ndarray, " n"]:
        """Which points hold against cross-entropy, by an attack made by `_attack`."""
        return self.map_examples(attack)(self.rows, self.eps, np.int32(0), np.float32(1.0))

    def double_precision(self) -> Bool[np.ndarray, " n"]:
        """Which points hold against cross-entropy in float64, as far as the network goes along."""

        def attack(logits_fn, rows):
            x = rows["x"].astype(jnp.float64)

            def in_double(x):
                return logits_fn(x).astype(jnp.float64)

            x_adv = pgd(
                in_double, x, rows["y"], _keys(rows, 0),
                eps=self.eps, norm=self.norm, num_steps=_MANY_STEPS,
            )  # fmt: skip
            return losses.correct(in_double(x_adv), rows["y"]).astype(bool)

        with jax.enable_x64(True):
            return self.map_examples(attack)(self.rows)

    def share(self, name: str) -> float:
        """The share of the points that held against one of the attacks."""
        return float(self._held[name].mean())

    def standing(self) -> dict[str, np.ndarray]:
        """The points that held against every attack that follows gradients."""
        held = np.logical_and.reduce(list(self._held.values()))
        return {name: array[held] for name, array in self.rows.items()}


def _check_outputs(logits) -> Check:
    is_finite = np.isfinite(logits).all(-1)
    finite = float(is_finite.mean())
    probabilities = are_probabilities(logits[is_finite])
    values = {"share_finite": finite, "probabilities": float(probabilities)}
    if probabilities:
        evidence = "the outputs are in [0, 1] and sum to 1: they are probabilities, not logits"
    else:
        evidence = f"the outputs are logits, {_percent(finite)} of them finite"
    return Check(
        "outputs", "fail" if probabilities or finite < 1 else "pass", evidence,
        "return what goes into the softmax: its result saturates and takes the gradient with it",
        values,
    )  # fmt: skip


def _check_randomness(logits_fn, x) -> Check:
    random = is_random(logits_fn, x)
    word = "differ" if random else "agree"
    return Check(
        "randomness", "fail" if random else "pass",
        f"two forward passes of the same {len(x)} images {word}",
        'average gradients over draws: autoattack(…, version="rand") with logits_fn(x, key)',
        {"differs": float(random)},
    )  # fmt: skip


def _check_batch(logits_fn, x) -> Check:
    together = np.asarray(logits_fn(x))
    alone = np.concatenate([np.asarray(logits_fn(x[i : i + 1])) for i in range(min(4, len(x)))])
    change = np.abs(together[: len(alone)] - alone).max() / (np.abs(alone).max() + 1e-30)
    change = float(np.nan_to_num(change, nan=np.inf))
    return Check(
        "batch", "fail" if change > 1e-2 else "pass",
        f"an image's logits change by {change:.1g} of their size when it is alone in its batch",
        "use running statistics (train=False): a network that looks at the whole batch lets one "
        "example's attack move another's prediction",
        {"relative_change": change},
    )  # fmt: skip


def _check_gradients(lab: _Lab) -> Check:
    found = lab.map_examples(_trajectory(lab.norm))(lab.rows, lab.eps)
    # Any step of an example's path counts: attacks start where gradients are, and get stuck later.
    shares = {
        "zero": float((found["cross_entropy"] == 0).mean()),
        "zero_margin": float((found["margin"] == 0).mean()),
        "vanishing": float((found["cross_entropy"] < 1e-20).mean()),
        "not_finite": float((~found["finite"]).mean()),
    }
    worst = max(shares["zero"], shares["zero_margin"], shares["not_finite"])
    verdict = _grade(worst, (0.02, 0.1))
    if verdict == "pass" and shares["vanishing"] > 0.1:
        verdict = "warn"
    return Check(
        "gradients", verdict,
        f"along the path of an attack {_percent(shares['zero'])} of cross-entropy's gradients are "
        f"zero, {_percent(shares['vanishing'])} below 1e-20, "
        f"{_percent(shares['not_finite'])} not finite; of the margin's "
        f"{_percent(shares['zero_margin'])} are zero",
        "attack the margin or DLR, replace what has no derivative by something that has (BPDA, "
        "arXiv 1802.00420), and trust Square more than PGD",
        shares,
    )  # fmt: skip


def _check_steps(lab: _Lab) -> Check:
    few, many, restarts = (lab.share(n) for n in ("few_steps", "cross_entropy", "restarts"))
    verdict = _worse(_grade(many - few, (0.02, 0.05)), _grade(few - restarts, (0.2, 0.4)))
    return Check(
        "steps", verdict,
        f"{_percent(few)} hold against {_FEW_STEPS} steps, {_percent(many)} against {_MANY_STEPS}, "
        f"{_percent(restarts)} against {_RESTARTS} restarts of {_FEW_STEPS}",
        "more steps must not help the defence and restarts should not find much more: the loss is "
        "rugged, so quote AutoAttack with Square, not PGD",
        {"few_steps": few, "many_steps": many, "restarts": restarts},
    )  # fmt: skip


def _check_radius(lab: _Lab) -> Check:
    whole = float(norms.size(jnp.ones(lab.rows["x"].shape[1:]), lab.norm))
    radii = [lab.eps, *(r for r in (2 * lab.eps, 4 * lab.eps) if r < whole), whole]
    shares = {f"{r:g}": float(lab.many_steps("margin", eps=r).mean()) for r in radii[1:]}
    shares = {f"{lab.eps:g}": lab.share("margin"), **shares}
    found = list(shares.values())
    rise = max((b - a for a, b in zip(found, found[1:], strict=False)), default=0.0)
    verdict = _worse(_grade(rise, (0.02, 0.05)), _grade(found[-1], (0.02, 0.1)))
    listed = ", ".join(f"{_percent(share)} at {r}" for r, share in shares.items())
    return Check(
        "radius", verdict,
        f"share that holds by radius: {listed}, which holds every image",
        "no network holds where every image is allowed: the attack fails, not the network yields",
        shares,
    )  # fmt: skip


def _check_losses(lab: _Lab) -> Check:
    shares = {name: lab.share(name) for name in (*lab.losses, "rescaled")}
    usual = shares["cross_entropy"]
    drop = usual - min(shares.values())
    verdict = _grade(drop, _UNLIKE)
    own = shares.get("training_loss", usual)
    evidence = f"share that holds by loss: {_listed(shares)}"
    if verdict == "pass" and own - min(shares.values()) > _UNLIKE[0]:
        verdict = "warn"
        evidence += "; the loss it was trained with is the weak attack"
    return Check(
        "losses", verdict, evidence,
        "quote the lowest: cross-entropy saturates on confident logits (rescaled: their gap is 1), "
        "and a loss the network was trained to be flat in says nothing",
        shares,
    )  # fmt: skip


def _check_precision(lab: _Lab) -> Check:
    single, double = lab.share("cross_entropy"), float(lab.double_precision().mean())
    return Check(
        "precision", _grade(single - double, _UNLIKE),
        f"{_percent(single)} hold in float32, {_percent(double)} in float64",
        "gradients underflow in float32: attack rescaled logits, the margin or DLR",
        {"float32": single, "float64": double},
    )  # fmt: skip


def _check_noise(lab: _Lab) -> Check:
    run = lab.map_examples(_noise(lab.norm))
    faint = 1 - float(run(lab.rows, lab.eps / 100).mean())
    broken, standing = _broken(lab, lambda rows: run(rows, lab.eps))
    verdict = _worse(_grade(broken, _LEFT_OVER), _grade(faint, (0.05, 0.2)))
    return Check(
        "noise", verdict,
        f"{_DRAWS} draws of uniform noise break {_percent(broken)} of the points that hold against "
        f"gradients ({standing} of {len(lab.logits)}); noise of eps/100 changes {_percent(faint)}",
        "an attack must beat noise, and predictions that faint noise changes have no useful "
        "gradient: use Square and smooth surrogates",
        {"broken": broken, "changed_by_faint_noise": faint},
    )  # fmt: skip


def _check_square(lab: _Lab, num_queries: int) -> Check:
    def attack(logits_fn, rows):
        x_adv = square(
            logits_fn, rows["x"], rows["y"], _keys(rows, 2),
            eps=lab.eps, norm=lab.norm, num_queries=num_queries,
        )  # fmt: skip
        return losses.correct(logits_fn(x_adv), rows["y"]).astype(bool)

    broken, standing = _broken(lab, lab.map_examples(attack))
    return Check(
        "square", _grade(broken, _LEFT_OVER),
        f"{num_queries} queries of random search break {_percent(broken)} of the points that hold "
        f"against gradients ({standing} of {len(lab.logits)})",
        "random search beats gradients only where those mislead: quote AutoAttack with Square",
        {"broken": broken},
    )  # fmt: skip


def _check_transfer(lab: _Lab, surrogates: Mapping[str, LogitsFn]) -> Check:
    shares = {}
    for name, surrogate in surrogates.items():

        def attack(logits_fn, rows, surrogate=surrogate):
            x_adv = mim(
                surrogate, rows["x"], rows["y"], _keys(rows, 3),
                eps=lab.eps, norm=lab.norm, num_steps=2 * _FEW_STEPS,
            )  # fmt: skip
            return losses.correct(logits_fn(x_adv), rows["y"]).astype(bool)

        shares[name], _ = _broken(lab, lab.map_examples(attack))
    if not shares:
        return Check(
            "transfer", "skipped", "no surrogate was given",
            "give the logits of an undefended network for the same task", {},
        )  # fmt: skip
    return Check(
        "transfer", _grade(max(shares.values()), _LEFT_OVER),
        "of the points that hold against gradients, adversarials made on other networks break: "
        f"{_listed(shares)}",
        "another network's gradients beat its own, which mislead: attack it through surrogates",
        shares,
    )  # fmt: skip


def _trajectory(norm: Norm) -> Callable:
    """Largest entry of the gradients along PGD's path, [B,T] by loss, and if they are finite."""

    def measure(logits_fn, rows, eps):
        def follow(loss, x, y, key):
            def step(x_adv, _):
                gradient = jax.grad(lambda z: loss(logits_fn(z[None]), y[None])[0])(x_adv)
                found = jnp.abs(gradient).max(), jnp.isfinite(gradient).all()
                move = norms.steepest(jnp.nan_to_num(gradient), norm)
                x_adv = x_adv + 2.5 * eps / _FEW_STEPS * move
                return norms.project_to_ball_and_box(x_adv, x, eps, norm), found

            start = x + norms.random_in_ball(key, x.shape, eps, norm)
            start = norms.project_to_ball_and_box(start, x, eps, norm)
            return jax.lax.scan(step, start, length=_FEW_STEPS)[1]

        largest, finite = {}, []
        for name, loss in (
            ("cross_entropy", losses.cross_entropy),
            ("margin", losses.carlini_wagner),
        ):
            one = jax.vmap(lambda x, y, key, loss=loss: follow(loss, x, y, key))
            largest[name], is_finite = one(rows["x"], rows["y"], _keys(rows, 1))
            finite.append(is_finite)
        return {**largest, "finite": finite[0] & finite[1]}

    return measure


def _noise(norm: Norm) -> Callable:
    """Which points keep their label under every draw of noise, uniform in the ball."""

    def measure(logits_fn, rows, eps):
        def held(keys):
            def one(x, key):
                noise = norms.random_in_ball(key, x.shape, eps, norm)
                return norms.project_to_ball_and_box(x + noise, x, eps, norm)

            return losses.correct(logits_fn(jax.vmap(one)(rows["x"], keys)), rows["y"])

        draws = jnp.arange(4, 4 + _DRAWS)
        return jax.lax.map(lambda i: held(_keys(rows, i)), draws).all(0)

    return measure


def _broken(lab: _Lab, held: Callable) -> tuple[float, int]:
    """The share of the audited points that gradients left and this breaks; how many they left."""
    rows = lab.standing()
    count = len(rows["y"])
    return (float((~held(rows)).sum()) / len(lab.logits) if count else 0.0), count


def _logits(logits_fn, rows):
    return logits_fn(rows["x"])


def _keys(rows: Mapping[str, Any], use: Any):
    return fold_each(jax.random.wrap_key_data(rows["key"]), use)


def _grade(value: float, limits: tuple[float, float]) -> Verdict:
    warn, fail = limits
    return "fail" if value > fail else "warn" if value > warn else "pass"


def _worse(*verdicts: Verdict) -> Verdict:
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "pass"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_percent(s)}" for name, s in shares.items())
