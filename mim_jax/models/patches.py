"""Images as sequences of patches: cutting, assembling, selecting, and position embeddings.

Shapes: b images, n patches, m selected patches, d width, (p, q) patch, c channels.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError


def patchify(images: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Cuts images (b, H, W, c) into patches (b, n, p*q*c), row by row, channels fastest.

    Raises:
        UserError: if the patch size does not divide the image size.
    """
    (p, q), (height, width) = patch, images.shape[1:3]
    if height % p or width % q:
        raise UserError(
            f"images of {height} x {width} pixels cannot be cut into patches of {p} x {q}: "
            "data.size must be a multiple of model.patch."
        )
    return einops.rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=q)


def unpatchify(patches: jax.Array, patch: tuple[int, int], height: int) -> jax.Array:
    """Inverts `patchify`: patches (b, n, p*q*c) -> images (b, height, W, c)."""
    p, q = patch
    return einops.rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", p=p, q=q, h=height // p)


def take(tokens: jax.Array, indices: jax.Array) -> jax.Array:
    """Selects tokens (b or 1, n, d) by indices (b, m) -> (b, m, d)."""
    return jnp.take_along_axis(tokens, indices[..., None], axis=1)


def not_blank(images: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Finds patches with more than one color: images (b, H, W, c) in [0, 1] -> (b, n)."""
    patches, channels = patchify(images, patch), images.shape[-1]
    pixels = einops.rearrange(patches, "b n (p c) -> b n p c", c=channels)
    return (jnp.ptp(pixels, axis=2) > 0.02).any(-1)


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Returns fixed 2-D sine-cosine positions (1, n, d) in float64, as in MAE's code.

    The first half of the width encodes the column and the second half the row; in each half, sines
    come before cosines.

    Raises:
        UserError: if the width is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"sine-cosine positions need a width that is a multiple of 4, not {width}.")
    omega = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    y, x = (np.outer(axis.reshape(-1), omega) for axis in np.mgrid[: grid[0], : grid[1]])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None]


def relative_index(grid: tuple[int, int]) -> np.ndarray:
    """Returns indices [query, key] into a table of relative position bias (1 + n, 1 + n).

    Rows of the table are ordered by the offset from key to query. Its last three rows are for the
    class token as query, as key, and as both (BEiT's code).
    """
    height, width = grid
    y, x = (axis.reshape(-1) for axis in np.mgrid[:height, :width])
    down, right = (axis[:, None] - axis[None] for axis in (y, x))
    index = np.zeros((1 + y.size, 1 + y.size), np.int32)
    index[1:, 1:] = (down + height - 1) * (2 * width - 1) + right + width - 1
    rows = (2 * height - 1) * (2 * width - 1)
    index[0, :], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index
