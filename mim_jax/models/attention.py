"""Attention: how tokens look at each other.

Shapes: b images, h heads, m queries, n keys, d width of a head.
"""

import functools

import jax
import jax.extend
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None):
    """q (b, h, m, d), k and v (b, h, n, d), bias (h, m, n) -> (b, h, m, d).

    The softmax is in float32 or better. In half precision on an NVIDIA GPU it is cuDNN's flash
    attention, which never writes the weights (b, h, m, n) down; not with a bias, of which cuDNN
    has the gradient in half precision alone, and slowly.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if bias is None and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and has_cudnn():
        return flash_attention(q, k, v)
    scores = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bhmd,bhnd->bhmn", q, k, preferred_element_type=scores)
    logits = logits * q.shape[-1] ** -0.5
    weights = softmax(logits if bias is None else logits + bias.astype(scores))
    return jnp.einsum("bhmn,bhnd->bhmd", weights.astype(v.dtype), v)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """As jax.nn's, with one division a row instead of one an element: a CPU's step is faster."""
    weights = jnp.exp(x - x.max(-1, keepdims=True))
    return weights * (1 / weights.sum(-1, keepdims=True))


@softmax.defjvp
def _(primals, tangents):
    y, dx = softmax(*primals), tangents[0]
    return y, y * (dx - (y * dx).sum(-1, keepdims=True))


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` by cuDNN, for which m and n must be even: with one more query where they are not,
    whose answer is dropped, and one more key, which none sees.
    """
    m, n = q.shape[2], k.shape[2]

    def even(x):  # -> (b, m + m % 2, h, d)
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, x.shape[2] % 2), (0, 0), (0, 0)))

    seen = jnp.full(len(q), n, jnp.int32) if n % 2 else None
    y = jax.nn.dot_product_attention(
        even(q), even(k), even(v), key_value_seq_lengths=seen, implementation="cudnn"
    )
    return y[:, :m].swapaxes(1, 2)


@functools.cache
def has_cudnn() -> bool:
    """Whether programs are for NVIDIA GPUs that cuDNN has flash attention for: Ampere and later."""
    if "cuda" not in jax.extend.backend.get_backend().platform_version:
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8
