"""What training minimises: a loss on one or both halves of the batch, plus weighted regularisers.

The clean half is the batch; the adversarial half is made from it once, by one adversary against
the evaluation-mode network, and shared by everything that needs it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robust_jax import losses
from robust_jax.data import UNLABELED
from robust_jax.keys import fold_each, fold_in_each
from robust_jax.train.regularizers import HALVES, Half, LossOn, Term, mean

Params = Any
BatchStats = Any
Batch = Mapping[str, Array]
# Sums over examples and the number of examples summed, by name; the metric is their ratio.
Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
# apply(params, batch_stats, x, train, keys) -> (logits, new batch_stats); the keys [B] seed what
# the network draws in training, such as dropout, and are None in evaluation.
Apply = Callable[
    [Params, BatchStats, Array, bool, Key[Array, " b"] | None], tuple[Array, BatchStats]
]
# What an example's key is folded with: 0 for the attack, 1… for the terms, and these for dropout.
_DROPOUT = {"clean": 1000, "adversarial": 1001}


class Adversary(NamedTuple):
    """attack(logits_fn, x, y, keys) -> x_adv; against_clean_logits: y is the clean logits."""

    attack: Callable
    against_clean_logits: bool = False


@dataclasses.dataclass(frozen=True)
class Objective:
    """objective(params, batch_stats, batch, key) -> (per_example [B], (batch_stats, sums)).

    It runs two parts in turn, with the same arguments: attack returns the batch with its
    adversarial half, and loss is of that batch. A caller that takes several gradients of one batch
    calls them separately.
    """

    attack: Callable[..., Batch]
    loss: Callable[..., tuple[Float[Array, " b"], tuple[BatchStats, Sums]]]

    def __call__(self, params, batch_stats, batch, key):
        return self.loss(params, batch_stats, self.attack(params, batch_stats, batch, key), key)


def make_objective(
    apply: Apply,
    *,
    loss: losses.Loss,
    loss_on: LossOn,
    adversary: Adversary | None = None,
    terms: Mapping[str, Term] | None = None,
    labeled_fraction: float = 1.0,
) -> Objective:
    """The objective of a loss, an adversary and regularisers.

    batch: image [B,H,W,C] in [0,1], label [B] (-1 where unlabelled), position [B], the row's
    place in the global batch, with which key is folded. terms: by the labels under which their
    values are logged. On "both" halves a loss or a term is the mean of the two. Unlabelled examples
    have no loss; the others' is divided by labeled_fraction, the share of labels in every global
    batch, so that the batch's mean is the mean over labels. Running statistics are those of the
    forward passes the loss is taken on. Raises ValueError if something needs the adversarial half
    and there is no adversary.
    """
    terms = terms or {}
    _check_half("loss_on", loss_on)
    for name, term in terms.items():
        _check_half(f"regularizers.{name}.on", term.on)
    loss_halves = HALVES[loss_on]
    needed = halves_needed(loss_on, terms)
    if adversary is None and "adversarial" in needed:
        users = [name for name, term in terms.items() if "adversarial" in term.halves]
        what = "loss_on" if "adversarial" in loss_halves else f"regularizers.{users[0]}"
        raise ValueError(
            f"{what} needs the adversarial half of the batch, but adversary is None; "
            "give an adversary or use the clean half"
        )

    def evaluation_network(params, batch_stats):
        return lambda x: apply(params, batch_stats, x, False, None)[0]

    def attack(params, batch_stats, batch, key):
        if adversary is None or "adversarial" not in needed:
            return batch
        x, y = batch["image"], batch["label"]
        # Stopped at the parameters, not at the result, so that their derivative is never traced.
        frozen = evaluation_network(jax.lax.stop_gradient(params), batch_stats)
        if adversary.against_clean_logits:
            y = frozen(x)
        elif labeled_fraction < 1:  # unlabelled: away from the predicted class
            y = jnp.where(y != UNLABELED, y, jnp.argmax(frozen(x), -1))
        keys = fold_each(fold_in_each(key, batch["position"]), 0)
        return {**batch, "adversarial": adversary.attack(frozen, x, y, keys)}

    def total_loss(params, batch_stats, batch, key):
        labels = batch["label"]
        labeled = labels != UNLABELED
        # Any class will do in an unlabelled example's loss, which is multiplied by zero.
        known = jnp.where(labeled, labels, 0)
        keys = fold_in_each(key, batch["position"])
        halves: dict[str, Half] = {}
        new_stats = batch_stats
        for name in sorted(needed, reverse=True):  # clean first, also for the statistics
            stats_before = new_stats if name in loss_halves else batch_stats
            images = batch["image" if name == "clean" else name]
            dropout_keys = fold_each(keys, _DROPOUT[name])
            logits, stats = apply(params, stats_before, images, True, dropout_keys)
            halves[name] = Half(images, logits)
            new_stats = stats if name in loss_halves else new_stats

        network = evaluation_network(params, batch_stats)
        weight = labeled / labeled_fraction
        supervised = mean(weight * loss(halves[h].logits, known) for h in loss_halves)
        total, count = supervised, jnp.asarray(float(labels.shape[0]))
        sums: Sums = {}
        for i, (name, term) in enumerate(terms.items()):
            values = term(
                halves, logits_fn=network, labels=known, keys=fold_each(keys, i + 1), params=params
            )
            values = jnp.broadcast_to(values, labels.shape)
            if term.needs_labels:
                values = values * weight
            total = total + term.weight * values
            sums[f"regularizers/{name}"] = (values.sum(), count)
        for name in halves:
            right = losses.correct(halves[name].logits, known) * labeled
            sums[f"{name}_accuracy"] = (right.sum(), labeled.sum().astype(jnp.float32))
        sums["supervised_loss"] = (supervised.sum(), count)
        sums["loss"] = (total.sum(), count)
        return total, (new_stats, sums)

    return Objective(attack, total_loss)


def halves_needed(loss_on: LossOn, terms: Mapping[str, Term]) -> set[str]:
    """The halves of the batch, "clean" and "adversarial", that an objective looks at."""
    return {*HALVES[loss_on], *(half for term in terms.values() for half in term.halves)}


def _check_half(name: str, value: str) -> None:
    if value not in tuple(HALVES):  # a tuple also compares unhashable values
        raise ValueError(f"{name} must be one of {', '.join(HALVES)}, not {value!r}")
