"""Threat models: one record per norm, with all that attacks and measurements need from it.

Everything is for one example of any shape, in pixel units ([0,1]). A new norm is a `ThreatModel`:
pass the record itself wherever a `norm` is expected, or add it to `NORMS` to refer to it by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import pi, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from robust_jax._precision import wide
from robust_jax.attacks._perturbations import add, fill, largest_where, room_in, summing, tiny
from robust_jax.types import Length, Perturbation, Scalar

__all__ = [
    "Flat",
    "Hills",
    "L0",
    "L1",
    "L2",
    "LINF",
    "Measure",
    "NORMS",
    "Norm",
    "ThreatModel",
    "boundary_step",
    "measure",
    "threat_model",
]


def __dir__() -> list[str]:
    return __all__


# A gradient with a smaller dual norm counts as zero.
_FLAT = 1e-12


@dataclass(frozen=True, eq=False)
class Measure:
    """How large a perturbation is.

    Attributes:
        name: What configs, results and figures call it.
        size: size(delta) -> [], in pixel units.
    """

    name: str
    size: Callable[[Perturbation], Scalar]


class Hills(NamedTuple):
    """Square's patches for norms that sum over pixels: hills that take mass from one another.

    Attributes:
        order: The exponent in Σ|δ|^order.
        least_side: The side of the smallest patch, in pixels.
        decay: The k-th of the nested rectangles that make up a hill adds 1/(k+1)^decay.
        fills_ball: Whether a perturbation is scaled to the radius; otherwise it is made too large,
            and the projection takes the excess from every pixel.
    """

    order: int
    least_side: int
    decay: int
    fills_ball: bool


@dataclass(frozen=True)
class Flat:
    """Square's patches for norms that bound each pixel separately: they reach that bound."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ThreatModel(Measure):
    """A norm, and the geometry of its balls.

    Attributes:
        dual_size: The largest inner product of a gradient with a perturbation of norm 1.
        project: project(delta, eps, room), the nearest perturbation (in l2) of norm at most eps. It
            may keep every pixel within its room, the distance to the wall of [0,1] ahead of it.
        steepest: The perturbation of norm 1 with the largest inner product with a gradient; 0 for
            a gradient of 0.
        random_in_ball: random_in_ball(key, like, eps), drawn uniformly, of the shape and dtype of
            `like`.
        noise: noise(key, shape, dtype), which `random_on_sphere` scales to its radius.
        gaussian_size: The norm that n draws from N(0, 1) typically have.
        l2_radius: The largest l2 norm of a perturbation of n entries and norm 1.
        step: step(gradient, length, room), the best change within the room and of norm `length`.
            None for length·steepest, which ignores the room.
        to_boundary: to_boundary(x, value, gradient), the smallest δ with value + gradient·δ = 0 and
            x + δ in [0,1], or the closest to it; see `boundary_step`. FAB needs it.
        dense_steps: Whether the best steps move many pixels. If not, APGD takes the schedule of
            l1 (arXiv 2103.01208). DeepFool needs it: otherwise its steps would end at a wall.
        patches: What Square paints. Square needs it.
        autoattack: The keywords that AutoAttack changes in this norm, by the name of the attack.
            Its versions "plus" and "rand" ignore them.
    """

    dual_size: Callable[[Perturbation], Scalar]
    project: Callable[[Perturbation, Length, Perturbation], Perturbation]
    steepest: Callable[[Perturbation], Perturbation]
    random_in_ball: Callable[[Key[Array, ""], Perturbation, Length], Perturbation]
    noise: Callable[..., Perturbation]
    gaussian_size: Callable[[int], float]
    l2_radius: Callable[[int], float]
    step: Callable[[Perturbation, Length, Perturbation], Perturbation] | None = None
    to_boundary: Callable[[Perturbation, Scalar, Perturbation], Perturbation] | None = None
    dense_steps: bool = True
    patches: Hills | Flat | None = None
    autoattack: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def slope(self, gradient: Perturbation) -> Scalar:
        """The dual size of a gradient; where it vanishes, the value and its derivative are 0.

        Args:
            gradient: The gradient of a function at one example, [...].

        Returns:
            [], per pixel unit of the norm, in at least float32, as it may overflow float16.

        Example:
            >>> import jax.numpy as jnp
            >>> from robust_jax import norms
            >>> norms.LINF.slope(jnp.array([3.0, -4.0]))
            Array(7., dtype=float32)
        """
        gradient = wide(gradient)
        steep = self.dual_size(jax.lax.stop_gradient(gradient)) > _FLAT
        # The inner where avoids a gradient of 0, at which the l2 norm has no derivative.
        return jnp.where(steep, self.dual_size(jnp.where(steep, gradient, 1)), 0)

    def project_to_ball_and_box(
        self, x_adv: Perturbation, x: Perturbation, eps: Length
    ) -> Perturbation:
        """x_adv moved into the eps-ball around x and into [0,1].

        Clipping moves each pixel towards x, which is in the box, so it never leaves the ball. In l1
        that would waste a part of eps that other pixels could use (arXiv 2103.01208), so the l1
        projection takes the room into account.

        Args:
            x_adv: The point to move, [...].
            x: The example, [...], pixels in [0,1].
            eps: The radius, in pixel units.

        Returns:
            [...].

        Example:
            >>> import jax.numpy as jnp
            >>> from robust_jax import norms
            >>> x, x_adv = jnp.array([0.5, 1.0]), jnp.array([0.9, 1.1])
            >>> norms.LINF.project_to_ball_and_box(x_adv, x, 0.25)
            Array([0.75, 1.  ], dtype=float32)
        """
        delta = x_adv - x
        return add(x, self.project(delta, eps, room_in(x, delta)))

    def steepest_step(
        self, x: Perturbation, gradient: Perturbation, length: Length
    ) -> Perturbation:
        """The change of x of norm `length` with the largest inner product with the gradient.

        It stays within [0,1] if the record has a `step`, as l1 does, and may leave otherwise.

        Args:
            x: The example, [...], pixels in [0,1].
            gradient: The gradient of the function to raise, [...].
            length: In pixel units.

        Returns:
            [...], to be added to x.

        Example:
            >>> import jax.numpy as jnp
            >>> from robust_jax import norms
            >>> norms.L2.steepest_step(jnp.array([0.5, 0.5]), jnp.array([3.0, -4.0]), 0.1)
            Array([ 0.06, -0.08], dtype=float32)
        """
        if self.step is None:
            return length * self.steepest(gradient)
        return self.step(gradient, length, room_in(x, gradient))

    def random_on_sphere(
        self, key: Key[Array, ""], like: Perturbation, eps: Length
    ) -> Perturbation:
        """A random perturbation of norm eps.

        Args:
            key: One key.
            like: An array of the desired shape [...] and dtype.
            eps: The norm, in pixel units.

        Returns:
            [...].

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from robust_jax import norms
            >>> delta = norms.L2.random_on_sphere(jax.random.key(0), jnp.zeros(3), 0.5)
            >>> norms.L2.size(delta)
            Array(0.5, dtype=float32)
        """
        noise = jnp.asarray(wide(self.noise(key, like.shape, like.dtype)))
        shares = noise / jnp.maximum(self.size(noise), tiny(noise.dtype))
        return eps * shares.astype(like.dtype)

    def random_neighbour(self, key: Key[Array, ""], x: Perturbation, eps: Length) -> Perturbation:
        """A point drawn uniformly from the eps-ball around x, then moved into [0,1].

        Args:
            key: One key.
            x: The example, [...], pixels in [0,1].
            eps: The radius, in pixel units.

        Returns:
            [...].

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from robust_jax import norms
            >>> x = jnp.array([0.0, 0.5, 1.0])
            >>> moved = norms.L1.random_neighbour(jax.random.key(0), x, 0.1)
            >>> bool(norms.L1.size(moved - x) <= 0.1)
            True
        """
        return self.project_to_ball_and_box(x + self.random_in_ball(key, x, eps), x, eps)


