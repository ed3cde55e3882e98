"""Segmentation decoders of a single feature map: SETR (Zheng et al., 2021), and a linear one.

Shapes: b images, h rows of patches, w columns, d width, k classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.batch_norm import BatchNorm, ConvNorm
from mim_jax.models.layers import LayerNorm
from mim_jax.models.upernet import Classes, resize


class SETR(nn.Module):
    """A norm, convolutions that are each followed by bilinear upsampling, and a pixel classifier.

    Four convolutions with factor 2 are SETR-PUP (progressive upsampling); one 1 x 1 convolution
    with factor 4 is SETR-Naive (mmsegmentation's SETRUPHead).
    """

    num_classes: int
    channels: int
    group: int
    convolutions: int = 4
    scale: int = 2  # factor by which each convolution's output is enlarged
    kernel: int = 3
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, training: bool = False, drop_keys: jax.Array | None = None
    ) -> jax.Array:
        """x (b, h, w, d) -> logits (b, h * scale^convolutions, w * scale^convolutions, k)"""
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        for i in range(self.convolutions):
            convolution = ConvNorm(
                self.channels, self.kernel, self.group, self.dtype, name=f"conv_{i}"
            )
            x = convolution(x, training)
            x = resize(x, (x.shape[1] * self.scale, x.shape[2] * self.scale))
        return Classes(self.num_classes, self.dropout, name="classes")(x, drop_keys)


class Linear(nn.Module):
    """Batch normalization and a linear classifier of patches, to probe a frozen encoder.

    As in DINOv2's linear evaluation of dense features (Oquab et al., 2023, section 7.4).
    """

    num_classes: int
    group: int

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        """x (b, h, w, d) -> logits (b, h, w, k)"""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = BatchNorm(self.group, name="norm")(x, training)
        return Classes(self.num_classes, name="classes")(x)
