"""Images as the models see them: the source's own integers, less a mean, by a deviation."""

import jax
import jax.numpy as jnp

from mim_jax import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def unit(images: jax.Array) -> jax.Array:
    """Integers in their type's range, or floats in [0, 1] -> [0, 1]."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        return images.astype(jnp.float32) / jnp.iinfo(images.dtype).max
    return images


def normalize(images: jax.Array, mean: tuple, std: tuple) -> jax.Array:
    """Integers in their type's range, or floats in [0, 1], (b, H, W, c) -> (x - mean) / std."""
    channels = images.shape[-1]
    if {len(mean), len(std)} - {1, channels}:
        raise UserError(
            f"the images have {channels} channels, but objective.mean has {len(mean)} values and "
            f"objective.std {len(std)}: give one a channel, or one for all."
        )
    images = unit(images)
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def denormalize(images: jax.Array, mean: tuple, std: tuple) -> jax.Array:
    """Undoes `normalize`: -> [0, 1]."""
    return images * jnp.asarray(std, images.dtype) + jnp.asarray(mean, images.dtype)
