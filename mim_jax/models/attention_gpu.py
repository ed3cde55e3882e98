"""Attention by cuDNN's flash attention, which never writes the weights (b, h, m, n) down.

Shapes: b images, n tokens, m of them as queries, h heads, d width of a head.
"""

import functools

import einops
import jax
import jax.extend
import jax.numpy as jnp


def supports(qkv: jax.Array, heads: int) -> bool:
    """Returns whether cuDNN has attention for qkv (b, n, 3 h d), and is there to be compiled for.

    It is for half precision and some widths of a head. A bias is left to the plain implementation:
    cuDNN has its gradient in half precision only, and slowly.
    """
    width = qkv.shape[-1] // 3 // heads
    half = qkv.dtype in (jnp.bfloat16, jnp.float16)
    return half and width % 8 == 0 and width <= 128 and has_cudnn()


@functools.cache
def has_cudnn() -> bool:
    """Returns whether JAX runs on NVIDIA GPUs that cuDNN has it for: Ampere and later.

    cuDNN is needed already where a program is traced, so that a process without a GPU could not
    compile for one. Processes with a GPU may still compile for a CPU.
    """
    if "cuda" not in jax.extend.backend.get_backend().platform_version:
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8


def attention(qkv: jax.Array, *, heads: int, last: int) -> jax.Array:
    """qkv (b, n, 3 h d) -> (b, m, h d), of the `last` m queries.

    cuDNN wants even lengths: where they are odd there is one more query, whose answer is dropped,
    and one more key, which is not attended to.
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
