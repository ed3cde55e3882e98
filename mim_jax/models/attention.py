"""Multi-head attention, with an implementation for each platform.

Shapes: b images, n tokens, m queries, h heads, d width of a head.
"""

import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp

from mim_jax.models import attention_gpu, attention_tpu, cpu


def attention(
    qkv: jax.Array, heads: int, bias: jax.Array | None = None, last: int | None = None
) -> jax.Array:
    """qkv (b, n, 3 h d), bias (h, n, n) -> (b, m, h d), for all queries or the `last` m.

    The features of qkv are queries, keys and values, each head by head. The softmax is in float32
    or better. The platform that the program is compiled for selects the implementation:

    - TPUs in bfloat16: kernels on the fused qkv (attention_tpu.py);
    - NVIDIA GPUs in half precision and without a bias: cuDNN (attention_gpu.py);
    - CPUs: `plain`, with a faster softmax (cpu.py);
    - all others: `plain`.
    """
    last = last or qkv.shape[1]
    plain_of = functools.partial(plain, heads=heads, last=last)
    branches: dict[str, Callable] = dict(
        cpu=functools.partial(plain_of, softmax=cpu.softmax), default=plain_of
    )
    if bias is None and attention_gpu.supports(qkv, heads):
        flash = functools.partial(attention_gpu.attention, heads=heads, last=last)
        branches["cuda"] = lambda qkv, bias: flash(qkv)
    if attention_tpu.supports(qkv, heads, bias):
        branches["tpu"] = lambda qkv, bias: attention_tpu.attention(qkv, bias, heads, last)
    return jax.lax.platform_dependent(qkv, bias, **branches)


def plain(
    qkv: jax.Array,
    bias: jax.Array | None,
    *,
    heads: int,
    last: int,
    softmax: Callable = jax.nn.softmax,
) -> jax.Array:
    """`attention` in plain JAX operations, the reference for the other implementations."""
    q, k, v = split_heads(qkv, heads)
    scores = jnp.promote_types(q.dtype, jnp.float32)
    q = q[:, :, -last:]
    logits = jnp.einsum("bhmd,bhnd->bhmn", q, k, preferred_element_type=scores)
    logits = logits * q.shape[-1] ** -0.5
    weights = softmax(logits if bias is None else logits + bias[:, -last:].astype(scores))
    y = jnp.einsum("bhmn,bhnd->bhmd", weights.astype(v.dtype), v)
    return einops.rearrange(y, "b h m d -> b m (h d)")


def split_heads(qkv: jax.Array, heads: int) -> jax.Array:
    """qkv (b, n, 3 h d) -> queries, keys and values (3, b, h, n, d)."""
    return einops.rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
