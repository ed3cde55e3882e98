"""UPerNet against an independent PyTorch version and the two of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the heads are compared with PyTorch's")

from mim_jax.models.upernet import (  # noqa: E402
    FCN,
    FeaturePyramid,
    UPerNet,
    adaptive_mean,
    drop_channels,
)
from tests import segmentation_models as oracle  # noqa: E402

B, WIDTH, CHANNELS, CLASSES = 4, 8, 6, 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def maps(grid=(7, 9), seed=0) -> list[np.ndarray]:
    """Four random maps (b, h, w, d)."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, *grid, WIDTH)) for _ in range(4)]


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def pair(module, reference, names, inputs, training):
    """-> what both modules give, and their running statistics after it."""
    variables = oracle.flax_variables(reference, names)
    ours, after = module.apply(variables, inputs, training, mutable=["batch_statistics"])
    reference.train(training)
    several = isinstance(inputs, list)
    theirs = reference([nchw(x) for x in inputs] if several else nchw(inputs))
    return ours, theirs, after.get("batch_statistics", {})


def same_statistics(after, reference, names):
    expected = oracle.flax_variables(reference, names)["batch_statistics"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), after, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
def test_pyramid(training, grid):
    reference = oracle.randomize(oracle.Pyramid(WIDTH))
    ours, theirs, after = pair(
        FeaturePyramid(B, "float64"), reference, oracle.PYRAMID, maps(grid), training
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, nhwc(b), atol=1e-8)
    same_statistics(after, reference, oracle.PYRAMID)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (3, 2)])
def test_upernet(training, grid):
    """Also where the coarsest map has fewer rows than the finest pooling has bins."""
    levels = oracle.Pyramid(WIDTH).double().eval()([nchw(x) for x in maps(grid)])
    levels = [nhwc(x) for x in levels]
    reference = oracle.randomize(oracle.UPerNet(WIDTH, CHANNELS, CLASSES), 1)
    ours, theirs, after = pair(
        UPerNet(CLASSES, CHANNELS, B, dtype="float64"),
        reference,
        oracle.upernet_names(),
        levels,
        training,
    )
    assert ours.shape == (B, 4 * grid[0], 4 * grid[1], CLASSES)
    np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-8)
    same_statistics(after, reference, oracle.upernet_names())


def test_fcn():
    reference = oracle.randomize(oracle.FCN(WIDTH, CHANNELS, CLASSES))
    module = FCN(CLASSES, CHANNELS, B, dtype="float64")
    ours, theirs, _ = pair(module, reference, oracle.FCN_NAMES, maps()[2], True)
    np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-8)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_adaptive_mean(bins):
    x = maps((5, 7))[0]
    theirs = torch.nn.functional.adaptive_avg_pool2d(nchw(x), bins)
    np.testing.assert_allclose(adaptive_mean(x, bins), nhwc(theirs), atol=1e-12)


def test_dropout_takes_whole_channels():
    """A tenth of them on average, other ones in each image; the rest makes up for them."""
    x = jnp.ones((16, 2, 3, 500))
    y = np.asarray(drop_channels(x, 0.1, jax.random.split(jax.random.key(0), 16)))
    assert (y == y[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.9])
    assert abs((y[:, 0, 0] == 0).mean() - 0.1) < 0.02
    assert (y[0] != y[1]).any()
    assert drop_channels(x, 0.1, None) is x


def test_beit_of_transformers():
    """The whole pyramid, head and auxiliary head of BeitForSemanticSegmentation."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=64, patch_size=16, num_labels=CLASSES, out_indices=[1, 2, 3, 4],
        auxiliary_channels=CHANNELS,
    )  # fmt: skip
    model = oracle.randomize(transformers.BeitForSemanticSegmentation(config)).eval()
    levels = model.fpn([nchw(x) for x in maps((4, 4))])

    def conv(layer):
        return torch.nn.Sequential(layer.convolution, layer.normalization, torch.nn.ReLU())

    ours = torch.nn.Module()
    ours.up4_first, ours.up4_norm = model.fpn.fpn1.conv_transpose1, model.fpn.fpn1.normalization
    ours.up4_second, ours.up2 = model.fpn.fpn1.conv_transpose2, model.fpn.fpn2
    pyramid = FeaturePyramid(B, "float64").apply(
        oracle.flax_variables(ours, oracle.PYRAMID), maps((4, 4)), False
    )
    for a, b in zip(pyramid, levels, strict=True):
        np.testing.assert_allclose(a, nhwc(b), atol=1e-8)
    decode, head = model.decode_head, torch.nn.Module()
    head.pool = torch.nn.ModuleList(conv(block.conv) for block in decode.psp_modules.blocks)
    head.lateral = torch.nn.ModuleList(map(conv, decode.lateral_convs))
    head.level = torch.nn.ModuleList(map(conv, decode.fpn_convs))
    head.bottleneck, head.fusion = conv(decode.psp_bottleneck), conv(decode.fpn_bottleneck)
    head.classes = decode.classifier
    variables = oracle.flax_variables(head, oracle.upernet_names())
    logits = UPerNet(CLASSES, WIDTH, B, dtype="float64").apply(variables, pyramid, False)
    np.testing.assert_allclose(logits, nhwc(decode(levels)), atol=1e-8)
    head.conv, head.classes = conv(model.auxiliary_head.convs[0]), model.auxiliary_head.classifier
    variables = oracle.flax_variables(head, oracle.FCN_NAMES)
    logits = FCN(CLASSES, CHANNELS, B, dtype="float64").apply(variables, pyramid[2], False)
    np.testing.assert_allclose(logits, nhwc(model.auxiliary_head(levels)), atol=1e-8)


def test_upernet_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    config = transformers.UperNetConfig(
        backbone_config=transformers.BeitConfig(), hidden_size=CHANNELS, num_labels=CLASSES
    )
    decode = oracle.randomize(UperNetHead(config, [WIDTH] * 4)).eval()

    def conv(layer):
        return torch.nn.Sequential(layer.conv, layer.batch_norm, torch.nn.ReLU())

    head = torch.nn.Module()
    head.pool = torch.nn.ModuleList(conv(block.layers[1]) for block in decode.psp_modules.blocks)
    head.lateral = torch.nn.ModuleList(map(conv, decode.lateral_convs))
    head.level = torch.nn.ModuleList(map(conv, decode.fpn_convs))
    head.bottleneck, head.fusion = conv(decode.bottleneck), conv(decode.fpn_bottleneck)
    head.classes = decode.classifier
    levels = oracle.Pyramid(WIDTH).double().eval()([nchw(x) for x in maps()])
    variables = oracle.flax_variables(head, oracle.upernet_names())
    ours = UPerNet(CLASSES, CHANNELS, B, dtype="float64").apply(
        variables, [nhwc(x) for x in levels], False
    )
    np.testing.assert_allclose(ours, nhwc(decode(levels)), atol=1e-8)
