"""Square attack: random search with square patches that asks for the network's outputs alone.

Written for one example and lifted over the batch by jax.vmap, once. Source: arXiv 1912.00049.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robust_jax import losses
from robust_jax._front import compiled
from robust_jax.attacks import norms
from robust_jax.attacks._best import Best, check_counts, check_lengths, check_shares
from robust_jax.attacks.norms import Norm
from robust_jax.keys import example_keys, fold_in_each
from robust_jax.types import Images, KeyOrKeys, LogitsFn

# Of 10,000 queries, those after which the share of the image that a patch covers is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12
# The norms whose patches are hills.
_ORDERS = {"l2": 2, "l1": 1}


@compiled
def square(
    logits_fn: LogitsFn,
    x: Images,
    y: Int[Array, " b"],
    key: KeyOrKeys,
    *,
    eps: float,
    norm: Norm = "linf",
    num_queries: int = 5000,
    num_restarts: int = 1,
    p_init: float = 0.8,
    loss: Callable = losses.carlini_wagner,
    targets: Int[Array, " b"] | None = None,
) -> Images:
    """Random search for a misclassified point, by patches at random places (arXiv 1912.00049).

    In l1 as in l2, with steeper hills and a projection for a rescaling (arXiv 2103.01208).
    logits_fn is only evaluated, never differentiated. x, y, key, eps, targets: as in `pgd`; y:
    labels [B]. num_queries: evaluations of the network for each example and restart. p_init: the
    share of the image that the first patches cover; it is halved after queries 10, 50, 200, … as
    in AutoAttack, whatever num_queries is. Returns [B,H,W,C]: the first point that is
    misclassified (as the target, if there is one), where the search for that example ends, or the
    point of largest loss. Raises ValueError for a negative eps, num_queries or num_restarts below
    1, p_init outside (0,1], an unknown norm.
    """
    check_lengths(eps=eps)
    check_counts(num_queries=num_queries, num_restarts=num_restarts)
    check_shares(p_init=p_init)
    start, propose = _search(norm, x.shape[1:], eps, p_init, num_queries)
    sign = 1.0
    if targets is not None:
        y, sign = targets, -1.0

    def search_one(x, y, key):
        def judged(x_adv):
            logits = logits_fn(x_adv[None])
            hit = (jnp.argmax(logits[0]) == y) == (targets is not None)
            return Best(x_adv, sign * loss(logits, y[None])[0], hit)

        def search(found, key):
            def standing(state):
                i, best = state
                return (i < num_queries) & ~best.hit & ~found.hit

            def query(state):
                i, best = state
                x_adv = propose(jax.random.fold_in(key, i), x, best.x, i - 1)
                return i + 1, best.updated(*judged(x_adv))

            first = judged(start(jax.random.fold_in(key, 0), x))
            _, best = jax.lax.while_loop(standing, query, (1, first))
            return found.updated(*best), None

        nothing = Best(x, jnp.asarray(-jnp.inf, x.dtype), jnp.asarray(False))
        restarts = fold_in_each(key, jnp.arange(num_restarts))
        return jax.lax.scan(search, nothing, restarts)[0].x

    return jax.vmap(search_one)(x, y, example_keys(key, x.shape[0]))


def patch_sides(
    shape: tuple[int, ...], p_init: float, num_queries: int, norm: Norm
) -> Int[np.ndarray, " n"]:
    """The side of each query's square patch, in pixels, for images of the shape (H, W, C)."""
    height, width, _ = shape
    halvings = np.searchsorted(_HALVINGS, np.arange(num_queries))
    sides = np.rint(np.sqrt(p_init / 2.0**halvings * height * width)).astype(int)
    if norm != "linf":  # an odd number, so that the patch has a middle
        # Room for a slope in l2; in l1 the best patch is often a pixel, which the reference,
        # at 3 and more, never tries.
        sides = np.maximum(sides, 3 if norm == "l2" else 1)
        sides += 1 - sides % 2
    return np.clip(sides, 1, min(height, width))


def _search(norm, shape, eps, p_init, num_queries) -> tuple[Callable, Callable]:
    """start(key, x) and propose(key, x, best, i) -> x_adv, the i-th change of the best point."""
    norms.check(norm)
    sides = patch_sides(shape, p_init, num_queries, norm)
    if norm == "linf":
        return partial(_stripes, eps=eps), partial(_paint, eps=eps, sides=jnp.asarray(sides))
    distinct, which = np.unique(sides, return_inverse=True)
    hills = np.stack([_hill_on_canvas(side, shape, norm) for side in distinct])
    tables: Any = tuple(map(jnp.asarray, (sides, which, hills)))
    return (
        partial(_hills, eps=eps, norm=norm),
        partial(_move_mass, eps=eps, norm=norm, tables=tables),
    )


def _stripes(key, x, *, eps):
    """Vertical stripes of ±eps, one pixel wide, a sign for each column and channel."""
    return norms.add(x, eps * _signs(key, (1, *x.shape[1:])))


def _paint(key, x, best, i, *, eps, sides):
    """The best point with a square repainted at x ± eps, a sign for each channel."""
    place_key, sign_key = jax.random.split(key)
    window = _window(place_key, sides[i], x.shape)
    painted = norms.add(x, eps * _signs(sign_key, (1, 1, x.shape[2])))
    return jnp.where(window, painted, best)


