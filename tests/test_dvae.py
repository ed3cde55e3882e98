"""The dVAE: against PyTorch modules written here, and against the papers' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import UserError
from mim_jax.convert import from_torch, to_torch
from mim_jax.models.dvae import dvae

TINY = dict(vocabulary=11, width=8, layers=2)


def sizes(tree) -> dict[str, tuple[int, int]]:
    """Of each part the parameters and the arrays."""
    leaves = {part: jax.tree.leaves(arrays) for part, arrays in tree.items()}
    return {part: (sum(x.size for x in xs), len(xs)) for part, xs in leaves.items()}


def test_parameter_counts_equal_the_originals():
    images = jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
    original = jax.eval_shape(dvae().init, jax.random.key(0), images)
    assert sizes(original) == {"tokenizer": (53_786_240, 74), "decoder": (43_829_766, 76)}
    small = jax.eval_shape(dvae(kind="small", likelihood="mse").init, jax.random.key(0), images)
    assert sum(count for count, _ in sizes(small).values()) == 20_081_411


def torch_modules(torch):
    """OpenAI's and BEiT's networks, from their descriptions, with their names."""
    nn = torch.nn

    class Conv(nn.Module):
        def __init__(self, i, o, k):
            super().__init__()
            self.w = nn.Parameter(torch.empty(o, i, k, k).normal_(std=(i * k * k) ** -0.5))
            self.b = nn.Parameter(torch.empty(o).normal_())

        def forward(self, x):
            return nn.functional.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)

    class Block(nn.Module):
        def __init__(self, i, o, sides, gain):
            super().__init__()
            self.gain = gain
            self.id_path = Conv(i, o, 1) if i != o else nn.Identity()
            layers, widths = {}, [i, o // 4, o // 4, o // 4, o]
            for j, side in enumerate(sides):
                layers[f"relu_{j + 1}"] = nn.ReLU()
                layers[f"conv_{j + 1}"] = Conv(widths[j], widths[j + 1], side)
            self.res_path = nn.Sequential()
            for name, layer in layers.items():
                self.res_path.add_module(name, layer)

        def forward(self, x):
            return self.id_path(x) + self.gain * self.res_path(x)

    def dalle(i, o, first, widths, sides, between):
        blocks = nn.Sequential()
        blocks.add_module("input", first)
        d, gain = i, 1 / (2 * len(widths)) ** 2
        for g, width in enumerate(widths):
            group = nn.Sequential()
            for j in range(2):
                group.add_module(f"block_{j + 1}", Block(d, width, sides, gain))
                d = width
            if g < len(widths) - 1:
                group.add_module("between", between)
            blocks.add_module(f"group_{g + 1}", group)
        output = nn.Sequential()
        output.add_module("relu", nn.ReLU())
        output.add_module("conv", Conv(d, o, 1))
        blocks.add_module("output", output)
        return nn.ModuleDict({"blocks": blocks}).double()

    def residual(d):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(
                    nn.Conv2d(d, d, 3, padding=1), nn.ReLU(),
                    nn.Conv2d(d, d, 3, padding=1), nn.ReLU(), nn.Conv2d(d, d, 1),
                )  # fmt: skip

            def forward(self, x):
                return x + self.net(x)

        return Residual()

    def small(i, d, layers, o, conv):
        modules = []
        for _ in range(layers):
            modules += [nn.Sequential(conv(i, d, 4, 2, 1), nn.ReLU()), residual(d)]
            i = d
        return nn.Sequential(*modules, nn.Conv2d(d, o, 1)).double()

    width, vocabulary = TINY["width"], TINY["vocabulary"]
    up = nn.Upsample(scale_factor=2, mode="nearest")
    widths = [width, 2 * width, 4 * width]
    return {
        "dalle": (
            dalle(width, vocabulary, Conv(3, width, 7), widths, (3, 3, 3, 1), nn.MaxPool2d(2)),
            dalle(128, 6, Conv(vocabulary, 128, 1), widths[::-1], (1, 3, 3, 3), up),
        ),
        "small": (
            small(3, width, 2, vocabulary, nn.Conv2d),
            small(512, width, 2, 3, nn.ConvTranspose2d),
        ),
    }


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)


@pytest.mark.parametrize("kind", ["dalle", "small"])
def test_encoder_and_decoder_against_torch(kind):
    """The same weights give the same logits, tokens and pixels, in float64 to 1e-8."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    encoder, decoder = torch_modules(torch)[kind]
    states = [
        {k: v.detach().numpy() for k, v in m.state_dict().items()} for m in (encoder, decoder)
    ]
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 16, 24, 3))
    codes = rng.dirichlet(np.ones(TINY["vocabulary"]), size=(2, 4, 6))
    codebook = np.eye(11) if kind == "dalle" else rng.normal(size=(11, 512))

    def channels_first(x):
        return torch.tensor(x).permute(0, 3, 1, 2)

    def run(module, x):
        module = module["blocks"] if kind == "dalle" else module
        return module(channels_first(x)).permute(0, 2, 3, 1).detach().numpy()

    with jax.enable_x64(True):
        if kind == "dalle":
            model = dvae(**TINY, dtype="float64")
            params = from_torch(states[0])[0] | from_torch(states[1])[0]
            for state, part in zip(states, ("tokenizer", "decoder"), strict=True):
                assert_identical(to_torch({part: params[part]}, layout="beit"), state)
            theirs = run(encoder, 0.8 * images + 0.1)
        else:
            model = dvae(**TINY, kind="small", likelihood="mse", dtype="float64")
            state = {f"encoder.{k}": v for k, v in states[0].items()} | {
                f"decoder.{k}": v for k, v in states[1].items()
            }
            state["codebook.weight"] = codebook
            params, _ = from_torch(state)
            assert_identical(to_torch(params, layout="beit"), state)
            theirs = run(encoder, 2 * images - 1)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(images.shape))
        assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
        logits = model.logits(params["tokenizer"], images)
        tokens = model.tokens(params["tokenizer"], images)
        ours = model.paint(params["decoder"], codes)
        decoded = model.decode(params["decoder"], tokens, (4, 6))
    painted = run(decoder, codes @ codebook)
    again = run(decoder, codebook[theirs.argmax(-1)])
    for x, y in [(logits, theirs), (ours, painted)]:
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-8 * np.abs(y).max())
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, theirs.argmax(-1).reshape(2, 24))
    again = (1 / (1 + np.exp(-again[..., :3])) - 0.1) / 0.8 if kind == "dalle" else (again + 1) / 2
    np.testing.assert_allclose(decoded, again.clip(0, 1), atol=1e-8)