# What a `norm` may be: the name of one of NORMS, or a record.
Norm = str | ThreatModel


def threat_model(norm: Norm, *, needs: str = "name") -> ThreatModel:
    """The record of a norm.

    Args:
        norm: The name of one of NORMS, or a record, which is returned as it is.
        needs: A field that the record must have, such as "to_boundary" or "patches".

    Returns:
        The record.

    Raises:
        ValueError: The norm is unknown, or lacks the field.

    Example:
        >>> from robust_jax import norms
        >>> norms.threat_model("l2") is norms.L2
        True
    """
    able = {name: record for name, record in NORMS.items() if getattr(record, needs)}
    if isinstance(norm, ThreatModel):
        if getattr(norm, needs):
            return norm
        raise ValueError(
            f"norm must be one of {', '.join(able)} or a record with {needs}, not {norm.name!r}"
        )
    return _named(norm, able)


def measure(norm: str | Measure) -> Measure:
    """The record to measure perturbations by.

    Args:
        norm: The name of one of NORMS, "l0" (the bound of JSMA), or a record.

    Returns:
        The record.

    Raises:
        ValueError: The norm is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import norms
        >>> norms.measure("l0").size(jnp.array([0.0, 0.3, -0.1]))
        Array(2., dtype=float32)
    """
    return norm if isinstance(norm, Measure) else _named(norm, {**NORMS, L0.name: L0})


