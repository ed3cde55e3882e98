"""MAE's decoder, which predicts hidden patches from the encoded visible ones.

Shapes: b images, n patches, k visible, d width, (p, q) patch, c channels.
"""

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models.layers import Dense
from mim_jax.models.patches import sincos2d, take
from mim_jax.models.transformer import transform


class Decoder(nn.Module):
    """A small transformer over the encoded visible patches and mask tokens."""

    width: int
    depth: int
    heads: int
    dtype: str
    remat: str

    @nn.compact
    def __call__(self, latent, order, *, grid: tuple[int, int], values: int, last: int):
        """latent (b, 1 + k, d), order (b, n) -> predictions of the last patches (b, last, values).

        Tokens are not moved back to image order, because attention does not depend on their order.
        Each token gets the position embedding of its patch.

        Args:
            latent: (b, 1 + k, d), the class token and the encoded patches.
            order: (b, n), the patch of each token, in the order of `latent`, then hidden patches.
            grid: rows and columns of patches.
            values: number of values predicted per patch.
            last: number of tokens, from the end, to predict.
        """
        b, n = order.shape
        x = Dense(self.width, dtype=self.dtype, wide=True, name="embed")(latent)
        if hidden := n + 1 - x.shape[1]:
            mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
            mask_token = jnp.broadcast_to(mask_token.astype(x.dtype), (b, hidden, self.width))
            x = jnp.concatenate([x, mask_token], axis=1)
        positions = take(jnp.asarray(sincos2d(grid, self.width), x.dtype), order)
        x = x.at[:, 1:].add(positions)  # the class token has no position
        x = transform(
            x, self.depth, heads=self.heads, dtype=self.dtype, remat=self.remat, last=last
        )
        return Dense(values, dtype=self.dtype, wide=True, name="pred")(x)
