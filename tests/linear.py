"""A linear classifier whose attacks, Jacobian and norms are known in closed form."""

import functools
import math
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax import attacks

ORDERS = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}
DUAL_ORDERS = {"linf": 1, "l2": 2, "l1": np.inf}


def make_linear(key, image_shape=(4, 5, 1), num_classes=3):
    """(logits_fn, weights [K,H·W·C], bias [K])."""
    size = math.prod(image_shape)
    weight_key, bias_key = jax.random.split(key)
    weights = jax.random.normal(weight_key, (num_classes, size))
    bias = jax.random.normal(bias_key, (num_classes,))

    def logits_fn(x):
        return x.reshape(x.shape[0], -1) @ weights.T + bias

    weights, bias = np.asarray(weights), np.asarray(bias)
    return logits_fn, weights, bias


def interior_images(key, batch_size, image_shape=(4, 5, 1)):
    """Images so far inside [0,1] that small attacks never meet its walls."""
    return np.asarray(jax.random.uniform(key, (batch_size, *image_shape), minval=0.4, maxval=0.6))


def make_nonlinear(key, image_shape=(4, 5, 1), num_classes=3):
    """A small smooth network as a plain function of x."""
    size = math.prod(image_shape)
    one, two = jax.random.split(key)
    w1 = np.asarray(jax.random.normal(one, (size, 16))) / np.float32(np.sqrt(size)) * 3
    w2 = np.asarray(jax.random.normal(two, (16, num_classes)))
    return lambda x: jnp.tanh((x - 0.5).reshape(x.shape[0], -1) @ w1) @ w2


@functools.cache
def near_boundary(num_classes, norm):
    """(logits_fn, x, y, distance [B]): a linear model, points near its boundaries, and how near.

    The distance is the margin divided by the dual norm of w_y - w_t, minimised over t. No pixel
    meets a wall on the way there.
    """
    linear, weights, _ = make_linear(jax.random.key(0), num_classes=num_classes)
    weights = np.asarray(weights)
    centre = np.asarray(linear(np.full((1, 4, 5, 1), 0.5, np.float32)))
    x = np.asarray(interior_images(jax.random.key(0), 24))
    logits = np.asarray(linear(x)) - centre
    y = logits.argmax(-1).astype(np.int32)
    gaps = weights[y][:, None] - weights[None]
    dual = np.linalg.norm(gaps, DUAL_ORDERS[norm], axis=-1)
    distances = (logits.max(-1, keepdims=True) - logits) / np.where(dual, dual, 1)
    distance = np.where(dual, distances, np.inf).min(-1)
    clear = distance > 2e-3  # well above rounding errors
    assert clear.sum() > 15
    assert (distance < 0.39).all()
    return jax.jit(lambda x: linear(x) - centre), x[clear], y[clear], distance[clear]


def margin(logits, y):
    """z_y - max of the others, [B,K], [B] -> [B], in float64."""
    logits, at_label = np.array(logits, np.float64), (np.arange(len(y)), np.asarray(y))
    own = logits[at_label]
    logits[at_label] = -np.inf
    return own - logits.max(-1)


def robust_accuracy(logits_fn, x_adv, y):
    return float((margin(logits_fn(x_adv), y) > 0).mean())


def sizes(x_adv, x, norm):
    """The norm of each perturbation, [B,H,W,C], [B,H,W,C] -> [B], in float64."""
    flat = (np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1)
    return np.linalg.norm(flat, ORDERS[norm], axis=-1)


def norms_of(attack):
    """The names of the norms that an attack's signature offers."""
    hint = typing.get_type_hints(attack)["norm"]
    listed = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    for part in typing.get_args(hint):
        if typing.get_origin(part) is typing.Literal:
            listed += typing.get_args(part)
    return listed or tuple(attacks.NORMS)


# The attacks that return an array like x.
POINTWISE = {name: attack for name, attack in attacks.ATTACKS.items() if name != "autoattack"}
WITH_NORMS = [(name, norm) for name, attack in POINTWISE.items() for norm in norms_of(attack)]


class Found(NamedTuple):
    """x_adv [B,...] of a minimum-norm attack; distance [B], infinite where it found nothing."""

    x_adv: jax.Array
    distance: jax.Array


def nearest(attack, logits_fn, x, y, key, *, norm="linf", targets=None, **keywords):
    aims = {} if targets is None else {"targets": targets}
    x_adv = attack(logits_fn, x, y, key, norm=norm, **aims, **keywords)
    found = attacks.is_adversarial(logits_fn, x_adv, y, targets=targets)
    return Found(x_adv, jnp.where(found, attacks.distances(x, x_adv, norm=norm), jnp.inf))
