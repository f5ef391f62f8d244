"""Square attack: random search with square patches that uses only the network's outputs.

Written for one example and lifted over the batch by a single jax.vmap. Source: arXiv 1912.00049.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from robust_jax import _checks, losses
from robust_jax._front import compiled
from robust_jax._precision import length_in
from robust_jax.attacks._best import Best, Goal
from robust_jax.attacks._perturbations import add, tiny
from robust_jax.attacks._success import Criterion
from robust_jax.attacks.norms import Flat, Hills, Norm, ThreatModel, threat_model
from robust_jax.keys import example_keys
from robust_jax.types import Images, KeyOrKeys, Labels, Length, LogitsFn

# The queries, out of 10,000, after which the share of the image that a patch covers is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class _Settings(NamedTuple):
    """How Square searches; see `square`."""

    norm: ThreatModel
    eps: Length
    num_queries: int
    num_restarts: int
    p_init: float

    def checked(self, shape, dtype) -> "_Settings":
        """The settings for examples of a shape and dtype."""
        _checks.known_lengths(eps=self.eps)
        _checks.counts(num_queries=self.num_queries, num_restarts=self.num_restarts)
        _checks.shares(p_init=self.p_init)
        check_images(shape)
        return self._replace(eps=length_in(self.eps, dtype))


def check_images(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless examples have the shape (H, W, C), which patches need."""
    if len(shape) != 3:
        raise ValueError(
            f"Square draws patches on images [B,H,W,C], and x is {['B', *shape]}".replace("'", "")
            + "; reshape x, or leave Square out: with autoattack name the members, "
            'version=("apgd_ce", "apgd_t", "fab_t")'
        )


@compiled
def square(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    key: KeyOrKeys,
    *,
    eps: Length,
    norm: Norm = "linf",
    num_queries: int = 5000,
    num_restarts: int = 1,
    p_init: float = 0.8,
    loss: Callable = losses.margin_loss,
    targets: Labels | None = None,
    criterion: Criterion | None = None,
) -> Images:
    """Random search for a misclassified point with patches at random places.

    The network is only evaluated, never differentiated. l1 works like l2, but with steeper hills
    and with a projection instead of a rescaling.

    Args:
        logits_fn, y, key, eps, norm, targets, criterion: As in `pgd`.
        x: Images [B,H,W,C], pixels in [0,1].
        num_queries: Evaluations of the network for each example and restart.
        num_restarts: Searches; later ones run only for examples that earlier ones did not break.
        p_init: The share of the image that the first patches cover, in (0,1]. It is halved after
            queries 10, 50, 200, … as in AutoAttack, whatever num_queries is.
        loss: loss(logits, y) -> [B], to be maximised.

    Returns:
        [B,H,W,C]: the first point that succeeds, which ends the search for that example, or else
        the point of largest loss. Derivatives with respect to x and weights are 0.

    Raises:
        ValueError: eps is negative, num_queries or num_restarts below 1, p_init outside (0,1], the
            norm unknown or without patches, or x not [B,H,W,C].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from robust_jax import attacks
        >>> weights = jax.random.normal(jax.random.key(0), (12, 3))
        >>> logits_fn = lambda x: x.reshape(len(x), -1) @ weights
        >>> x = jax.random.uniform(jax.random.key(1), (4, 2, 2, 3))
        >>> y = logits_fn(x).argmax(-1)
        >>> x_adv = attacks.square(logits_fn, x, y, jax.random.key(2), eps=0.5, num_queries=100)
        >>> attacks.is_adversarial(logits_fn, x_adv, y).tolist()
        [True, True, True, True]

    Reference:
        Andriushchenko et al. 2020, arXiv 1912.00049; in l1 Croce & Hein 2021, arXiv 2103.01208.
    """
    # No gradient flows back through the search.
    x, y = jax.lax.stop_gradient(jnp.asarray(x)), jnp.asarray(y)
    threat = threat_model(norm, needs="patches")
    settings = _Settings(threat, eps, num_queries, num_restarts, p_init)
    settings = settings.checked(x.shape[1:], x.dtype)
    goal = Goal(loss, targets, criterion)
    start, propose = _moves(x.shape[1:], settings)

    def search_one(x, reference, key):
        def judged(x_adv):
            return Best(x_adv, *goal.at(logits_fn, x_adv, reference))

        def search(found, number):
            restart_key = jax.random.fold_in(key, number)

            def standing(state):
                i, best = state
                return (i < num_queries) & ~best.hit & ~found.hit

            def query(state):
                i, best = state
                x_adv = propose(jax.random.fold_in(restart_key, i), x, best.x, i - 1)
                return i + 1, best.updated(*judged(x_adv))

            drawn = judged(start(jax.random.fold_in(restart_key, 0), x))
            first = Best.nothing(x).updated(*drawn)  # keeps out NaN values, which nothing beats
            _, best = jax.lax.while_loop(standing, query, (jnp.asarray(1, jnp.int32), first))
            return found.updated(*best), None

        return jax.lax.scan(search, Best.nothing(x), jnp.arange(num_restarts))[0].x

    return jax.vmap(search_one)(x, goal.reference(y), example_keys(key, len(x)))


