"""Batch normalization over fixed groups of images, and the convolution that it follows.

Shapes: b images, g groups, H rows, W columns, c channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError

COLLECTION = "batch_statistics"  # of the running statistics
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # mmcv's kaiming_init


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy, 2015) with statistics of `group` consecutive images.

    A group replaces the images of one device, or of all devices (SyncBN), of the original codes:
    the result is the same on any mesh and with any accumulation, as long as `group` divides the
    images that one device computes at once. The running statistics, which evaluation uses, are
    those of PyTorch: momentum 0.1, and the unbiased variance.
    """

    group: int
    epsilon: float = 1e-5
    affine: bool = True
    key: str = "objective.batch_norm"  # the config key of `group`, for the error message

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """x (b, ..., c) -> (b, ..., c), in float32 or better inside."""
        shape, dtype, channels = x.shape, x.dtype, x.shape[-1]
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        mean = self.variable(COLLECTION, "mean", jnp.zeros, (channels,), x.dtype)
        variance = self.variable(COLLECTION, "variance", jnp.ones, (channels,), x.dtype)
        if training:
            if len(x) % self.group:
                raise UserError(
                    f"{self.key} = {self.group} does not divide the {len(x)} images that are "
                    "computed at once: make it a divisor of batch_size / devices / accumulate."
                )
            groups = x.reshape(len(x) // self.group, -1, channels)  # (g, values, c)
            count = groups.shape[1]
            means = groups.mean(1, keepdims=True)
            variances = groups.var(1, keepdims=True)
            y = (groups - means) * jax.lax.rsqrt(variances + self.epsilon)
            unbiased = variances * count / max(count - 1, 1)
            mean.value = 0.9 * mean.value + 0.1 * means.mean((0, 1))
            variance.value = 0.9 * variance.value + 0.1 * unbiased.mean((0, 1))
        else:
            y = (x - mean.value) * jax.lax.rsqrt(variance.value + self.epsilon)
        y = y.reshape(shape)
        if self.affine:
            y = y * self.param("scale", nn.initializers.ones, (channels,))
            y = y + self.param("bias", nn.initializers.zeros, (channels,))
        return y.astype(dtype)


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalization, and ReLU: mmcv's ConvModule."""

    channels: int
    kernel: int
    group: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """x (b, H, W, c) -> (b, H, W, channels)"""
        conv = nn.Conv(
            self.channels,
            (self.kernel, self.kernel),
            padding=self.kernel // 2,
            use_bias=False,
            kernel_init=HE,
            dtype=self.dtype,
            name="conv",
        )
        return nn.relu(BatchNorm(self.group, name="norm")(conv(x), training))