def test_tokens_are_decided_in_float32():
    """Two logits apart by less than bfloat16 tells: the network is bfloat16, its last layer not."""
    model = dvae(vocabulary=2, width=4, layers=1, dtype="bfloat16")
    images = jnp.ones((1, 2, 2, 3))
    tokenizer = model.init(jax.random.key(0), images)["tokenizer"]
    tokenizer["output"] = dict(
        kernel=jnp.zeros_like(tokenizer["output"]["kernel"]), bias=jnp.array([100.0, 100.0001])
    )
    assert model.logits(tokenizer, images).dtype == jnp.float32
    assert model.tokens(tokenizer, images) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(width=6), "multiple of 4"),
        (dict(layers=4), "a token of 16 x 16 pixels with 3 channels: images of 8 x 8 x 3"),
        (dict(channels=1, layers=1), "2 x 2 pixels with 1 channels: images of 8 x 8 x 3"),
    ],
)
def test_invalid_requests(settings, sentence):
    with pytest.raises(UserError) as error:
        dvae(**(TINY | settings)).logits({}, jnp.zeros((1, 8, 8, 3)))
    assert sentence in str(error.value)


def test_pixels_are_mapped_as_in_the_originals():
    """0, 0.5 and 1 become 0.1, 0.5 and 0.9 for DALL-E, and -1, 0 and 1 for BEiT's own tokenizer."""
    pixels = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(dvae().map_pixels(pixels), [0.1, 0.5, 0.9], atol=1e-7)
    assert dvae(likelihood="mse").map_pixels(pixels).tolist() == [-1, 0, 1]


def test_branches_of_dalle_have_a_gain_of_a_64th():
    """A network of DALL-E's depth, in which only the bias of one branch's last layer is not 0."""
    model = dvae(width=4, vocabulary=4, codebook=2)
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), images))["tokenizer"]
    params["group_4_block_2"]["conv_4"]["bias"] = jnp.ones(32)
    params["output"]["kernel"] = jnp.full((1, 1, 32, 4), 1 / 32)
    np.testing.assert_allclose(model.logits(params, images), 1 / 64, rtol=1e-6)
