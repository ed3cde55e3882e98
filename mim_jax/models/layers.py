"""Dense, LayerNorm and GELU, with gradients that are accurate and cheap in bfloat16.

Matrix products take their operands in the compute dtype. Sums over rows (means, variances,
the gradients of kernels, biases and gains) are in float32 or better.

Shapes: any leading axes, d inputs, e outputs.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models import cpu

EPSILON = 1e-6
FIXED_POINT = 2.0**14  # 1 as a fixed-point number of 16 bits


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns float32 for narrower dtypes, and float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def sum_rows(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the sum of x (..., d) over all rows (d,), accumulated in float32 or better."""
    wide = x.astype(at_least_float32(x.dtype))
    return wide.sum(range(x.ndim - 1)).astype(dtype)


def product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x (..., d) times kernel (d, e) in `dtype`, accumulated in float32 or better."""
    plain = functools.partial(jnp.matmul, preferred_element_type=dtype)
    on_cpu = functools.partial(cpu.product, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


def product_over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x (..., d) transposed times y (..., e), summed over all rows in float32 or better.

    On a TPU, leading axes are not merged, which would copy the array.
    """
    rows, dtype = tuple(range(x.ndim - 1)), at_least_float32(x.dtype)
    plain = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=((rows, rows), ((), ())),
        preferred_element_type=dtype,
    )
    on_cpu = functools.partial(cpu.product_over_rows, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Returns x (..., d) times kernel (d, e), plus bias (e,), in `dtype`."""
    y = product(x, kernel.astype(x.dtype), dtype)
    return y if bias is None else y + bias.astype(dtype)


def affine_forward(x, kernel, bias, dtype):
    return affine(x, kernel, bias, dtype), (x, kernel, bias)


def affine_backward(dtype, saved, gradient):
    x, kernel, bias = saved
    narrow = gradient.astype(x.dtype)
    for_x = product(narrow, kernel.astype(x.dtype).T, x.dtype)
    for_kernel = product_over_rows(x, narrow)
    for_bias = None if bias is None else sum_rows(gradient, bias.dtype)
    return for_x, for_kernel.astype(kernel.dtype), for_bias


affine.defvjp(affine_forward, affine_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x (..., d) plus bias (d,), in the dtype of x."""
    return x + bias.astype(x.dtype)


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), bias),
    lambda bias, gradient: (gradient, sum_rows(gradient, bias.dtype)),
)


class Dense(nn.Module):
    """A linear layer that computes in `dtype`, and returns float32 or better if it is `wide`.

    Heads are wide, because losses need float32, and so are layers at the start of a residual
    stream. A bias assembled from several parameters can be passed to a layer without its own.
    """

    features: int
    use_bias: bool = True
    dtype: str | None = None  # None: that of the input
    wide: bool = False
    kernel_init: Callable = nn.initializers.xavier_uniform()
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x (..., d) -> (..., features)."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
        x = x.astype(self.dtype or x.dtype)
        return affine(x, kernel, bias, at_least_float32(x.dtype) if self.wide else x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: str) -> jax.Array:
    """Normalizes x (..., d) over its last axis, in float32 or better; returns `dtype`.

    The forward pass saves x and the statistics of each row, but not the normalized rows: x is in
    memory anyway, as part of the residual stream.
    """
    return layer_norm_forward(x, scale, bias, dtype)[0]


def layer_norm_forward(x, scale, bias, dtype):
    wide = x.astype(at_least_float32(x.dtype))
    mean = wide.mean(-1)
    centered = wide - mean[..., None]
    inverse = jax.lax.rsqrt((centered * centered).mean(-1) + EPSILON)
    y = centered * inverse[..., None] * scale + bias
    return y.astype(dtype), (x, mean, inverse, scale, bias)


def layer_norm_backward(dtype, saved, gradient):
    x, mean, inverse, scale, bias = saved
    gradient = gradient.astype(mean.dtype)
    normalized = (x.astype(mean.dtype) - mean[..., None]) * inverse[..., None]
    scaled = gradient * scale
    along = (scaled * normalized).mean(-1, keepdims=True)
    for_x = (scaled - scaled.mean(-1, keepdims=True) - normalized * along) * inverse[..., None]
    for_scale = sum_rows(gradient * normalized, scale.dtype)
    return for_x.astype(x.dtype), for_scale, sum_rows(gradient, bias.dtype)


layer_norm.defvjp(layer_norm_forward, layer_norm_backward)


class LayerNorm(nn.Module):
    """Layer normalization with learned scale and bias; returns `dtype`."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., d) -> (..., d)."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, self.dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Returns x times the normal distribution function of x (the exact GELU).

    The forward pass saves the slope instead of x, so that the backward pass is a single product.
    Slopes lie in (-0.13, 1.13). For bfloat16 they are saved as 16-bit fixed-point numbers, which
    are 100 times as accurate as bfloat16: the gradient is rounded once less than in PyTorch's
    autocast.
    """
    return gelu_forward(x)[0]


def gelu_forward(x):
    wide = x.astype(at_least_float32(x.dtype))
    below = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    slope = below + wide * density
    if x.dtype.itemsize == 2:
        slope = jnp.round(slope * FIXED_POINT).astype(jnp.int16)
    return (wide * below).astype(x.dtype), slope


def gelu_backward(slope, gradient):
    wide = gradient.astype(at_least_float32(gradient.dtype))
    if slope.dtype == jnp.int16:
        slope = slope.astype(jnp.float32) / FIXED_POINT
    return ((wide * slope).astype(gradient.dtype),)


gelu.defvjp(gelu_forward, gelu_backward)
