"""Which implementation of attention is compiled for which platform, and cuDNN's without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import attention_gpu
from mim_jax.models.attention import attention, plain
from mim_jax.models.transformer import Block


@pytest.mark.parametrize("queries, keys", [(50, 50), (197, 197), (147, 197), (47, 65), (5, 8)])
def test_padding_to_even_lengths_changes_nothing(monkeypatch, queries, keys):
    def reference(*args, implementation, **kwargs):  # as cuDNN: no gradients of odd lengths
        assert implementation == "cudnn"
        assert all(x.shape[1] % 2 == 0 for x in args)
        return by_jax(*args, implementation="xla", **kwargs)

    by_jax = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", reference)
    draw = np.random.default_rng(0).normal
    qkv = draw(size=(2, keys, 3 * 3 * 8)).astype(np.float32)
    weights = draw(size=(2, queries, 3 * 8)).astype(np.float32)

    def by_cudnn(qkv):
        return attention_gpu.attention(qkv, heads=3, last=queries)

    def by_us(qkv):
        return plain(qkv, None, heads=3, last=queries)

    np.testing.assert_allclose(by_cudnn(qkv), by_us(qkv), atol=2e-6)
    ours, theirs = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(qkv) for f in (by_us, by_cudnn))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_only_the_last_queries(biased):
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(2, 9, 3 * 16)).astype(np.float32)
    bias = rng.normal(size=(4, 9, 9)).astype(np.float32) if biased else None
    whole, some = attention(qkv, 4, bias), attention(qkv, 4, bias, last=5)
    np.testing.assert_allclose(some, whole[:, 4:], atol=1e-6)


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
def test_a_gpu_uses_cudnn_where_it_is_supported(monkeypatch, dtype, heads, biased, flash):
    def by_cudnn(qkv, *, heads, last):
        calls.append(qkv.shape)
        return jnp.zeros((len(qkv), last, qkv.shape[2] // 3), qkv.dtype)

    calls = []
    monkeypatch.setattr(attention_gpu, "has_cudnn", lambda: True)
    monkeypatch.setattr(attention_gpu, "attention", by_cudnn)
    x, bias = jnp.ones((1, 5, 16)), jnp.zeros((heads, 5, 5)) if biased else None
    jax.eval_shape(Block(heads, dtype).init, jax.random.key(0), x, bias)
    assert bool(calls) == flash


def test_there_is_no_cudnn_on_a_cpu():
    assert not attention_gpu.has_cudnn()


@pytest.mark.parametrize("platform, kernels", [("cpu", 0), ("tpu", 2), ("cuda", 0)])
def test_the_target_platform_decides(platform, kernels):
    """Of programs lowered on this machine, whatever it is: forward and backward."""
    gradient = jax.jit(jax.grad(lambda qkv: attention(qkv, 2).astype(jnp.float32).sum()))
    traced = gradient.trace(jnp.ones((2, 16, 3 * 2 * 16), jnp.bfloat16))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("tpu_custom_call") == kernels
