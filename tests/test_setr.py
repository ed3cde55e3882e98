"""SETR's decoders and the linear one against independent PyTorch versions."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the heads are compared with PyTorch's")

from mim_jax.models.setr import SETR, Linear  # noqa: E402
from tests import segmentation_models as oracle  # noqa: E402
from tests.test_upernet import float64, maps, nhwc, pair, same_statistics  # noqa: E402, F401

B, WIDTH, CHANNELS, CLASSES = 4, 8, 6, 5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kind", [dict(convolutions=4, scale=2, kernel=3), dict(convolutions=1, scale=4, kernel=1)]
)
def test_setr(training, kind):
    reference = oracle.randomize(oracle.SETR(WIDTH, CHANNELS, CLASSES, **kind))
    names = {f"conv_{i}": f"convs.{i}" for i in range(kind["convolutions"])}
    names |= {"norm": "norm", "classes": "classes"}
    module = SETR(CLASSES, CHANNELS, B, **kind, dtype="float64")
    ours, theirs, after = pair(module, reference, names, maps((3, 5))[0], training)
    enlarged = kind["scale"] ** kind["convolutions"]
    assert ours.shape == (B, 3 * enlarged, 5 * enlarged, CLASSES)
    np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-8)
    same_statistics(after, reference, names)


@pytest.mark.parametrize("training", [False, True])
def test_linear(training):
    reference = oracle.randomize(oracle.Linear(WIDTH, CLASSES))
    names = {"norm": "norm", "classes": "classes"}
    ours, theirs, after = pair(Linear(CLASSES, B), reference, names, maps((3, 5))[0], training)
    np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-8)
    same_statistics(after, reference, names)


def test_initial_deviations():
    """Of convolutions mmcv's kaiming_init, of the classifier mmseg's 0.01."""
    module = SETR(CLASSES, 64, B)
    params = module.init(jax.random.key(0), maps((3, 5))[0])["params"]
    kernel = params["conv_1"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(params["classes"]["conv"]["kernel"].std(), 0.01, rtol=0.15)
