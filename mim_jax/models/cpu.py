"""Alternative implementations that are faster on a CPU, but not on accelerators.

Measured by benchmarks/step_time.py.
"""

import jax
import jax.numpy as jnp


def product(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """Returns x (..., d) times kernel (d, e) as one product of two matrices.

    This saves a quarter of the time of a training step.
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, **options)
    return y.reshape(*x.shape[:-1], -1)


def product_over_rows(x: jax.Array, y: jax.Array, **options) -> jax.Array:
    """Returns x (..., d) transposed times y (..., e), summed over all rows (d, e).

    Computing it as one matrix product saves a sixth of the time of a training step.
    """
    rows = (((0,), (0,)), ((), ()))
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return jax.lax.dot_general(x, y, rows, **options)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Computes jax.nn.softmax with one division per row instead of one per element."""
    weights = jnp.exp(x - x.max(-1, keepdims=True))
    return weights * (1 / weights.sum(-1, keepdims=True))


@softmax.defjvp
def softmax_jvp(primals, tangents):
    y, dx = softmax(*primals), tangents[0]
    return y, y * (dx - (y * dx).sum(-1, keepdims=True))