def _hills(key, x, *, eps, norm):
    """A grid of at least 5×5 hills of random orientation and sign, brought to norm eps."""
    height, width, channels = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    sign_key, turn_key = jax.random.split(key)
    hill = jnp.asarray(_hill(side, norm))[:, :, None]
    signs = _signs(sign_key, (rows, 1, columns, 1, channels))
    turned = jax.random.bernoulli(turn_key, shape=(rows, 1, columns, 1, 1))
    tiles = signs * jnp.where(turned, hill.swapaxes(0, 1)[:, None], hill[:, None])
    tiles = tiles.reshape(rows * side, columns * side, channels)
    above, left = (height - tiles.shape[0]) // 2, (width - tiles.shape[1]) // 2
    delta = (
        jnp.zeros_like(x).at[above : above + len(tiles), left : left + tiles.shape[1]].set(tiles)
    )
    return _brought_inside(x, delta, eps, norm)


def _move_mass(key, x, best, i, *, eps, norm, tables):
    """The best point with the mass of a second window, and what is left of eps, moved to a first.

    In the first window a hill of random sign is added to the direction already there.
    """
    sides, which, hills = tables
    here_key, there_key, sign_key, turn_key = jax.random.split(key, 4)
    row, column = _place(here_key, sides[i], x.shape)
    here = _window_at(row, column, sides[i], x.shape)
    there = _window(there_key, sides[i], x.shape)
    hill = jnp.where(jax.random.bernoulli(turn_key), hills[which[i], 1], hills[which[i], 0])
    hill = jnp.roll(hill, (row, column), (0, 1))[:, :, None]

    power = _ORDERS[norm]  # of what adds up over windows

    def root(mass):
        return jnp.sqrt(mass) if norm == "l2" else mass

    def norm_per_channel(delta):
        return root((jnp.abs(delta) ** power).sum((0, 1), keepdims=True))

    delta = best - x
    inside = jnp.where(here, delta, 0.0)
    mass = norm_per_channel(jnp.where(here | there, delta, 0.0))
    unused = jnp.maximum(eps**power - (jnp.abs(delta) ** power).sum(), 0.0) / x.shape[2]
    new = hill * _signs(sign_key, (1, 1, x.shape[2])) + inside / (norm_per_channel(inside) + _TINY)
    new = new / (norm_per_channel(new) + _TINY) * root(mass**power + unused)
    if norm == "l1":  # too much, as in the reference: the projection takes it off every pixel
        new = new * x.shape[2]
    delta = jnp.where(here, new, jnp.where(there, 0.0, delta))
    return _brought_inside(x, delta, eps, norm)


def _brought_inside(x, delta, eps, norm):
    """x + delta with delta scaled to norm eps (l2), or shrunk to it if it is larger (l1)."""
    if norm == "l2":
        delta = delta * (eps / (norms.size(delta, norm) + _TINY))
    return norms.project_to_ball_and_box(x + delta, x, eps, norm)


def _signs(key, shape) -> Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _place(key, side, shape):
    """The upper left corner of a square window; it may touch the last row and column."""
    return jax.random.randint(key, (2,), 0, jnp.array(shape[:2]) - side + 1)


def _window(key, side, shape):
    row, column = _place(key, side, shape)
    return _window_at(row, column, side, shape)


def _window_at(row, column, side, shape):
    """True within a square window, [H,W,1]."""
    rows, columns = jnp.arange(shape[0])[:, None, None], jnp.arange(shape[1])[None, :, None]
    return (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)


def _hill_on_canvas(side: int, shape: tuple[int, ...], norm: Norm) -> Float[np.ndarray, "2 h w"]:
    """A hill and its transpose in the upper left corner of an image of zeros."""
    canvas = np.zeros((2, *shape[:2]), np.float32)
    canvas[0, :side, :side] = _hill(side, norm)
    canvas[1, :side, :side] = _hill(side, norm).T
    return canvas


def _hill(side: int, norm: Norm) -> Float[np.ndarray, "s s"]:
    """A hill in the upper half of a square and a pit in the lower, of norm 1 together."""
    upper = side // 2
    both = np.concatenate([_slope(upper, side, norm), -_slope(side - upper, side, norm)])
    return (both / np.linalg.norm(both.ravel(), _ORDERS[norm])).astype(np.float32)


def _slope(height: int, width: int, norm: Norm) -> Float[np.ndarray, "h w"]:
    """Nested rectangles around the middle, of norm 1 (or empty).

    The k-th adds 1/(k+1)² to the height, or 1/(k+1)⁴ in l1, as in the code of arXiv 2103.01208.
    """
    distance = np.maximum(
        np.abs(np.arange(height) - height // 2)[:, None],
        np.abs(np.arange(width) - width // 2)[None, :],
    )
    steps = 1.0 / np.arange(1, max(height, width) // 2 + 2) ** {"l2": 2, "l1": 4}[norm]
    slope = np.cumsum(steps[::-1])[::-1][distance]
    return slope / np.maximum(np.linalg.norm(slope.ravel(), _ORDERS[norm]), 1e-30)
