"""Attention by cuDNN's flash attention, which does not store the weights (b, h, m, n).

Shapes: b images, n tokens, m queries, h heads, d width of a head.
"""

import functools

import einops
import jax
import jax.extend
import jax.numpy as jnp


def supports(qkv: jax.Array, heads: int) -> bool:
    """Returns whether cuDNN is available and supports attention for qkv (b, n, 3 h d).

    It supports half precision and some widths of a head. With a bias the plain implementation is
    used, because cuDNN computes the gradient of the bias slowly and in half precision only.
    """
    width = qkv.shape[-1] // 3 // heads
    half = qkv.dtype in (jnp.bfloat16, jnp.float16)
    return half and width % 8 == 0 and width <= 128 and has_cudnn()


@functools.cache
def has_cudnn() -> bool:
    """Returns whether JAX runs on NVIDIA GPUs that cuDNN's attention supports: Ampere and later.

    Tracing already requires cuDNN, so only a process with a GPU can compile for GPUs.
    """
    if "cuda" not in jax.extend.backend.get_backend().platform_version:
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8


def attention(qkv: jax.Array, *, heads: int, last: int) -> jax.Array:
    """qkv (b, n, 3 h d) -> (b, m, h d), for the `last` m queries.

    cuDNN requires even lengths. Odd ones are padded with a query, whose result is dropped, and a
    key, which is masked.
    """
    q, k, v = einops.rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=heads)
    n = k.shape[1]

    def even(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    lengths = jnp.full(len(qkv), n, jnp.int32) if n % 2 else None
    y = jax.nn.dot_product_attention(
        even(q[:, -last:]),
        even(k),
        even(v),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return y[:, :last].reshape(len(qkv), last, -1)
