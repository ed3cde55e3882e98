"""Counted operations, against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import flops, recipe, schema, training
from mim_jax.start import Start


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return flops.count(jax.make_jaxpr(function)(*arrays).jaxpr)


def test_products_and_their_loops():
    one = 2 * 3 * 5 * 7
    assert counted(jnp.matmul, (3, 5), (5, 7)) == one
    assert counted(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (4, 3, 5), (4, 5, 7)) == 4 * one
    assert counted(jax.jit(jnp.matmul), (3, 5), (5, 7)) == one
    assert counted(jax.checkpoint(jnp.matmul), (3, 5), (5, 7)) == one

    def loop(x, y):
        return jax.lax.scan(lambda carry, _: (carry, x @ y), 0.0, None, length=6)[1]

    assert counted(loop, (3, 5), (5, 7)) == 6 * one

    def either(x, y):
        return jax.lax.cond(x.sum() > 0, lambda: x @ y, lambda: x @ y + x @ y)

    assert counted(either, (3, 5), (5, 7)) == 2 * one


def test_convolutions_and_their_gradients():
    def convolve(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", None, None, dimensions)

    one = 2 * (2 * 2 * 3) * (2 * 4 * 4 * 5)
    assert counted(convolve, (2, 8, 8, 3), (2, 2, 3, 5)) == one
    gradient = jax.grad(lambda x, kernel: (convolve(x, kernel) ** 2).sum(), argnums=(0, 1))
    assert counted(gradient, (2, 8, 8, 3), (2, 2, 3, 5)) == 3 * one


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("tuned_blocks", [-1.0, 0.0])
def test_a_step_of_a_classifier(tuned_blocks, accumulate):
    """Three times the forward pass, without gradients of the images; once where it is frozen."""
    width, depth, n, labels, rows = 32, 3, 16, 9, 16
    overrides = [f"batch_size={rows}", f"accumulate={accumulate}", "data.size=32"]
    overrides += [f"objective.tuned_blocks={tuned_blocks}", "objective.pooling=cls"]
    overrides += ["objective.mixup=0.0", "objective.cutmix=0.0"]
    overrides += [f"model.{k}={x}" for k, x in dict(width=width, depth=depth, patch=8).items()]
    config = schema.load("configs/emoji_scratch.py", overrides)
    run = recipe.build(config)
    tokens = rows * (n + 1)
    embed, head = 2 * rows * n * 8 * 8 * 3 * width, 2 * rows * width * labels
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens * (n + 1) * width
    trained = 3 * depth * block + 2 * embed + 3 * head
    frozen = depth * block + embed + 2 * head
    operations = flops.step_flops(Start(run, config).trace_step().jaxpr)
    assert operations * run.mesh.size == (frozen if tuned_blocks == 0 else trained)


def share_of_a_peak(monkeypatch, name: str, *overrides: str) -> float:
    config = schema.load(f"configs/{name}.py", ["model.dtype=bfloat16", *overrides], smoke=True)
    run = recipe.build(config)
    assert training.peak_share(run, config) == 0  # of a CPU, no peak is known
    with monkeypatch.context() as patch:
        patch.setitem(flops.PEAKS, "cpu", 1e12)
        return training.peak_share(run, config)


def test_rematerialization_does_not_count(monkeypatch):
    plain, full = (
        share_of_a_peak(monkeypatch, "mae_base", f"model.remat={remat}")
        for remat in ("none", "full")
    )
    assert plain == full > 0


def test_steps_that_communicate(monkeypatch):
    """Statistics of batch normalization over all devices need the mesh."""
    overrides = ["batch_size=16", "objective.batch_norm=16"]
    assert share_of_a_peak(monkeypatch, "ade20k_beit_base", *overrides) > 0


def test_peaks():
    assert flops.peak("TPU v5 lite") == 197e12
    assert flops.peak("TPU v5") == 459e12
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("NVIDIA L40S") == 362e12
    assert flops.peak("cpu") == 0