def _named(name, choices):
    if name not in choices:
        raise ValueError(f"norm must be one of {', '.join(choices)}, not {name!r}")
    return choices[name]


def boundary_step(unit: Callable[[Perturbation], Perturbation]) -> Callable:
    """`ThreatModel.to_boundary` of a norm for which pixel i moves by min(λ·unit_i, room_i).

    λ is the value that just reaches the boundary: the root of a concave, piecewise linear function,
    which Newton's method finds exactly, from below.

    Args:
        unit: unit(weight) -> [...], the change of each pixel for λ = 1, given the absolute gradient
            [...], scaled so that its largest entry is 1.

    Returns:
        to_boundary(x, value, gradient) -> [...], in pixel units.

    Example:
        >>> import jax.numpy as jnp
        >>> from robust_jax import norms
        >>> to_boundary = norms.boundary_step(jnp.ones_like)  # that of linf
        >>> to_boundary(jnp.array([0.5, 0.5]), jnp.array(0.8), jnp.array([3.0, -1.0]))
        Array([-0.2,  0.2], dtype=float32)
    """

    @summing
    def to_boundary(x, value, gradient):
        weight, value, direction, room = _towards_boundary(x, value, gradient)
        pace = unit(weight)
        limit = jnp.where(pace > 0, room / jnp.where(pace > 0, pace, 1), 0)
        slope = weight * pace

        def newton(state):
            i, root, _ = state
            free = limit > root
            needed = jnp.abs(value) - jnp.where(free, 0, slope * limit).sum()
            rate = jnp.where(free, slope, 0).sum()
            nearer = jnp.where(rate > 0, needed / jnp.where(rate > 0, rate, 1), jnp.inf)
            return i + 1, jnp.maximum(root, nearer), root

        def moving(state):
            i, root, before = state
            return (root > before) & (i < _MAX_NEWTON_STEPS)

        start = (0, jnp.zeros_like(value), -jnp.ones_like(value))
        _, root, _ = jax.lax.while_loop(moving, newton, start)
        return direction * jnp.where(limit > root, root * pace, room)

    return to_boundary


# Newton's method converges in a handful of steps; the bound guards against rounding errors.
_MAX_NEWTON_STEPS = 50


def _towards_boundary(x, value, gradient):
    """The absolute gradient and value, over its largest entry; the step's direction and room."""
    scale = jnp.maximum(_largest(gradient), tiny(gradient.dtype))
    weight, value = jnp.abs(gradient) / scale, value / scale
    direction = -jnp.sign(value) * jnp.sign(gradient)
    return weight, value, direction, room_in(x, direction)


# linf.


def _largest(delta):
    # jnp.abs would be fused into the reduction, which takes XLA's CPU backend ten times as long.
    return jnp.maximum(delta.max(), -delta.min())


def _uniform(key, like, eps):
    return eps * jax.random.uniform(key, like.shape, like.dtype, minval=-1.0, maxval=1.0)


# l2.


@summing
def _euclidean(delta):
    return jnp.sqrt((delta**2).sum())


@summing
def _scaled_down(delta, eps, room):
    return delta * jnp.minimum(1.0, eps / jnp.maximum(_euclidean(delta), tiny(delta.dtype)))


@summing
def _unit(gradient):
    # Scaled by the largest entry first, so that squares neither underflow nor overflow.
    gradient = gradient / jnp.maximum(_largest(gradient), tiny(gradient.dtype))
    return gradient / jnp.maximum(_euclidean(gradient), tiny(gradient.dtype))


def _uniform_in_l2(key, like, eps):
    direction_key, radius_key = jax.random.split(key)
    direction = _unit(jax.random.normal(direction_key, like.shape, like.dtype))
    return eps * direction * jax.random.uniform(radius_key, (), like.dtype) ** (1 / like.size)


# l1.


@summing
def _total(delta):
    return jnp.where(delta < 0, -delta, delta).sum()


