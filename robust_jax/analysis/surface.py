"""The loss around an image: on a plane through it, and on the way to an adversarial point."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import wide
from robust_jax.batches import in_chunks
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, LogitsFn

__all__ = [
    "loss_along",
    "loss_surface",
    "random_direction",
]


def __dir__() -> list[str]:
    return __all__


@compiled
def random_direction(x: Images, x_adv: Images, key: KeyOrKeys) -> Images:
    """A random direction orthogonal to x_adv - x and of the same l2 norm.

    Costs only the draw; no network is called.

    Args:
        x: Examples [B,...].
        x_adv: As many points.
        key: One key, or one for each example [B].

    Returns:
        [B,...], in pixel units.

    Raises:
        ValueError: x_adv does not have the shape of x, or one of them does not hold floats.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax.analysis import surface
        >>> x, x_adv = jnp.zeros((1, 2)), jnp.array([[0.5, 0.0]])
        >>> jnp.abs(surface.random_direction(x, x_adv, jax.random.key(0)))
        Array([[0. , 0.5]], dtype=float32)
    """

    def direction_one(move, key):
        noise = wide(jax.random.normal(key, move.shape, move.dtype))
        move = wide(move)
        tiny = jnp.finfo(move.dtype).tiny
        noise -= (noise * move).sum() / jnp.maximum((move**2).sum(), tiny) * move
        return noise * jnp.linalg.norm(move.ravel()) / jnp.linalg.norm(noise.ravel())

    directions = jax.vmap(direction_one)(x_adv - x, example_keys(key, x.shape[0]))
    return directions.astype(x.dtype)


@compiled
def loss_surface(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    x_adv: Images,
    direction: Images,
    *,
    along_adversarial: Sequence[float] | Float[Array, " n"],
    along_direction: Sequence[float] | Float[Array, " m"],
    loss: losses.Loss = losses.cross_entropy,
    chunk_size: int | None = None,
) -> Float[Array, "b n m"]:
    """loss(x + a·(x_adv - x) + b·direction) for each a and b.

    x is at (0, 0) and x_adv at (1, 0). The plane is not clipped to [0,1]. Costs n·m forward
    passes per example.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x: Examples [B,...].
        y: Labels [B].
        x_adv: As many points.
        direction: The other axis [B,...], such as `random_direction`.
        along_adversarial: The values of a, [n].
        along_direction: The values of b, [m].
        loss: loss(logits, y) -> [B].
        chunk_size: How many examples are in memory at a time, with n points of each; None for all.

    Returns:
        [B,n,m], in units of the loss.

    Raises:
        ValueError: x is not in [0,1], y does not hold labels of the network's classes, x_adv or
            direction does not have the shape of x, or logits_fn does not return logits [B,K].

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> from robust_jax.analysis import surface
        >>> logits_fn = lambda x: jnp.stack([x.sum(-1), 0 * x.sum(-1)], -1)
        >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
        >>> surface.loss_surface(
        ...     logits_fn, x, y, x - 0.5, x, loss=losses.margin_loss,
        ...     along_adversarial=(0.0, 1.0), along_direction=(0.0, 1.0),
        ... )
        Array([[[-1., -2.],
                [ 0., -1.]]], dtype=float32)
    """
    a, b = jnp.asarray(along_adversarial, x.dtype), jnp.asarray(along_direction, x.dtype)

    def surface_one(args):
        image, label, towards, direction = args
        labels = jnp.broadcast_to(label, a.shape)

        def column(b):
            steps = a.reshape(-1, *[1] * towards.ndim) * (towards - image)[None]
            points = image[None] + steps + (b * direction)[None]
            return _checks.one_number_each(loss(logits_fn(points), labels))

        return jax.lax.map(column, b).T

    return in_chunks(surface_one, (x, y, x_adv, direction), chunk_size)


@compiled
def loss_along(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    x_moved: Images,
    *,
    steps: Sequence[float] | Float[Array, " n"],
    loss: losses.Loss = losses.cross_entropy,
    chunk_size: int | None = None,
) -> Float[Array, "b n"]:
    """The loss on the straight line from each x to x_moved: what lies inside a ball.

    Costs n forward passes per example.

    Args:
        logits_fn: The network, [B,...] -> [B,K].
        x: Examples [B,...], pixels in [0,1].
        y: Labels [B].
        x_moved: As many points [B,...], such as adversarial ones.
        steps: How far to go, as n shares of the way: 0 is x, 1 is x_moved.
        loss: loss(logits, y) -> [B].
        chunk_size: How many examples are in memory at a time, with n points each; None for all.

    Returns:
        [B,n], in units of the loss.

    Raises:
        ValueError: As `loss_surface` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import losses
        >>> from robust_jax.analysis import surface
        >>> logits_fn = lambda x: jnp.stack([x[:, 0], 0 * x[:, 0]], -1)
        >>> x, y, x_adv = jnp.array([[0.5]]), jnp.array([0]), jnp.array([[0.0]])
        >>> surface.loss_along(logits_fn, x, y, x_adv, steps=(0, 0.5, 1), loss=losses.margin_loss)
        Array([[-0.5 , -0.25,  0.  ]], dtype=float32)

    Reference:
        Our test of what arXiv 1911.06479 says about the interior of the ball.
    """
    shares = jnp.asarray(steps, x.dtype)

    def along_one(args):
        image, label, there = args
        points = image[None] + shares.reshape(-1, *[1] * image.ndim) * (there - image)[None]
        labels = jnp.broadcast_to(label, shares.shape)
        return _checks.one_number_each(loss(logits_fn(points), labels))

    return in_chunks(along_one, (x, y, x_moved), chunk_size)
