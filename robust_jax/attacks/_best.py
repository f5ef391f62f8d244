"""What the attacks share: the best point met so far, and what they look for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_jax import _checks, losses
from robust_jax._precision import wide_dtype
from robust_jax.attacks._success import Criterion, classified_as, misclassified
from robust_jax.types import Labels


class Best(NamedTuple):
    """The best point [...] met so far: a hit comes before the value, which is maximised."""

    x: Float[Array, "..."]
    value: Float[Array, ""]
    hit: Bool[Array, ""]

    @classmethod
    def nothing(cls, x) -> "Best":
        """x itself, ranked below any point visited later."""
        return cls(x, jnp.asarray(-jnp.inf, value_dtype(x)), jnp.asarray(False))

    def updated(self, x, value, hit) -> "Best":
        better = (hit & ~self.hit) | ((hit == self.hit) & (value > self.value))
        return jax.tree.map(partial(jnp.where, better), Best(x, value, hit), self)


def value_dtype(x):
    """The dtype in which losses at points like x are compared, at least float32."""
    return wide_dtype(x.dtype)


class Goal(NamedTuple):
    """What an attack maximises and when it has succeeded, given logits and a reference.

    The reference is y, or the targets if there are any; the loss towards targets is minimised.
    """

    loss: Callable
    targets: Labels | None = None
    criterion: Criterion | None = None

    def reference(self, y):
        return y if self.targets is None else jnp.asarray(self.targets)

    def judged(self, logits, reference):
        """Values and hits [S] of logits [S,K], for references [S]."""
        if self.targets is not None and self.loss is losses.dlr:
            raise ValueError(
                "losses.dlr is constant where a target ranks third, so it leads nowhere there: "
                "give loss=losses.margin_loss, or no targets"
            )
        values = _checks.one_number_each(self.loss(logits, reference))
        default = misclassified if self.targets is None else classified_as
        hits = (self.criterion or default)(logits, reference)
        return values if self.targets is None else -values, hits

    def at(self, logits_fn, x_adv, reference):
        """Value and hit of one point."""
        values, hits = self.judged(logits_fn(x_adv[None]), reference[None])
        return values[0].astype(value_dtype(x_adv)), hits[0]


def likeliest_wrong(
    logits: Float[Array, " k"],
    label: Int[Array, ""],
    num_targets: int,
    ranks: Sequence[int] | Int[Array, " r"] | None = None,
) -> tuple[Int[Array, " r"], Int[Array, " r"]]:
    """The wrong classes by decreasing logit, and their ranks from 2 on: [K], [] -> ([R], [R]).

    There are min(num_targets, K-1) of them, or those of the given ranks.
    """
    is_label = jnp.arange(len(logits), dtype=label.dtype) == label
    order = jnp.lexsort((-logits, is_label))[: len(logits) - 1]  # the label is last
    default = np.arange(2, 2 + min(num_targets, len(order)))
    if isinstance(ranks, Sequence) and not (ranks and 2 <= min(ranks) <= max(ranks) <= len(logits)):
        raise ValueError(
            f"ranks is {list(ranks)}; give one or more from 2, the likeliest wrong class, to "
            f"{len(logits)}, the least likely"
        )
    at = jnp.asarray(default if ranks is None else ranks, jnp.int32)
    return order[jnp.clip(at - 2, 0, len(order) - 1)].astype(label.dtype), at
