"""MAE against the reference's golden numbers, and the traps that it sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.masking import mask_by_noise
from mim_jax.objectives import mae
from tests.official import golden_state, mae_shapes, to_params

TINY = dict(width=32, depth=2, heads=4, patch=8)
TINY_DECODER = dict(width=16, depth=1, heads=2)


@pytest.fixture
def tiny(monkeypatch):
    """The tiny MAE of the golden numbers, in float64: image, noise, weights by their rules."""
    b, c, y, x = np.ogrid[:2, :3, :32, :32]
    images = np.sin(0.3 * b + 0.7 * c + 0.11 * y + 0.23 * x).transpose(0, 2, 3, 1)
    row, patch = np.ogrid[:2, :16]
    noise = ((7 * patch + 3 * row) % 16) / 16
    monkeypatch.setattr(mae, "random_masking", lambda *_: mask_by_noise(jnp.array(noise), 0.75))
    shapes = mae_shapes(
        width=32, depth=2, decoder_width=16, decoder_depth=1, patch=(8, 8), channels=3
    )
    with jax.enable_x64(True):
        yield to_params(golden_state(shapes)), {"image": jnp.array(images), "index": jnp.arange(2)}


def make(**settings):
    return mae.objective(
        TINY | dict(dtype="float64"), decoder=TINY_DECODER, mean=(0.0,), std=(1.0,), **settings
    )


@pytest.mark.parametrize("normalize_target, golden", [(False, 0.5773126943), (True, 1.0747624945)])
def test_golden_loss(tiny, normalize_target, golden):
    params, batch = tiny
    objective = make(normalize_target=normalize_target)
    total, weight, _ = objective.loss(params, {}, batch, jax.random.key(0), 0)
    assert weight == 2 * 12
    assert total / weight == pytest.approx(golden, abs=1e-10)
