"""Normalization of images, integers or floats, by a mean and a standard deviation per channel."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError
from mim_jax.keys import Range, Smoke

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
Mean = Annotated[tuple, Range(), Smoke((0.5,)), "mean of the data's channels, in [0, 1]"]
Std = Annotated[
    tuple, Range(0, above=True), Smoke((0.5,)), "standard deviation of the data's channels"
]


def unit(images: jax.Array | np.ndarray) -> jax.Array:
    """Scales integers by the maximum of their type to [0, 1]; returns floats unchanged."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        return jnp.asarray(images, jnp.float32) / jnp.iinfo(images.dtype).max
    return jnp.asarray(images)


def normalize(images: jax.Array | np.ndarray, mean: tuple, std: tuple) -> jax.Array:
    """Normalizes images (b, H, W, c), integers or floats in [0, 1]: (x - mean) / std.

    Raises:
        UserError: if mean or std has neither one value nor one per channel.
    """
    channels = images.shape[-1]
    if {len(mean), len(std)} - {1, channels}:
        raise UserError(
            f"the images have {channels} channels, but objective.mean has {len(mean)} values and "
            f"objective.std {len(std)}: set one value per channel, or one for all."
        )
    images = unit(images)
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def denormalize(images: jax.Array, mean: tuple, std: tuple) -> jax.Array:
    """Inverts `normalize`: returns images in [0, 1]."""
    return images * jnp.asarray(std, images.dtype) + jnp.asarray(mean, images.dtype)
