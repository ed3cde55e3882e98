"""The stem of the hybrid ViT: the first stages of BiT's ResNet-50 (Kolesnikov et al., 2019).

Group norm and standardized convolutions, three stages of 3, 4 and 9 blocks (Dosovitskiy et al.,
2020, section 3.1 and appendix B; timm's vit_base_r50_s16_224).

Shapes: b images of H x W pixels, c channels.
"""

import functools

import flax.linen as nn
import jax

STRIDE = 16  # pixels per feature


class Conv(nn.Module):
    """A convolution with kernels standardized per output channel (Qiao et al., 2019)."""

    width: int
    side: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.side, self.side, x.shape[-1], self.width)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, shape)
        mean, variance = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        kernel = (kernel - mean) * jax.lax.rsqrt(variance + 1e-8)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride,) * 2,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


Norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5, use_fast_variance=False)


class Bottleneck(nn.Module):
    """A residual block: convolutions of 1 x 1, 3 x 3 and 1 x 1, a quarter of the width inside."""

    width: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inside, shortcut = self.width // 4, x
        if x.shape[-1] != self.width:
            shortcut = Conv(self.width, 1, self.stride, self.dtype, name="shortcut")(x)
            shortcut = Norm(dtype=self.dtype, name="shortcut_norm")(shortcut)
        shapes = (inside, 1, 1), (inside, 3, self.stride), (self.width, 1, 1)
        for i, shape in enumerate(shapes, 1):
            x = Conv(*shape, self.dtype, name=f"conv{i}")(x)
            x = Norm(dtype=self.dtype, name=f"norm{i}")(x)
            x = x if i == 3 else nn.relu(x)
        return nn.relu(x + shortcut)


class Stem(nn.Module):
    """Computes features (b, H/16, W/16, 1024) of images (b, H, W, c)."""

    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = Conv(64, 7, 2, self.dtype, name="conv")(images)
        x = nn.relu(Norm(dtype=self.dtype, name="norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 9)):
            for i in range(blocks):
                stride = 2 if stage and i == 0 else 1
                name = f"stage_{stage}_block_{i}"
                x = Bottleneck(256 << stage, stride, self.dtype, name=name)(x)
        return x
