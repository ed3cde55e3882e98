"""Attention by cuDNN, as far as that can be seen without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import attention
from mim_jax.models.transformer import Block


@pytest.mark.parametrize("queries, keys", [(50, 50), (197, 197), (147, 197), (48, 65), (5, 8)])
def test_what_flash_attention_adds_to_odd_lengths_counts_for_nothing(monkeypatch, queries, keys):
    def reference(*args, implementation, **kwargs):  # as cuDNN: no gradients of odd lengths
        assert implementation == "cudnn"
        assert all(x.shape[1] % 2 == 0 for x in args)
        return by_jax(*args, implementation="xla", **kwargs)

    by_jax = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", reference)
    draw = np.random.default_rng(0).normal
    sizes = (queries, keys, keys, queries)
    q, k, v, weights = (draw(size=(2, 3, n, 8)).astype(np.float32) for n in sizes)

    def total(function):
        return lambda *qkv: (function(*qkv) * weights).sum()

    flash, plain = (f(q, k, v) for f in (attention.flash_attention, attention.attention))
    np.testing.assert_allclose(flash, plain, atol=2e-6)
    ours, theirs = (
        jax.grad(total(function), argnums=(0, 1, 2))(q, k, v)
        for function in (attention.flash_attention, attention.attention)
    )
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.parametrize(
    "dtype, heads, biased, flash",
    [
        ("bfloat16", 2, False, True),
        ("float16", 2, False, True),
        ("float32", 2, False, False),
        ("bfloat16", 4, False, False),  # heads of 4 are too narrow for cuDNN
        ("bfloat16", 2, True, False),
    ],
)
def test_a_gpu_gets_flash_attention_where_cudnn_has_it(monkeypatch, dtype, heads, biased, flash):
    def by_cudnn(q, k, v):
        calls.append(q.shape)
        return jnp.zeros_like(q)

    calls = []
    monkeypatch.setattr(attention, "has_cudnn", lambda: True)
    monkeypatch.setattr(attention, "flash_attention", by_cudnn)
    x, bias = jnp.ones((1, 5, 16)), jnp.zeros((heads, 5, 5)) if biased else None
    jax.eval_shape(Block(heads, dtype).init, jax.random.key(0), x.astype(dtype), bias)
    assert bool(calls) == flash


def test_there_is_no_cudnn_on_a_cpu():
    assert not attention.has_cudnn()
