"""Attention maps, against those of Hugging Face and against ones written out in NumPy."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError, attend
from mim_jax.models.vit import ViT

ROWS, COLUMNS, PATCH = 4, 4, 8
SHAPE = dict(width=32, depth=3, heads=4)
# Hugging Face's model, and its settings.
MODELS = {
    "vit": ("ViT", {}),
    "mae": ("ViTMAE", dict(mask_ratio=0.0)),
    "beit_absolute": ("Beit", dict(use_absolute_position_embeddings=True)),
    "beit_own": ("Beit", dict(use_relative_position_bias=True)),
    "beit_shared": ("Beit", dict(use_shared_relative_position_bias=True)),
    "beit_shared_absolute": (
        "Beit",
        dict(use_absolute_position_embeddings=True, use_shared_relative_position_bias=True),
    ),
}


def hugging_face(name: str):
    """Returns a model of transformers with random weights, in float64."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        image_size=ROWS * PATCH,
        patch_size=PATCH,
        hidden_size=SHAPE["width"],
        num_hidden_layers=SHAPE["depth"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=4 * SHAPE["width"],
        layer_norm_eps=1e-6,
        attn_implementation="eager",
        **settings,
    )
    model = getattr(transformers, f"{family}Model")(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return torch, model


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_that_of_transformers(name, monkeypatch):
    from mim_jax.convert.states import from_torch

    torch, model = hugging_face(name)
    # Their softmax is in float32 even for float64: this one is exact.
    exact = lambda x, dim, dtype=None: x.softmax(dim)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "softmax", exact)
    params, network = from_torch(model.state_dict(), heads=SHAPE["heads"])
    images = np.random.default_rng(1).normal(size=(2, ROWS * PATCH, COLUMNS * PATCH, 3))
    # MAE shuffles patches by their noise: increasing noise leaves them in place.
    noise = torch.arange(ROWS * COLUMNS, dtype=torch.float64).expand(2, -1)
    options = dict(noise=noise) if name == "mae" else {}
    with torch.no_grad():
        output = model(torch.tensor(images).permute(0, 3, 1, 2), output_attentions=True, **options)
    with jax.enable_x64(True):
        encoder = network.encoder.clone(dtype="float64")
        for layer, theirs in enumerate(output.attentions):
            ours = attend.attention_maps(encoder, params["encoder"], images, layer)
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-8)
            np.testing.assert_allclose(ours.sum(-1), 1, rtol=0, atol=1e-12)
        last = attend.attention_maps(encoder, params["encoder"], images)
        np.testing.assert_array_equal(last, ours)


@pytest.mark.parametrize("relative_bias", ["none", "shared", "own"])
def test_attention_written_out(relative_bias):
    """For grids that are not square, patches that are not square, and rematerialized blocks."""
    encoder = ViT(
        (4, 8), **SHAPE, relative_bias=relative_bias, key_bias=False, remat="full", dtype="float32"
    )
    images = np.random.default_rng(0).normal(size=(2, 12, 16, 2)).astype(np.float32)
    params = encoder.init(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(1)
    params = unflatten_dict(
        {k: 0.3 * rng.normal(size=x.shape) for k, x in flatten_dict(params).items()}
    )
    (tokens,) = encoder.apply({"params": params}, images, layers=(1,))
    block, tokens = params["block_2"], np.asarray(tokens, np.float64)
    x = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    x = x * block["norm1"]["scale"] + block["norm1"]["bias"]
    q, k, _ = np.split(x @ block["qkv"]["kernel"], 3, axis=-1)
    q += block["q_bias"]
    logits = np.einsum(
        "bmhd,bnhd->bhmn", q.reshape(2, 7, 4, 8), k.reshape(2, 7, 4, 8), optimize=True
    )
    logits /= np.sqrt(8)
    owner = {"none": None, "shared": params, "own": block}[relative_bias]
    if owner:
        table = owner["relative_position_bias"]["table"]
        places = [None, *((r, c) for r in range(3) for c in range(2))]
        for i, a in enumerate(places):
            for j, b in enumerate(places):
                row = {(True, True): 17, (True, False): 15, (False, True): 16}.get(
                    (a is None, b is None)
                )
                if row is None:
                    row = (a[0] - b[0] + 2) * 3 + a[1] - b[1] + 1
                logits[:, :, i, j] += table[row]
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    ours = attend.attention_maps(encoder, params, images)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_layers_that_do_not_exist():
    encoder = ViT((4, 4), **SHAPE)
    for layer in (3, -4):
        with pytest.raises(UserError, match=f"no layer {layer}: the encoder has 3 blocks"):
            attend.attention_maps(encoder, {}, np.zeros((1, 8, 8, 3)), layer)


def test_rows_by_query():
    maps = np.arange(2 * 3 * 7 * 7).reshape(2, 3, 7, 7)
    np.testing.assert_array_equal(
        attend.rows_of(maps, (2, 3)), maps[:, :, 0, 1:].reshape(2, 3, 2, 3)
    )
    row = attend.rows_of(maps, (2, 3), (1, 2))
    assert row[1, 2, 0, 1] == maps[1, 2, 6, 2]
    for query in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(UserError, match="outside the grid of 2 x 3"):
            attend.rows_of(maps, (2, 3), query)


def test_heat_is_brighter_where_there_is_more():
    values = np.arange(6.0).reshape(1, 2, 3)
    colors = attend.heat(values, (4, 7))
    assert colors.shape == (1, 4, 7, 3)
    brightness = colors.sum(-1)[0]
    assert (np.diff(brightness[0]) >= 0).all()
    assert brightness[3, 0] > brightness[0, -1]
    np.testing.assert_allclose(colors[0, -1, -1], [252 / 255, 253 / 255, 191 / 255])
    np.testing.assert_array_equal(attend.heat(7 * values, (4, 7)), colors)
    assert np.isfinite(attend.heat(0 * values, (4, 7))).all()


def test_a_query_is_marked():
    images = np.zeros((1, 16, 16, 3))
    drawn = attend.marked(images, (1, 3), (4, 4))
    changed = drawn.any(-1)[0]
    assert changed[3, 11:16].all()
    assert not changed[4:8, 12:15].any()
    assert not images.any()