def patch_sides(
    shape: tuple[int, ...], p_init: float, num_queries: int, patches: Hills | Flat
) -> Int[np.ndarray, " n"]:
    """The side of each query's square patch, in pixels, for images of the shape (H, W, C)."""
    height, width, _ = shape
    halvings = np.searchsorted(_HALVINGS, np.arange(num_queries))
    sides = np.rint(np.sqrt(p_init / 2.0**halvings * height * width)).astype(np.int32)
    if isinstance(patches, Hills):  # an odd number, so that the patch has a middle
        sides = np.maximum(sides, patches.least_side)
        sides += 1 - sides % 2
    return np.clip(sides, 1, min(height, width))


def _moves(shape, settings: _Settings) -> tuple[Callable, Callable]:
    """start(key, x) and propose(key, x, best, i) -> x_adv, the i-th change of the best point."""
    patches = settings.norm.patches
    assert patches is not None  # `square` has checked it
    sides = patch_sides(shape, settings.p_init, settings.num_queries, patches)
    if isinstance(patches, Flat):
        return partial(_stripes, settings), partial(_paint, settings, jnp.asarray(sides))
    distinct, which = np.unique(sides, return_inverse=True)
    hills = np.stack([_hill_on_canvas(int(side), shape, patches) for side in distinct])
    tables = jnp.asarray(sides), jnp.asarray(which.astype(np.int32)), hills
    start = partial(_hills, settings, patches)
    return start, partial(_move_mass, settings, patches, tables)


def _stripes(settings: _Settings, key, x):
    """Vertical stripes, one pixel wide, at the rim, with a sign per column and channel."""
    return _to_the_rim(settings, x, jax.random.rademacher(key, (1, *x.shape[1:]), x.dtype))


def _paint(settings: _Settings, sides, key, x, best, i):
    """The best point with a square repainted at the rim of the ball, with a sign per channel."""
    place_key, sign_key = jax.random.split(key)
    window = _window(place_key, sides[i], x.shape)
    signs = jax.random.rademacher(sign_key, (1, 1, x.shape[2]), x.dtype)
    return jnp.where(window, _to_the_rim(settings, x, signs), best)


def _to_the_rim(settings: _Settings, x, signs):
    return add(x, settings.eps * settings.norm.steepest(jnp.broadcast_to(signs, x.shape)))


def _hills(settings: _Settings, patches: Hills, key, x):
    """A grid of at least 5×5 hills of random orientation and sign, moved into the ball."""
    height, width, channels = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    sign_key, turn_key = jax.random.split(key)
    hill = jnp.asarray(_hill(side, patches), x.dtype)[:, :, None]
    signs = jax.random.rademacher(sign_key, (rows, 1, columns, 1, channels), x.dtype)
    turned = jax.random.bernoulli(turn_key, shape=(rows, 1, columns, 1, 1))
    tiles = signs * jnp.where(turned, hill.swapaxes(0, 1)[None, :, None], hill[None, :, None])
    tiles = tiles.reshape(rows * side, columns * side, channels)
    above, left = (height - tiles.shape[0]) // 2, (width - tiles.shape[1]) // 2
    delta = (
        jnp.zeros_like(x).at[above : above + len(tiles), left : left + tiles.shape[1]].set(tiles)
    )
    return _brought_inside(settings, patches, x, delta)


