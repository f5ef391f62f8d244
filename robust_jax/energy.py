"""How much the loss moves in an example's neighbourhood: the energies of arXiv 1911.06479.

The paper was withdrawn from arXiv (version 2, June 2020). Its successor is Zhang, Huang, Xu 2022,
Re-thinking model robustness from stability, Machine Learning 111(7), 2489-2513,
doi 10.1007/s10994-022-06186-9: there the energy is said to describe the total variation of the loss
in a small neighbourhood. We worked from the abstracts of both: these are our readings.

- `total_variation` takes the successor literally, and `path` is its square along the path to the
  worst point. `oscillation` compares the extremes of the loss, and `mean_square` averages over
  random points.
- Adversarial training minimises max ℓ(x+r), an upper bound of √`rise`. For each example the rise is
  a lower bound of `path` and of `oscillation`, but not of `mean_square`, which averages what
  adversarial training maximises.

The neighbourhood is the eps-ball cut to [0,1]. ℓ is the cross-entropy with labels y [B], in nats;
with y=None it is label-free, KL(p(x) ‖ p) from the prediction at x itself, which is held fixed, as
in VAT (arXiv 1704.03976). VAT's term is that KL at one r of length eps, not cut to [0,1]; if x + r
is in the box and the attack finds the maximum, it is at most √`rise` (label-free). All are
differentiable in the network's parameters at the points where they evaluate the loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import length_in
from robust_jax.attacks import Norm, ThreatModel, never, pgd
from robust_jax.attacks.norms import threat_model
from robust_jax.keys import example_keys, fold_each
from robust_jax.types import Array, Images, KeyOrKeys, Labels, Length, LogitsFn, PerExample

__all__ = ["mean_square", "oscillation", "path", "rise", "total_variation"]


def __dir__() -> list[str]:
    return __all__


@compiled
def mean_square(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels | None,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_samples: int = 1,
) -> PerExample:
    """E (ℓ(x+r) - ℓ(x))², r uniform in the ball and moved into the box (our reading).

    Costs num_samples + 1 forward passes of the whole batch, one at a time; its gradient keeps all
    their activations.

    Args:
        logits_fn: The network, [B,...] -> [B,K], each example on its own.
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B]; None for the label-free energy.
        key: One key, folded with each example's place in the batch, or a key per example [B].
        eps: The radius of the ball, in pixel units.
        norm: The norm of the ball.
        num_samples: The number of samples r in the mean.

    Returns:
        [B], in nats².

    Raises:
        ValueError: eps is negative, the norm unknown or num_samples below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import energy
        >>> logits_fn = lambda x: jnp.stack([0 * x[:, 0], 40 + x[:, 0]], -1)  # ℓ = 40 + x
        >>> x, y, key = jnp.array([[0.5]]), jnp.array([0]), jax.random.key(0)
        >>> energy.mean_square(logits_fn, x, y, key, eps=0.1, num_samples=5000)  # eps²/3
        Array([0.003], dtype=float32)
    """
    loss, reference = _loss_around(logits_fn, x, y)
    value = loss(logits_fn(x), reference)

    def sample(neighbour):
        return (loss(logits_fn(neighbour), reference) - value) ** 2

    return _mean_over_ball(sample, x, key, eps, threat_model(norm), num_samples)


@compiled
def oscillation(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels | None,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: Length | None = None,
) -> PerExample:
    """(max ℓ(x+r) - min ℓ(x+r))², each the best found by PGD or at x (our reading).

    x is among the points, so this is never below (max ℓ(x+r) - ℓ(x))², the `rise`. Costs two
    attacks of num_steps, or one if label-free (KL is least at x), each with a forward and a
    backward pass per step, and a forward pass for each end and x, on the whole batch at once.

    Args:
        logits_fn: The network, [B,...] -> [B,K], each example on its own.
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B]; None for the label-free energy.
        key: One key, folded with each example's place in the batch, or a key per example [B].
        eps: The radius of the ball, in pixel units.
        norm: The norm of the ball.
        num_steps: Gradient steps of an attack.
        step_size: The step of an attack, in pixel units; 2.5·eps/num_steps by default.

    Returns:
        [B], in nats².

    Raises:
        ValueError: As `attacks.pgd` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import energy
        >>> logits_fn = lambda x: jnp.stack([0 * x[:, 0], 40 + x[:, 0]], -1)  # ℓ = 40 + x
        >>> x, y, key = jnp.array([[0.5]]), jnp.array([0]), jax.random.key(0)
        >>> energy.oscillation(logits_fn, x, y, key, eps=0.1)  # (2·eps)²
        Array([0.04], dtype=float32)
    """
    values = _ends(
        logits_fn,
        x,
        y,
        key,
        (1.0,) if y is None else (1.0, -1.0),
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
    )
    return (values.max(0) - values.min(0)) ** 2


@compiled
def rise(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels | None,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: Length | None = None,
) -> PerExample:
    """(max ℓ(x+r) - ℓ(x))² (our reading): at most `oscillation`.

    Its root is at most max ℓ(x+r), which adversarial training minimises. With the same arguments it
    uses the same maximum as `oscillation`. Costs an attack of num_steps and two forward passes.

    Args:
        logits_fn: The network, [B,...] -> [B,K], each example on its own.
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B]; None for the label-free energy.
        key: One key, folded with each example's place in the batch, or a key per example [B].
        eps: The radius of the ball, in pixel units.
        norm: The norm of the ball.
        num_steps: Gradient steps of an attack.
        step_size: The step of an attack, in pixel units; 2.5·eps/num_steps by default.

    Returns:
        [B], in nats².

    Raises:
        ValueError: As `attacks.pgd` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import energy
        >>> logits_fn = lambda x: jnp.stack([0 * x[:, 0], 40 + x[:, 0]], -1)  # ℓ = 40 + x
        >>> x, y, key = jnp.array([[0.5]]), jnp.array([0]), jax.random.key(0)
        >>> energy.rise(logits_fn, x, y, key, eps=0.1)  # eps²
        Array([0.01], dtype=float32)
    """
    values = _ends(
        logits_fn, x, y, key, (1.0,), eps=eps, norm=norm, num_steps=num_steps, step_size=step_size
    )
    return (values.max(0) - values[0]) ** 2


@compiled
def total_variation(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels | None,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_samples: int = 1,
    squared: bool = False,
) -> PerExample:
    """E ‖∇ℓ(x+r)‖ in the dual norm, r uniform in the ball and moved into the box (our reading).

    Multiplied by eps, it bounds to first order how much the loss moves in a step of that length.
    Costs a forward and a backward pass of the whole batch for each sample, one at a time; its
    gradient keeps all their activations.

    Args:
        logits_fn: The network, [B,...] -> [B,K], each example on its own.
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B]; None for the label-free energy.
        key: One key, folded with each example's place in the batch, or a key per example [B].
        eps: The radius of the ball, in pixel units.
        norm: The norm of the ball.
        num_samples: The number of samples r in the mean.
        squared: Whether the norm is squared before the mean.

    Returns:
        [B], in nats per pixel unit, or the square of that.

    Raises:
        ValueError: eps is negative, the norm unknown or num_samples below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import energy
        >>> logits_fn = lambda x: jnp.stack([0 * x[:, 0], 40 + x[:, 0]], -1)  # ℓ = 40 + x
        >>> x, y, key = jnp.array([[0.5]]), jnp.array([0]), jax.random.key(0)
        >>> energy.total_variation(logits_fn, x, y, key, eps=0.1)
        Array([1.], dtype=float32)
    """
    threat = threat_model(norm)
    loss, reference = _loss_around(logits_fn, x, y)

    def summed(x):
        logits = logits_fn(x)
        if y is not None:
            # Exact even where the label's probability would round to 1, and its slope to 0.
            logits -= jnp.take_along_axis(logits, jnp.asarray(y)[:, None], axis=-1)
        return loss(logits, reference).sum()

    def sample(neighbour):
        gradient = jax.grad(summed)(neighbour)
        slope = jax.vmap(threat.slope)(gradient)
        return slope**2 if squared else slope

    return _mean_over_ball(sample, x, key, eps, threat, num_samples)


@compiled
def path(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels | None,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: Length | None = None,
    num_pieces: int = 4,
) -> PerExample:
    """n · Σ_i (ℓ(x + r·i/n) - ℓ(x + r·(i-1)/n))², to the point x + r that PGD finds (our reading).

    For n = num_pieces = 1 it is `rise` if PGD raises the loss at all, and for any n it is at least
    that (Cauchy-Schwarz). Doubling n never lowers it; the limit is ∫₀¹ (∇ℓ(x+tr)·r)² dt, the
    squared variation of the loss along the path. So it also sees what lies between x and the worst
    point. Costs an attack of num_steps and n + 1 forward passes.

    Args:
        logits_fn: The network, [B,...] -> [B,K], each example on its own.
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B]; None for the label-free energy.
        key: One key, folded with each example's place in the batch, or a key per example [B].
        eps: The radius of the ball, in pixel units.
        norm: The norm of the ball.
        num_steps: Gradient steps of an attack.
        step_size: The step of an attack, in pixel units; 2.5·eps/num_steps by default.
        num_pieces: The number of pieces that the path is cut into.

    Returns:
        [B], in nats².

    Raises:
        ValueError: num_pieces is below 1; else as `attacks.pgd` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import energy
        >>> logits_fn = lambda x: jnp.stack([0 * x[:, 0], 40 + x[:, 0]], -1)  # ℓ = 40 + x
        >>> x, y, key = jnp.array([[0.5]]), jnp.array([0]), jax.random.key(0)
        >>> energy.path(logits_fn, x, y, key, eps=0.1)  # eps², as the loss rises evenly
        Array([0.01], dtype=float32)
    """
    _checks.counts(num_pieces=num_pieces)
    loss, reference = _loss_around(logits_fn, x, y)
    worst = _end(
        logits_fn,
        x,
        key,
        loss,
        reference,
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
    )

    def at(share):
        return loss(logits_fn(x + share * (worst - x)), reference)

    values = jax.lax.map(at, jnp.linspace(0, 1, num_pieces + 1, dtype=x.dtype))
    return num_pieces * (jnp.diff(values, axis=0) ** 2).sum(0)


def _ends(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels | None,
    key: KeyOrKeys,
    signs: tuple[float, ...],
    **settings,
) -> Float[Array, "n b"]:
    """ℓ at x itself and at the last point of PGD on ℓ times each sign."""
    loss, reference = _loss_around(logits_fn, x, y)
    ends = [
        _end(logits_fn, x, key, loss, reference, salt, sign, **settings)
        for salt, sign in enumerate(signs)
    ]
    return jnp.stack([loss(logits_fn(point), reference) for point in (x, *ends)])


def _end(
    logits_fn: LogitsFn,
    x: Images,
    key: KeyOrKeys,
    loss: Callable,
    reference: Array,
    salt: int = 0,
    sign: float = 1.0,
    **settings,
) -> Images:
    """Returns the last point of PGD on the loss times a sign."""
    found = pgd(
        logits_fn,
        x,
        reference,
        fold_each(example_keys(key, x.shape[0]), salt),
        loss=lambda logits, reference: sign * loss(logits, reference),
        # Only the loss counts, even at its minimum, where nothing is misclassified.
        criterion=never,
        **settings,
    )
    return jax.lax.stop_gradient(found)


def _mean_over_ball(
    value: Callable, x: Images, key: KeyOrKeys, eps: Length, threat: ThreatModel, num_samples: int
) -> PerExample:
    """The mean of value(neighbours) over num_samples draws from the ball, one at a time."""
    _checks.known_lengths(eps=eps)
    _checks.counts(num_samples=num_samples)
    keys = example_keys(key, x.shape[0])

    def draw(x, key):
        return threat.random_neighbour(key, x, length_in(eps, x.dtype))

    def sample(i):
        return value(jax.vmap(draw)(x, fold_each(keys, i)))

    return jax.lax.map(sample, jnp.arange(num_samples)).mean(0)


def _loss_around(logits_fn: LogitsFn, x: Images, y: Labels | None) -> tuple[Callable, Array]:
    """ℓ(logits, reference) and the reference of each example."""
    if y is None:
        return losses.kl, jax.lax.stop_gradient(logits_fn(x))
    return losses.cross_entropy, y
