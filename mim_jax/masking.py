"""Which patches the encoder does not get to see.

Shapes: b images, n patches, k visible, m hidden.
"""

import jax
import jax.numpy as jnp

from mim_jax import UserError


def random_masking(rngs: jax.Array, num_patches: int, ratio: float) -> tuple[jax.Array, jax.Array]:
    """Hides `ratio` of the patches of each image, uniformly at random (MAE, section 3).

    rngs (b,) keys, one an image -> the indices of the `visible` patches (b, k) and of the `hidden`
    ones (b, m), both in random order, k = int(n * (1 - ratio)) as in the reference.
    """
    noise = jax.vmap(lambda rng: jax.random.uniform(rng, (num_patches,)))(rngs)
    return mask_by_noise(noise, ratio)


def mask_by_noise(noise: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array]:
    """Keeps the patches of the smallest noise (b, n) -> visible (b, k), hidden (b, m)."""
    num_patches = noise.shape[1]
    num_visible = int(num_patches * (1 - ratio))
    if not 0 < num_visible < num_patches:
        raise UserError(
            f"objective.mask_ratio = {ratio} leaves {num_visible} of {num_patches} patches "
            "visible: at least one must be visible and one hidden."
        )
    order = jnp.argsort(noise, axis=1)
    return order[:, :num_visible], order[:, num_visible:]