def _move_mass(settings: _Settings, patches: Hills, tables, key, x, best, i):
    """The best point with a second window's mass, and what is left of eps, moved into a first.

    In the first window a hill of random sign is added to the direction already there.
    """
    order = patches.order
    sides, which, hills = tables
    here_key, there_key, sign_key, turn_key = jax.random.split(key, 4)
    row, column = _place(here_key, sides[i], x.shape)
    here = _window_at(row, column, sides[i], x.shape)
    there = _window(there_key, sides[i], x.shape)
    both_hills = jnp.asarray(hills, x.dtype)[which[i]]
    hill = jnp.where(jax.random.bernoulli(turn_key), both_hills[1], both_hills[0])
    hill = jnp.roll(hill, (row, column), (0, 1))[:, :, None]

    def root(mass):
        return jnp.sqrt(mass) if order == 2 else mass

    def norm_per_channel(delta):
        return root((jnp.abs(delta) ** order).sum((0, 1), keepdims=True))

    least = max(1e-12, tiny(x.dtype))
    delta = best - x
    inside = jnp.where(here, delta, 0.0)
    mass = norm_per_channel(jnp.where(here | there, delta, 0.0))
    unused = jnp.maximum(settings.eps**order - (jnp.abs(delta) ** order).sum(), 0.0) / x.shape[2]
    signs = jax.random.rademacher(sign_key, (1, 1, x.shape[2]), x.dtype)
    new = hill * signs + inside / (norm_per_channel(inside) + least)
    new = new / (norm_per_channel(new) + least) * root(mass**order + unused)
    if not patches.fills_ball:  # too large, as in the reference; the projection shrinks it
        new = new * x.shape[2]
    delta = jnp.where(here, new, jnp.where(there, 0.0, delta))
    return _brought_inside(settings, patches, x, delta)


def _brought_inside(settings: _Settings, patches: Hills, x, delta):
    """x + delta with delta scaled to norm eps, or without `fills_ball` shrunk if it is larger."""
    norm, eps = settings.norm, settings.eps
    if patches.fills_ball:
        delta = delta * (eps / (norm.size(delta) + max(1e-12, tiny(x.dtype))))
    return norm.project_to_ball_and_box(x + delta, x, eps)


def _place(key, side, shape):
    """The upper left corner of a square window; it may touch the last row and column."""
    return jax.random.randint(
        key, (2,), 0, jnp.array(shape[:2], jnp.int32) - side + 1, dtype=jnp.int32
    )


def _window(key, side, shape):
    row, column = _place(key, side, shape)
    return _window_at(row, column, side, shape)


def _window_at(row, column, side, shape):
    """True within a square window, [H,W,1]."""
    rows = jnp.arange(shape[0], dtype=jnp.int32)[:, None, None]
    columns = jnp.arange(shape[1], dtype=jnp.int32)[None, :, None]
    return (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)


def _hill_on_canvas(
    side: int, shape: tuple[int, ...], patches: Hills
) -> Float[np.ndarray, "2 h w"]:
    """A hill and its transpose in the upper left corner of an image of zeros."""
    hill = _hill(side, patches)
    return np.pad([hill, hill.T], [(0, 0), (0, shape[0] - side), (0, shape[1] - side)])


def _hill(side: int, patches: Hills) -> Float[np.ndarray, "s s"]:
    """A hill in the upper half of a square and a pit in the lower, of norm 1 together."""
    upper = side // 2
    both = np.concatenate([_slope(upper, side, patches), -_slope(side - upper, side, patches)])
    return (both / np.linalg.norm(both.ravel(), patches.order)).astype(np.float32)


def _slope(height: int, width: int, patches: Hills) -> Float[np.ndarray, "h w"]:
    """Nested rectangles around the middle, of norm 1 (or empty).

    The k-th adds 1/(k+1)² to the height, or 1/(k+1)⁴ in l1, as in the code of arXiv 2103.01208.
    """
    distance = np.maximum(
        np.abs(np.arange(height) - height // 2)[:, None],
        np.abs(np.arange(width) - width // 2)[None, :],
    )
    steps = 1.0 / np.arange(1, max(height, width) // 2 + 2) ** patches.decay
    slope = np.cumsum(steps[::-1])[::-1][distance]
    return slope / np.maximum(np.linalg.norm(slope.ravel(), patches.order), 1e-30)
