"""What is computed in another way on a CPU, because it is faster there.

Measured by benchmarks/step_time.py. Accelerators are better off without both.
"""

import jax
import jax.numpy as jnp


def product(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """Returns x (..., d) times kernel (d, e) as one product of two matrices.

    It takes a quarter off a training step.
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, **options)
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """As jax.nn.softmax, with one division per row instead of one per element."""
    weights = jnp.exp(x - x.max(-1, keepdims=True))
    return weights * (1 / weights.sum(-1, keepdims=True))


@softmax.defjvp
def softmax_jvp(primals, tangents):
    y, dx = softmax(*primals), tangents[0]
    return y, y * (dx - (y * dx).sum(-1, keepdims=True))
