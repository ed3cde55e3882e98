"""Counted operations, against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import flops
from mim_jax.models.vit import vit
from mim_jax.objectives import classify
from mim_jax.train import initialize


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


@pytest.mark.parametrize("tuned_blocks", [-1, 0])
def test_a_classifier(tuned_blocks):
    """Three times the forward pass, without gradients of the images; once if it is frozen."""
    width, depth, n, rows, labels = 32, 3, 16, 4, 10
    model = vit(width=width, depth=depth, heads=4, patch=8)
    objective = classify.objective(
        model, labels, pooling="cls", tuned_blocks=tuned_blocks, mixup_group=0
    )
    example = {
        "image": jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((1,), np.int32),
        "index": jax.ShapeDtypeStruct((1,), np.int32),
    }
    like = jax.eval_shape(lambda: initialize(objective, optax.sgd(0.1), example, seed=0))
    tokens = rows * (n + 1)
    embed, head = 2 * rows * n * 8 * 8 * 3 * width, 2 * rows * width * labels
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens * (n + 1) * width
    trained = 3 * depth * block + 2 * embed + 3 * head  # no gradient of the images
    frozen = depth * block + embed + 2 * head
    found = flops.of_training(objective, like, example, rows)
    assert found == (frozen if tuned_blocks == 0 else trained)


def test_peaks():
    assert flops.peak("TPU v5 lite") == 197e12
    assert flops.peak("TPU v5") == 459e12
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("NVIDIA L40S") == 362e12
    assert flops.peak("cpu") == 0
