"""UPerNet (Xiao et al., 2018) on the features of a plain ViT, as in BEiT's segmentation.

Shapes: b images, n patches, h rows of patches, w columns, H and W of a feature map, d width,
c channels, k classes, s bins of a pooling.
"""

from collections.abc import Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models.batch_norm import BatchNorm, ConvNorm
from mim_jax.models.layers import gelu

POOL_SCALES = (1, 2, 3, 6)


def to_maps(tokens: Sequence[jax.Array], grid: tuple[int, int]) -> list[jax.Array]:
    """Reshapes tokens (b, 1 + n, d) of blocks to maps (b, h, w, d), without the class token."""
    return [einops.rearrange(x[:, 1:], "b (h w) d -> b h w d", h=grid[0]) for x in tokens]


def resize(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resizes x (b, H, W, c) -> (b, *size, c), bilinear without antialias, like PyTorch."""
    shape = (len(x), *size, x.shape[-1])
    return x if x.shape == shape else jax.image.resize(x, shape, "bilinear", antialias=False)


def drop_channels(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Drops whole channels of x (b, H, W, c) like PyTorch's Dropout2d, with one key per image (b,).

    Without keys nothing is dropped.
    """
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[-1:]))(keys)
    return x * (keep / (1 - rate)).astype(x.dtype)[:, None, None]


class Classes(nn.Module):
    """Dropout of channels and a 1 x 1 convolution to logits in float32 or better."""

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, drop_keys: jax.Array | None = None) -> jax.Array:
        """x (b, H, W, c) -> logits (b, H, W, k)"""
        x = drop_channels(x, self.dropout, drop_keys)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        init = nn.initializers.normal(0.01)  # mmseg's decode_head.py
        return nn.Dense(self.num_classes, kernel_init=init, name="conv")(x)


class FeaturePyramid(nn.Module):
    """Computes feature maps at four scales from four blocks of a ViT, which have the same scale.

    Transposed convolutions enlarge the first map by 4 and the second by 2; the third is kept, and
    max pooling halves the fourth (BEiT, semantic_segmentation/backbone/beit.py).
    """

    group: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], training: bool) -> list[jax.Array]:
        """maps, 4 x (b, h, w, d) -> (b, 4h, 4w, d), (b, 2h, 2w, d), (b, h, w, d), (b, h/2, ...)"""
        first, second, third, fourth = maps
        first = self.double(first, "up4_first")
        first = gelu(BatchNorm(self.group, name="up4_norm")(first, training))
        first = self.double(first, "up4_second")
        second = self.double(second, "up2")
        return [first, second, third, nn.max_pool(fourth, (2, 2), (2, 2))]

    def double(self, x: jax.Array, name: str) -> jax.Array:
        """Doubles x (b, h, w, d) -> (b, 2h, 2w, d), with a matrix for each of four new pixels."""
        width = x.shape[-1]
        bound = (4 * width) ** -0.5  # PyTorch's default of a deconvolution, for its bias too

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return nn.ConvTranspose(
            width,
            (2, 2),
            (2, 2),
            padding="VALID",
            transpose_kernel=True,
            kernel_init=uniform,
            bias_init=uniform,
            dtype=self.dtype,
            name=name,
        )(x)


class UPerNet(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid network, and a pixel classifier.

    This is mmsegmentation's UPerHead, with which BEiT and MAE segment ADE20K.
    """

    num_classes: int
    channels: int
    group: int
    pool_scales: tuple[int, ...] = POOL_SCALES
    dropout: float = 0.1
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array], training: bool = False, drop_keys: jax.Array | None = None
    ) -> jax.Array:
        """maps (b, H_i, W_i, d), the finest first -> logits (b, H_0, W_0, k)"""

        def convolution(kernel: int, name: str) -> ConvNorm:
            return ConvNorm(self.channels, kernel, self.group, self.dtype, name=name)

        *fine, coarse = maps
        pooled = [coarse]
        for scale in self.pool_scales:
            x = convolution(1, f"pool_{scale}")(adaptive_mean(coarse, scale), training)
            pooled.append(resize(x, coarse.shape[1:3]))
        top = convolution(3, "bottleneck")(jnp.concatenate(pooled, axis=-1), training)
        laterals = [convolution(1, f"lateral_{i}")(x, training) for i, x in enumerate(fine)]
        laterals.append(top)
        for i in reversed(range(len(fine))):
            laterals[i] += resize(laterals[i + 1], laterals[i].shape[1:3])
        levels = [convolution(3, f"level_{i}")(x, training) for i, x in enumerate(laterals[:-1])]
        size = levels[0].shape[1:3]
        levels = [resize(x, size) for x in (*levels, top)]
        x = convolution(3, "fusion")(jnp.concatenate(levels, axis=-1), training)
        return Classes(self.num_classes, self.dropout, name="classes")(x, drop_keys)


class FCN(nn.Module):
    """One convolution and a classifier of pixels: mmsegmentation's FCNHead, an auxiliary head."""

    num_classes: int
    channels: int
    group: int
    dropout: float = 0.1
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, training: bool = False, drop_keys: jax.Array | None = None
    ) -> jax.Array:
        """x (b, H, W, d) -> logits (b, H, W, k)"""
        x = ConvNorm(self.channels, 3, self.group, self.dtype, name="conv")(x, training)
        return Classes(self.num_classes, self.dropout, name="classes")(x, drop_keys)


def adaptive_mean(x: jax.Array, bins: int) -> jax.Array:
    """Averages x (b, H, W, c) over s x s bins -> (b, s, s, c), like PyTorch's AdaptiveAvgPool2d."""
    rows, columns = (jnp.asarray(bin_weights(side, bins), x.dtype) for side in x.shape[1:3])
    return jnp.einsum("sh,tw,bhwc->bstc", rows, columns, x)


def bin_weights(side: int, bins: int) -> np.ndarray:
    """Returns weights (s, side) of pixels in each bin; bins overlap if s does not divide side."""
    weights = np.zeros((bins, side))
    for i in range(bins):
        start, stop = i * side // bins, -(-(i + 1) * side // bins)
        weights[i, start:stop] = 1 / (stop - start)
    return weights
