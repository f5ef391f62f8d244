"""Stored images as pixels in [0,1], and their augmentation; both run on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key


def to_pixels(images: Array | np.ndarray) -> Float[Array, "b ..."]:
    """Images as floats in [0,1], on the device: uint8 as float32, floats as they are."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return jnp.asarray(images)
    return jnp.asarray(images, jnp.float32) / 255.0


def augment(
    images: Float[Array, "b h w c"], keys: Key[Array, " b"], *, crop_padding: int, flip: bool
) -> Float[Array, "b h w c"]:
    """Random crops of the image padded with zeros, and random left-right flips; on the device."""

    def augment_one(image, key):
        crop_key, flip_key = jax.random.split(key)
        if crop_padding:
            padding = ((crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0))
            row, column = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
            image = jax.lax.dynamic_slice(jnp.pad(image, padding), (row, column, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(augment_one)(images, keys) if crop_padding or flip else images