@summing
def _shrunk(delta, eps, room):
    """The nearest perturbation of l1 norm at most eps in which no pixel exceeds its room.

    Pixel i keeps min(max(|δ_i| - λ, 0), room_i), for the λ ≥ 0 at which these sum to eps: the
    root of a decreasing, piecewise linear function (for infinite room: Duchi et al. 2008).
    """
    wanted = jnp.where(delta < 0, -delta, delta)
    # As λ grows, a pixel begins to shrink at λ = begins and is 0 from λ = wanted, its |δ|.
    begins = jnp.maximum(wanted - room, 0)

    def over(root):
        """By how much the l1 norm kept at λ = root exceeds eps."""
        gone, begun = (jnp.where(ends > root, ends - root, 0).sum() for ends in (wanted, begins))
        return gone - begun - eps

    root = largest_where(lambda root: over(root) > 0, wanted)
    shrinking = (
        jnp.where(wanted > root, jnp.ones_like(wanted), 0).sum()
        - jnp.where(begins > root, jnp.ones_like(wanted), 0).sum()
    )
    excess = over(root)
    root = jnp.where(excess > 0, root + excess / jnp.maximum(shrinking, 1), 0)
    shrunk = jnp.sign(delta) * jnp.clip(wanted - root, 0, room)
    within = eps * (1 - 4e-6)  # room for rounding: the size sums many pixels
    return shrunk * jnp.minimum(1.0, within / jnp.maximum(_total(shrunk), tiny(delta.dtype)))


def _largest_alone(gradient):
    first = jnp.arange(gradient.size).reshape(gradient.shape) == jnp.argmax(jnp.abs(gradient))
    return jnp.where(first, jnp.sign(gradient), 0.0)


def _filled(gradient, length, room):
    """Moves the pixels of largest gradient, each up to its wall (arXiv 2103.01208, prop. 2.2).

    The steepest direction would spend the whole length on one pixel.
    """
    return jnp.sign(gradient) * fill(length, jnp.abs(gradient), room)


def _uniform_in_l1(key, like, eps):
    # Shares of a sum of exponential variables; leaving one out makes them uniform in the ball.
    noise_key, rest_key = jax.random.split(key)
    noise = wide(jax.random.laplace(noise_key, like.shape, like.dtype))
    rest = wide(jax.random.exponential(rest_key, (), like.dtype))
    return eps * (noise / (_total(noise) + rest)).astype(like.dtype)


@summing
def _filled_to_boundary(x, value, gradient):
    weight, value, direction, room = _towards_boundary(x, value, gradient)
    gained = fill(jnp.abs(value), weight, weight * room)
    return direction * jnp.minimum(gained / jnp.where(weight > 0, weight, 1), room)


LINF = ThreatModel(
    name="linf",
    size=_largest,
    dual_size=_total,
    project=lambda delta, eps, room: jnp.clip(delta, -eps, eps),
    steepest=jnp.sign,
    random_in_ball=_uniform,
    noise=partial(jax.random.uniform, minval=-1.0),
    gaussian_size=lambda n: NormalDist().inv_cdf((1 + 0.5 ** (1 / n)) / 2),  # the median
    l2_radius=sqrt,
    to_boundary=boundary_step(jnp.ones_like),
    patches=Flat(),
)
L2 = ThreatModel(
    name="l2",
    size=_euclidean,
    dual_size=_euclidean,
    project=_scaled_down,
    steepest=_unit,
    random_in_ball=_uniform_in_l2,
    noise=jax.random.normal,
    gaussian_size=sqrt,  # the root of the mean square
    l2_radius=lambda n: 1.0,
    to_boundary=boundary_step(lambda weight: weight),
    patches=Hills(order=2, least_side=3, decay=2, fills_ball=True),
)
L1 = ThreatModel(
    name="l1",
    size=_total,
    dual_size=_largest,
    project=_shrunk,
    steepest=_largest_alone,
    random_in_ball=_uniform_in_l1,
    noise=jax.random.laplace,
    gaussian_size=lambda n: n * sqrt(2 / pi),  # the mean
    l2_radius=lambda n: 1.0,
    step=_filled,
    to_boundary=_filled_to_boundary,
    dense_steps=False,
    # With sides of 3 and more, as in the reference, Square would never try a single pixel.
    patches=Hills(order=1, least_side=1, decay=4, fills_ball=False),
    autoattack={"apgd_ce": {"num_restarts": 5}, "apgd_t": {"num_targets": 5}},
)
NORMS: Mapping[str, ThreatModel] = {norm.name: norm for norm in (LINF, L2, L1)}

# How many entries are not 0. It bounds JSMA and is not a norm.
L0 = Measure("l0", lambda delta: (delta != 0).sum().astype(delta.dtype))
