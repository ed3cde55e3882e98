"""BEiT against the reference's golden numbers and Hugging Face, and its switches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import UserError
from mim_jax.models.dvae import dvae
from mim_jax.models.patches import relative_index
from mim_jax.models.transformer import drop_paths
from mim_jax.models.vit import vit
from mim_jax.objectives import beit, mae
from tests.official import golden_state, our_value

MODEL = dict(width=32, depth=2, heads=4, patch=8, key_bias=False, initializer="beit")
SHARED = dict(positions="none", relative_bias="shared", layer_scale=0.1)
ABSOLUTE = dict(positions="learned")
TOKENIZER = dict(kind="small", vocabulary=64, width=8, layers=3, codebook=8)
RNG = jax.random.key(0)
PLACES = {
    "patch_embed.proj": "encoder/embed",
    "norm": "encoder/norm",
    "lm_head": "head",
    "cls_token": "encoder/cls_token",
    "mask_token": "encoder/mask_token",
    "pos_embed": "encoder/positions",
    "rel_pos_bias.relative_position_bias_table": "encoder/relative_position_bias/table",
}


def shapes(*, grid=(4, 4), patch=(8, 8), channels=3, width=32, depth=2, heads=4, shared=True):
    """The trainable tensors of the official BEiT, with a vocabulary of 64."""
    d, (rows, columns) = width, grid
    tensor_shapes = {"cls_token": (1, 1, d), "mask_token": (1, 1, d)}
    tensor_shapes |= {
        "patch_embed.proj.weight": (d, channels, *patch),
        "patch_embed.proj.bias": (d,),
    }
    if shared:
        table = ((2 * rows - 1) * (2 * columns - 1) + 3, heads)
        tensor_shapes["rel_pos_bias.relative_position_bias_table"] = table
    else:
        tensor_shapes["pos_embed"] = (1, 1 + rows * columns, d)
    for i in range(depth):
        block = {"attn.q_bias": (d,), "attn.v_bias": (d,), "attn.qkv.weight": (3 * d, d)}
        block |= {"attn.proj.weight": (d, d), "attn.proj.bias": (d,)}
        block |= {"mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,)}
        block |= {"mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,)}
        block |= {f"norm{k}.{leaf}": (d,) for k in (1, 2) for leaf in ("weight", "bias")}
        block |= {"gamma_1": (d,), "gamma_2": (d,)} if shared else {}
        tensor_shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    tensor_shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    return tensor_shapes | {"lm_head.weight": (64, d), "lm_head.bias": (64,)}


def our_name(name: str) -> str:
    if name in PLACES:
        return PLACES[name]
    module, _, leaf = name.rpartition(".")
    leaf = {"weight": "scale" if "norm" in module else "kernel"}.get(leaf, leaf)
    if module.startswith("blocks."):
        _, index, *rest = module.split(".")
        inner = "" if leaf in ("q_bias", "v_bias") or not rest else f"{rest[-1]}/"
        return f"encoder/block_{index}/{inner}{leaf}"
    return f"{PLACES[module]}/{leaf}"


def to_params(state: dict) -> dict:
    params = {}
    for name, value in state.items():
        *folders, leaf = our_name(name).split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.asarray(value) if "table" in name else our_value(np.asarray(value))
    return params


def golden_inputs():
    """-> images (2, 32, 32, 3), masked (2, 16), tokens (13,)."""
    b, c, y, x = np.ogrid[:2, :3, :32, :32]
    images = np.sin(0.3 * b + 0.7 * c + 0.11 * y + 0.23 * x).transpose(0, 2, 3, 1)
    place = np.arange(16)
    masked = np.stack([(5 * place) % 16 < 6, (3 * place + 1) % 16 < 7])
    tokens = (7 * np.arange(32).reshape(2, 16)) % 64
    return jnp.array(images), jnp.array(masked), jnp.array(tokens)


def given(monkeypatch, masked, tokens):
    """Exchanges what is drawn and what the tokenizer says for what is given."""
    monkeypatch.setattr(beit, "sample", lambda *_, **__: masked)

    original = beit.targets.make

    def make(*args, **kwargs):
        target = original(*args, **kwargs)
        return target._replace(compute=lambda *_: tokens[..., None], init=lambda *_: {})

    monkeypatch.setattr(beit.targets, "make", make)


def objective_for(images, **settings):
    model = MODEL | settings.pop("model")
    settings = dict(num_masked=7, mean=(0.0,), std=(1.0,)) | settings
    return beit.objective(vit(**model), dvae(**TOKENIZER), **settings), {
        "image": images,
        "index": jnp.arange(len(images)),
    }


@pytest.mark.parametrize(
    ("options", "parameters", "loss", "first", "last"),
    [
        (
            SHARED,
            34_096,
            4.4787622188,
            [0.060348773, -0.822928473, -1.30951775, -1.164024488],
            [-0.694967453, -1.255706501, -1.201282417, -0.569415195],
        ),
        (
            ABSOLUTE,
            34_304,
            4.1106883869,
            [-0.037481679, -0.250030654, -0.299606737, -0.165041551],
            None,
        ),
    ],
    ids=["shared", "absolute"],
)
def test_golden_logits_and_loss(monkeypatch, options, parameters, loss, first, last):
    with jax.enable_x64(True):
        images, masked, tokens = golden_inputs()
        given(monkeypatch, masked, tokens)
        state = golden_state(shapes(shared="relative_bias" in options))
        params = jax.tree.map(jnp.array, to_params(state))
        assert sum(x.size for x in jax.tree.leaves(params)) == parameters
        objective, batch = objective_for(images, model=options | dict(dtype="float64"))
        ours = jax.eval_shape(objective.init, RNG, batch)[0]
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)
        network = beit.BEiT(vit(**MODEL, **options, dtype="float64"), 64)
        every = jnp.arange(16)[None].repeat(2, 0)
        logits = network.apply({"params": params}, images, masked, every)
        np.testing.assert_allclose(logits[0, 0, :4], first, atol=1e-8)
        if last:
            np.testing.assert_allclose(logits[1, 15, :4], last, atol=1e-8)
        total, weight, (metrics, _) = objective.loss(params, {}, batch, RNG, 0)
        assert weight == 13
        np.testing.assert_allclose(total / weight, loss, atol=1e-9)
        hit = (logits.argmax(-1) == tokens)[masked]
        np.testing.assert_allclose(metrics["accuracy"], hit.mean())
        means = jax.tree.map(lambda x: x.mean(0), objective.evaluate(params, {}, batch, RNG))
        np.testing.assert_allclose(objective.summarize(means)["loss"], loss, atol=1e-9)


def hf_state(state: dict) -> dict:
    """Official weights under the names of transformers 5, whose queries, keys, values are three."""
    names = {
        "cls_token": "beit.embeddings.cls_token",
        "mask_token": "beit.embeddings.mask_token",
        "pos_embed": "beit.embeddings.position_embeddings",
        "rel_pos_bias.relative_position_bias_table": (
            "beit.shared_position_bias.relative_position_bias_table"
        ),
        "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "lm_head": "lm_head",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "gamma_1": "lambda_1",
        "gamma_2": "lambda_2",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
    }
    theirs = {}
    for name, value in state.items():
        block, inner = "", name
        if name.startswith("blocks."):
            _, index, inner = name.split(".", 2)
            block = f"beit.layers.{index}."
        if inner == "attn.qkv.weight":
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                theirs[f"{block}attention.{part}_proj.weight"] = piece
            continue
        module, _, leaf = inner.rpartition(".")
        place = names[inner] if inner in names else f"{names[module]}.{leaf}"
        theirs[block + place] = value
    return theirs


@pytest.mark.parametrize("options", [SHARED, ABSOLUTE], ids=["shared", "absolute"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_hugging_face(monkeypatch, options, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    shared = "relative_bias" in options
    rng = np.random.default_rng(1)
    sizes = shapes(shared=shared)
    state = {name: 0.3 * rng.normal(size=shape) for name, shape in sizes.items()}
    images = rng.normal(size=(3, 32, 32, 3))
    masked = rng.random((3, 16)) < 0.4
    tokens = rng.integers(64, size=(3, 16))
    config = transformers.BeitConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, image_size=32, patch_size=8, layer_norm_eps=1e-6,
        use_mask_token=True, use_absolute_position_embeddings=not shared,
        use_shared_relative_position_bias=shared, use_relative_position_bias=False,
        layer_scale_init_value=0.1 if shared else 0.0, use_mean_pooling=True,
    )  # fmt: skip
    weights = {k: torch.tensor(v).requires_grad_() for k, v in state.items()}
    model = transformers.BeitForMaskedImageModeling(config).double().eval()
    strangers = set(hf_state(weights)) ^ {k for k, _ in model.named_parameters()}
    assert not strangers
    logits = torch.func.functional_call(
        model,
        hf_state(weights),
        torch.tensor(images).permute(0, 3, 1, 2),
        {"bool_masked_pos": torch.tensor(masked)},
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits[torch.tensor(masked)], torch.tensor(tokens)[torch.tensor(masked)]
    )
    loss.backward()
    expected = to_params({name: w.grad.numpy() for name, w in weights.items()})

    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), to_params(state))
        given(monkeypatch, jnp.array(masked), jnp.array(tokens))
        objective, batch = objective_for(
            jnp.asarray(images, dtype), model=options | dict(dtype=dtype), num_masked=12
        )

        def mean_loss(params):
            total, weight, _ = objective.loss(params, {}, batch, RNG, 0)
            return total / weight

        ours, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    tolerance = 1e-8 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(ours, loss.item(), rtol=tolerance)
    for path, value in jax.tree.leaves_with_path(expected):
        mine = gradient
        for key in path:
            mine = mine[key.key]
        scale = np.abs(value).max()
        np.testing.assert_allclose(mine, value, atol=tolerance * scale, rtol=0, err_msg=str(path))


# --- The encoder's options. ---


def test_relative_index_equals_the_reference():
    square = relative_index((14, 14))
    assert square.max() + 1 == 732
    assert square.sum() == 14_270_119
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (1, 15), (15, 1), (1, 196), (196, 1)]
    assert [square[p] for p in places] == [731, 729, 730, 364, 363, 365, 337, 391, 0, 728]
    assert relative_index((2, 2)).tolist() == [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]
    oblong = relative_index((2, 3))
    assert oblong[1].tolist() == [16, 7, 6, 5, 2, 1, 0]
    assert oblong[6].tolist() == [16, 14, 13, 12, 9, 8, 7]
    assert oblong[0, :2].tolist() == [17, 15]


@pytest.mark.parametrize(
    ("size", "options", "count"),
    [
        ("B", dict(positions="none", relative_bias="shared", layer_scale=0.1), 91_965_776),
        ("L", dict(positions="none", relative_bias="shared", layer_scale=0.1), 311_534_016),
        ("B", dict(positions="learned"), 92_089_856),
    ],
)
def test_parameter_counts_equal_the_reference(size, options, count):
    model = dict(size=size, key_bias=False, initializer="beit") | options
    objective = beit.objective(vit(**model), dvae(vocabulary=8192))
    batch = {"image": np.zeros((1, 224, 224, 3), np.uint8), "index": np.zeros(1, np.int32)}
    batch["tokenizer_image"] = np.zeros((1, 112, 112, 3), np.uint8)
    params, buffers = jax.eval_shape(objective.init, RNG, batch)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(buffers["tokenizer"])) == 53_786_240


@pytest.mark.parametrize(("initializer", "std"), [("beit", 0.0108), ("beit_finetune", 0.02)])
def test_initialization_scales_the_ends_of_branches_down_by_depth(initializer, std):
    encoder = vit(width=192, depth=3, heads=3, patch=8, key_bias=False, initializer=initializer)
    params = encoder.init(RNG, jnp.zeros((1, 32, 32, 3)))["params"]
    for i in range(3):
        block = params[f"block_{i}"]
        np.testing.assert_allclose(block["qkv"]["kernel"].std(), std, rtol=0.02)
        for name in ("proj", "fc2"):
            deviation = std / math.sqrt(2 * (i + 1))
            np.testing.assert_allclose(block[name]["kernel"].std(), deviation, rtol=0.02)
    truncated = jnp.abs(params["embed"]["kernel"]).max() <= 0.02
    assert truncated == (initializer == "beit")
    assert not params["embed"]["bias"].any()
    assert not params["block_0"]["q_bias"].any()


def test_there_is_no_key_bias_and_every_parameter_has_a_gradient():
    options = SHARED | dict(layer_scale=0.5)
    images = jax.random.normal(RNG, (4, 32, 32, 3))
    objective, batch = objective_for(images, model=options, target="pixels", min_block=2)
    params, _ = objective.init(RNG, batch)
    assert "bias" not in params["encoder"]["block_0"]["qkv"]
    gradient = jax.grad(lambda p: objective.loss(p, {}, batch, RNG, 0)[0])(params)
    for path, value in jax.tree.leaves_with_path(gradient):
        assert jnp.abs(value).max() > 0, jax.tree_util.keystr(path)


def test_hidden_pixels_do_not_reach_the_encoder():
    images = jax.random.normal(RNG, (2, 32, 32, 3))
    masked = jax.random.bernoulli(RNG, 0.4, (2, 16))
    for options in (SHARED, ABSOLUTE):
        encoder = vit(**MODEL, **options)
        params = encoder.init(RNG, images, masked=masked)
        gradient = jax.grad(lambda x: (encoder.apply(params, x, masked=masked) ** 2).sum())(images)  # noqa: B023
        reach = jnp.abs(gradient).reshape(2, 4, 8, 4, 8, 3).sum((2, 4, 5)).reshape(2, 16) > 0
        np.testing.assert_array_equal(reach, ~masked)


def test_drop_path_grows_with_depth_and_depends_only_on_the_image():
    keys = jax.random.split(RNG, 20_000)
    factors = drop_paths(keys, 0.3, 4)
    assert factors.shape == (4, 2, 20_000)
    np.testing.assert_allclose((factors > 0).mean((1, 2)), 1 - np.linspace(0, 0.3, 4), atol=0.006)
    np.testing.assert_allclose(factors.mean((1, 2)), 1, atol=0.01)  # kept ones make up for the rest
    np.testing.assert_array_equal(drop_paths(keys[5:6], 0.3, 4)[..., 0], factors[..., 5])
    both = factors[3] > 0
    np.testing.assert_allclose((both[0] & both[1]).mean(), 0.49, atol=0.012)  # each for itself


def test_drop_path_is_off_in_evaluation():
    encoder = vit(**MODEL, drop_path=0.9)
    images = jax.random.normal(RNG, (2, 32, 32, 3))
    params = encoder.init(RNG, images)
    still = vit(**MODEL).apply(params, images)
    np.testing.assert_array_equal(encoder.apply(params, images), still)
    assert (encoder.apply(params, images, drop_keys=jax.random.split(RNG, 2)) != still).any()


def test_layers_are_outputs_of_blocks_without_the_norm():
    encoder = vit(**MODEL, **ABSOLUTE)
    images = jax.random.normal(RNG, (2, 32, 32, 3))
    params = encoder.init(RNG, images, layers=(0, 1))["params"]
    assert "norm" not in params
    first, second = encoder.apply({"params": params}, images, layers=(0, 1))
    (alone,) = encoder.apply({"params": params}, images, layers=(0,))
    np.testing.assert_array_equal(first, alone)
    whole = encoder.init(RNG, images)["params"] | params
    x = second - second.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(encoder.apply({"params": whole}, images), x, atol=1e-5)


# --- What else its paper tries. ---


def one_batch(size=4):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    return {"image": images, "tokenizer_image": images, "index": np.arange(size)}


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (dict(), 7),
        (dict(sampling="random"), 7),
        (dict(sampling="random", mask_unit=2, num_masked=8), 8),
        (dict(sampling="span"), 7),
        (dict(sampling="grid", num_masked=12), 12),
        (dict(corruption=(0.8, 0.1, 0.1)), 7),
        (dict(recover="all"), 16),
        (dict(recover="all", sampling="none"), 16),
        (dict(target="pixels", error="absolute"), 7),
        (dict(target="normalized_pixels", error="huber"), 7),
    ],
)
def test_every_switch_trains_and_draws(settings, asked):
    settings = dict(num_masked=7, min_block=2) | settings
    objective = beit.objective(vit(**MODEL | ABSOLUTE), dvae(**TOKENIZER), **settings)
    batch = one_batch()
    params, buffers = jax.jit(objective.init)(RNG, batch)
    total, weight, _ = jax.jit(objective.loss)(params, buffers, batch, RNG, 0)
    assert 0 < weight <= 4 * asked
    assert jnp.isfinite(total)
    if settings.get("sampling", "blockwise") != "blockwise":
        assert weight == 4 * asked
    pictures = jax.jit(objective.pictures)(params, buffers, batch, RNG)
    assert (*pictures,)[0] == "masked"
    assert (*pictures,)[-1] == "original"
    for image in pictures.values():
        assert image.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(pictures["original"], batch["image"] / 255, atol=1e-5)


@pytest.mark.parametrize("mask_tokens", ["encoder", "decoder"])
@pytest.mark.parametrize("target", ["tokens", "pixels"])
def test_mae_s_ablations(target, mask_tokens):
    model = dict(width=32, depth=1, heads=2, patch=8)
    decoder = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
    settings = dict(target=target, mask_tokens=mask_tokens, sampling="blockwise")
    objective = mae.objective(vit(**model), dvae(**TOKENIZER), **decoder, **settings)
    batch = one_batch()
    params, buffers = objective.init(RNG, batch)
    gradient = jax.grad(lambda p: objective.loss(p, buffers, batch, RNG, 0)[0])(params)
    for path, value in jax.tree.leaves_with_path(gradient):
        assert jnp.abs(value).max() > 0, jax.tree_util.keystr(path)
    assert objective.needs == (("tokenizer",) if target == "tokens" else ())


def test_tokens_are_those_of_the_frozen_tokenizer_on_its_own_view():
    objective = beit.objective(
        vit(**MODEL | ABSOLUTE), dvae(**TOKENIZER), num_masked=7, min_block=2
    )
    batch = one_batch()
    params, buffers = objective.init(RNG, batch)
    draw = np.random.default_rng(0).normal  # a fresh one gives all images the same token
    buffers = jax.tree.map(lambda x: jnp.array(draw(size=x.shape), x.dtype), buffers)
    before, *_ = objective.loss(params, buffers, batch, RNG, 0)
    other = batch | {"tokenizer_image": 255 - batch["tokenizer_image"]}
    assert before != objective.loss(params, buffers, other, RNG, 0)[0]
    gradient = jax.grad(lambda b: objective.loss(params, b, batch, RNG, 0)[0])(buffers)
    assert not any(x.any() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(num_masked=0), "objective.num_masked = 0 of 4 x 4 patches"),
        (dict(num_masked=16), "objective.num_masked = 16 of 4 x 4 patches"),
        (dict(sampling="none"), 'needs objective.recover = "all"'),
        (dict(sampling="grid"), "objective.sampling = 'grid' hides 12 of 4 x 4 patches, not 7"),
        (dict(sampling="random", mask_unit=3), "objective.mask_unit = 3 does not divide"),
        (dict(corruption=(0.8, 0.1, 0.2)), "must be three shares with a sum of 1"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(settings, sentence):
    def begin():
        objective = beit.objective(
            vit(**MODEL | ABSOLUTE), dvae(**TOKENIZER), **dict(num_masked=7) | settings
        )
        jax.eval_shape(objective.init, RNG, one_batch())

    with pytest.raises(UserError, match=sentence):
        begin()


def test_views_that_do_not_fit_are_reported():
    objective = beit.objective(vit(**MODEL | ABSOLUTE), dvae(**TOKENIZER), num_masked=7)
    batch = one_batch()
    small = batch | {"tokenizer_image": batch["tokenizer_image"][:, :16, :16]}
    with pytest.raises(UserError, match="computes 4 tokens, but there are 16 patches"):
        jax.eval_shape(objective.init, RNG, small)
    del batch["tokenizer_image"]
    with pytest.raises(UserError, match=r"need data\.tokenizer_size"):
        jax.eval_shape(objective.init, RNG, batch)
