"""A linear classifier whose attacks, Jacobian and norms are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np

ORDERS = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}
DUAL_ORDERS = {"linf": 1, "l2": 2, "l1": np.inf}


def make_linear(key, image_shape=(4, 5, 1), num_classes=3):
    """(logits_fn, weights [K,H·W·C], bias [K])."""
    size = image_shape[0] * image_shape[1] * image_shape[2]
    weight_key, bias_key = jax.random.split(key)
    weights = jax.random.normal(weight_key, (num_classes, size))
    bias = jax.random.normal(bias_key, (num_classes,))

    def logits_fn(x):
        return x.reshape(x.shape[0], -1) @ weights.T + bias

    return logits_fn, weights, bias


def interior_images(key, batch_size, image_shape=(4, 5, 1)):
    """Images so far inside [0,1] that small attacks never meet its walls."""
    return jax.random.uniform(key, (batch_size, *image_shape), minval=0.4, maxval=0.6)


def make_nonlinear(key, image_shape=(4, 5, 1), num_classes=3, hidden=16):
    """A small smooth network as a plain function of x."""
    size = image_shape[0] * image_shape[1] * image_shape[2]
    one, two = jax.random.split(key)
    w1 = jax.random.normal(one, (size, hidden)) / jnp.sqrt(size) * 3
    w2 = jax.random.normal(two, (hidden, num_classes))
    return lambda x: jnp.tanh((x - 0.5).reshape(x.shape[0], -1) @ w1) @ w2


def sizes(x_adv, x, norm):
    """The norm of each perturbation, [B,H,W,C], [B,H,W,C] -> [B], in float64."""
    flat = (np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1)
    return np.linalg.norm(flat, ORDERS[norm], axis=-1)
