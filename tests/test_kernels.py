"""The TPU's attention kernels, run by an interpreter, against the plain implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import attention_tpu
from mim_jax.models.attention import plain

SHAPES = [  # images, tokens, heads, width of a head, queries
    (2, 197, 2, 32, 147),
    (4, 50, 12, 64, 50),
    (3, 21, 16, 8, 21),
    (2, 65, 5, 80, 65),
    (1, 17, 1, 128, 16),
    (2, 33, 3, 16, 1),
]


def draw(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("b", "n", "heads", "d", "last"), SHAPES)
def test_values_and_gradients(b, n, heads, d, last, dtype, biased):
    """Also in bfloat16 the plain implementation computes in float32."""
    qkv, weights = draw((b, n, 3 * heads * d), dtype), draw((b, last, heads * d), dtype, 1)
    bias = draw((heads, n, n), "float32", 2) if biased else None

    def kernel(qkv, bias):
        return attention_tpu.attention(qkv, bias, heads, last, True)

    def reference(qkv, bias):
        return plain(qkv, bias, heads=heads, last=last)

    def compute(function, dtype):
        def total(qkv, bias):
            y = function(qkv, bias)
            return (y * weights.astype(dtype)).astype(jnp.float32).sum(), y

        gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, y), gradients = gradient(qkv.astype(dtype), bias)
        return [np.asarray(x, np.float32) for x in jax.tree.leaves((y, gradients))]

    tolerance = dict(float32=2e-6, bfloat16=2**-7)[dtype]  # bfloat16 rounds to 2**-9
    for ours, right in zip(compute(kernel, dtype), compute(reference, "float32"), strict=True):
        np.testing.assert_allclose(ours, right, rtol=0, atol=tolerance * np.abs(right).max())


def test_large_logits_do_not_overflow():
    qkv = 40 * draw((1, 16, 3 * 16), "float32")
    ours = attention_tpu.attention(qkv, None, 1, 16, True)
    np.testing.assert_allclose(ours, plain(qkv, None, heads=1, last=16), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "heads", "d", "dtype", "biased", "supported"),
    [
        (197, 12, 64, "bfloat16", True, True),
        (257, 16, 80, "bfloat16", False, True),
        (577, 16, 64, "bfloat16", False, True),
        (577, 12, 64, "bfloat16", True, True),
        (1025, 12, 64, "bfloat16", False, True),
        (197, 12, 64, "float32", False, False),
        (197, 16, 4, "bfloat16", False, False),  # too narrow
        (4097, 16, 64, "bfloat16", False, False),  # too long
    ],
)
def test_supports(n, heads, d, dtype, biased, supported):
    qkv = jax.ShapeDtypeStruct((8, n, 3 * heads * d), dtype)
    bias = jax.ShapeDtypeStruct((heads, n, n), "float32") if biased else None
    assert attention_tpu.supports(qkv, heads, bias) == supported
