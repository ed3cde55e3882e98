"""Batch normalization over fixed groups of images, and a convolution with it.

Shapes: b images of a device, g groups, H rows, W columns, c channels.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError

COLLECTION = "batch_statistics"  # holds the running statistics
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # mmcv's kaiming_init


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy, 2015) over groups of consecutive images.

    Groups take the place of devices in the original code, so that the result is the same on any
    mesh. `group` must divide the number of images on a device, or be the batch size; statistics are
    then averaged over devices (SyncBN). The running statistics for evaluation are as in PyTorch:
    momentum 0.1 and the unbiased variance.
    """

    group: int
    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """x (b, ..., c) -> (b, ..., c); computed in at least float32."""
        shape, dtype, channels = x.shape, x.dtype, x.shape[-1]
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        mean = self.variable(COLLECTION, "mean", jnp.zeros, (channels,), x.dtype)
        variance = self.variable(COLLECTION, "variance", jnp.ones, (channels,), x.dtype)
        if training:
            x, means, variances, count = self.normalize(x)
            unbiased = variances * count / max(count - 1, 1)
            mean.value = 0.9 * mean.value + 0.1 * means.mean(0)
            variance.value = 0.9 * variance.value + 0.1 * unbiased.mean(0)
        else:
            x = (x - mean.value) * jax.lax.rsqrt(variance.value + self.epsilon)
        if self.affine:
            x = x * self.param("scale", nn.initializers.ones, (channels,))
            x = x + self.param("bias", nn.initializers.zeros, (channels,))
        return x.reshape(shape).astype(dtype)

    def normalize(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, int]:
        """Normalizes x (b, ..., c) -> x, means (g, c), variances (g, c), values per group.

        Raises UserError if the images of a device cannot be divided into groups.
        """
        axes = device_axes()
        devices = math.prod(axes.values())
        if whole := devices > 1 and self.group == len(x) * devices:
            axes, groups = tuple(axes), 1
        elif len(x) % self.group == 0:
            groups = len(x) // self.group
        else:
            raise UserError(
                f"objective.batch_norm = {self.group} does not divide the {len(x)} images "
                "that are processed at once: make it a divisor of batch_size / devices / "
                "accumulate, or batch_size with accumulate = 1."
            )

        def mean_of(x):
            mean = x.mean(1, keepdims=True)
            return jax.lax.pmean(mean, axes) if whole else mean

        shape, x = x.shape, x.reshape(groups, -1, x.shape[-1])  # (g, values, c)
        means = mean_of(x)
        variances = mean_of((x - means) ** 2)
        y = (x - means) * jax.lax.rsqrt(variances + self.epsilon)
        count = x.shape[1] * (devices if whole else 1)
        return y.reshape(shape), means[:, 0], variances[:, 0], count


def device_axes() -> dict[str, int]:
    """Returns {name: size} of the mesh axes over which shard_map splits the caller's rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.manual_axes if mesh.shape[name] > 1}


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
