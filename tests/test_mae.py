"""MAE against the reference's golden numbers, and the traps that the reference sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import UserError
from mim_jax.masking import hide, mask_by_noise
from mim_jax.models.decoder import Decoder
from mim_jax.models.patches import patchify, sincos2d, unpatchify
from mim_jax.models.transformer import Block
from mim_jax.models.vit import SIZES, vit
from mim_jax.normalize import denormalize, normalize
from mim_jax.objectives import mae, per_example
from mim_jax.targets import statistics
from tests.official import golden_state, mae_shapes, to_params

MODEL = dict(width=32, depth=2, heads=4, patch=8)
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
RNG = jax.random.key(0)


def tiny(model=None, **settings):
    """An objective for images that are normalised already."""
    settings = dict(**DECODER, mean=(0.0,), std=(1.0,)) | settings
    return mae.objective(vit(**MODEL | (model or {})), **settings)


def batch_of(*shape, seed=0):
    images = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return {"image": jnp.array(images), "index": jnp.arange(shape[0])}


# --- The golden numbers: a tiny model whose weights, image and noise are sines. ---


@pytest.fixture
def golden():
    """-> params, images (2, 32, 32, 3), visible and hidden patches, all in float64."""
    shapes = mae_shapes(
        width=32, depth=2, decoder_width=16, decoder_depth=1, patch=(8, 8), channels=3
    )
    b, c, y, x = np.ogrid[:2, :3, :32, :32]
    images = np.sin(0.3 * b + 0.7 * c + 0.11 * y + 0.23 * x).transpose(0, 2, 3, 1)
    row, patch = np.ogrid[:2, :16]
    with jax.enable_x64(True):
        noise = jnp.array(((7 * patch + 3 * row) % 16) / 16)
        params = jax.tree.map(jnp.array, to_params(golden_state(shapes)))
        yield params, jnp.array(images), *mask_by_noise(noise, 0.75)


def network(dtype="float64"):
    encoder = vit(**MODEL, dtype=dtype)
    return mae.MAE(encoder, Decoder(*DECODER.values(), dtype=dtype, remat="none"))


def test_golden_parameters(golden):
    params, images, visible, hidden = golden
    assert sum(x.size for x in jax.tree.leaves(params)) == 38_800
    ours = jax.eval_shape(network().init, RNG, images, visible, hidden)["params"]
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)


def test_golden_mask(golden):
    _, _, visible, hidden = golden
    order = jnp.concatenate([visible, hidden], axis=1)
    assert jnp.argsort(order)[0].tolist() == [0, 7, 14, 5, 12, 3, 10, 1, 8, 15, 6, 13, 4, 11, 2, 9]
    assert sorted(visible[0].tolist()) == [0, 5, 7, 14]
    assert sorted(visible[1].tolist()) == [0, 2, 9, 11]


def test_golden_latent(golden):
    params, images, visible, _ = golden
    latent = vit(**MODEL, dtype="float64").apply(
        {"params": params["encoder"]}, images, visible=visible
    )
    first = [1.286933109, 0.346121894, -0.082589876, -0.346875778]
    last = [-1.204017937, 0.354557211, -1.003203607, 0.617795359]
    np.testing.assert_allclose(latent[0, 0, :4], first, atol=1e-9)
    np.testing.assert_allclose(latent[1, 4, :4], last, atol=1e-9)
    assert latent.sum() == pytest.approx(6.69092716687, abs=1e-10)


def test_golden_predictions(golden):
    params, images, visible, hidden = golden
    painted = network().apply({"params": params}, images, visible, hidden, 16)
    order = jnp.concatenate([visible, hidden], axis=1)
    painted = jnp.zeros_like(painted).at[jnp.arange(2)[:, None], order].set(painted)
    first = [0.168827709, 0.185257627, 0.177185418, 0.145815865]
    last = [0.394467933, 0.369378656, 0.295766813, 0.183387492]
    np.testing.assert_allclose(painted[0, 0, :4], first, atol=1e-9)
    np.testing.assert_allclose(painted[1, 15, :4], last, atol=1e-9)
    assert painted.sum() == pytest.approx(18.709387593029, abs=1e-9)


@pytest.mark.parametrize(
    ("target", "loss"), [("pixels", 0.5773126943), ("normalized_pixels", 1.0747624945)]
)
def test_golden_loss(golden, monkeypatch, target, loss):
    params, images, *mask = golden
    monkeypatch.setattr(mae, "hide", lambda *_: mask)
    objective = tiny(model=dict(dtype="float64"), target=target)
    batch = {"image": images, "index": jnp.arange(2)}
    total, weight, _ = objective.loss(params, {}, batch, RNG, 0)
    assert weight == 2 * 12  # the hidden patches
    assert total / weight == pytest.approx(loss, abs=1e-10)
    values = objective.evaluate(params, {}, batch, RNG)["loss"]
    assert values.mean() == pytest.approx(loss, abs=1e-10)


# --- Parameters and their initialisation. ---


@pytest.mark.parametrize(
    ("size", "patch", "encoder", "trainable"),
    [  # the encoder's count without its fixed positions, of (n + 1) x width
        ("B", 16, 85_798_656 - 197 * 768, 111_655_680),
        ("L", 16, 303_301_632 - 197 * 1024, 329_239_296),
        ("H", 14, 630_764_800 - 257 * 1280, 656_613_964),
    ],
)
def test_parameter_counts(size, patch, encoder, trainable):
    objective = mae.objective(vit(size=size, patch=patch))
    batch = {
        "image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8),
        "index": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    params, _ = jax.eval_shape(objective.init, RNG, batch)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    assert count(params["encoder"]) == encoder
    assert count(params) == trainable


def test_initialization():
    """Standard deviations of the reference's ViT-B (its init is xavier_uniform on every Linear)."""
    model = dict(size="B", patch=16, depth=1)
    objective = mae.objective(vit(**model), decoder_depth=1)
    params, _ = jax.jit(objective.init)(RNG, batch_of(1, 32, 32, 3))
    block = params["encoder"]["block_0"]
    expected = {
        0.02552: block["qkv"]["kernel"],  # fused: not 0.0361
        0.02282: block["fc1"]["kernel"],
        0.0361: params["encoder"]["embed"]["kernel"],  # as one matrix: not 0.00318
        0.0208: params["encoder"]["embed"]["bias"],  # torch's default: not zero
        0.0395: params["decoder"]["pred"]["kernel"],
        0.0313: params["decoder"]["block_0"]["qkv"]["kernel"],
        0.02: params["decoder"]["mask_token"],
    }
    for std, value in expected.items():
        assert value.std() == pytest.approx(std, rel=0.01 if value.size > 2000 else 0.1)
    assert not block["qkv"]["bias"].any()
    assert (block["norm1"]["scale"] == 1).all()


# --- Pieces. ---


def test_sincos_has_the_column_first():
    table = sincos2d((14, 14), 768)[0]
    places = [0, 1, 192, 193, 384, 385, 576, 577]
    column = [0.84147098, 0.81525065, 0.54030231, 0.57910826]
    np.testing.assert_allclose(table[1, places], [*column, 0, 0, 1, 1], atol=1e-8)
    np.testing.assert_allclose(table[14, places], [0, 0, 1, 1, *column], atol=1e-8)
    token_3_5 = [-0.95892427, -0.99857347, 0.28366219, 0.05339503]
    token_3_5 += [0.14112001, 0.27837998, -0.9899925, -0.96047102]
    np.testing.assert_allclose(table[3 * 14 + 5, places], token_3_5, atol=1e-8)
    for width, side, total in [
        (768, 14, 69594.493859),
        (512, 14, 46340.333103),
        (1280, 16, 149578.405753),
        (1024, 14, 92849.197918),
    ]:
        assert sincos2d((side, side), width).sum() == pytest.approx(total, abs=1e-6)


def test_sincos_of_a_wide_grid_is_part_of_a_square_one():
    wide = sincos2d((2, 5), 32).reshape(2, 5, 32)
    square = sincos2d((5, 5), 32).reshape(5, 5, 32)
    np.testing.assert_array_equal(wide, square[:2])


def test_patches_run_over_rows_columns_channels():
    image = np.arange(48).reshape(3, 4, 4).transpose(1, 2, 0)[None]
    first = patchify(image, (2, 2))[0, 0].tolist()
    assert first == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]


def test_unpatchify_inverts_patchify():
    images = batch_of(2, 12, 20, 5)["image"]
    assert (unpatchify(patchify(images, (4, 10)), (4, 10), 12) == images).all()


@pytest.mark.parametrize(
    ("n", "ratio", "visible"),
    [
        (196, 0.75, 49),
        (196, 0.9, 19),
        (196, 0.8, 39),
        (196, 0.4, 117),
        (100, 0.9, 9),
        (256, 0.75, 64),
    ],
)
def test_the_count_of_visible_patches_is_truncated(n, ratio, visible):
    seen, hidden = hide(jax.random.split(RNG, 2), (1, n), ratio)
    assert seen.shape == (2, visible)
    assert hidden.shape == (2, n - visible)


@pytest.mark.parametrize("ratio", [0.0, 0.99, 1.0])
def test_masking_all_or_no_patches_is_refused(ratio):
    with pytest.raises(UserError, match="at least one must be visible"):
        hide(jax.random.split(RNG, 2), (2, 5), ratio)


def test_masks_depend_only_on_the_example():
    """Each image has a mask of its own, which neither its neighbours nor its place decide."""
    keys = per_example(RNG, jnp.arange(8))
    visible, hidden = hide(keys, (4, 4), 0.75)
    assert len({tuple(row) for row in visible.tolist()}) == 8
    assert (jnp.sort(jnp.concatenate([visible, hidden], 1)) == jnp.arange(16)).all()
    alone, _ = hide(per_example(RNG, jnp.array([5])), (4, 4), 0.75)
    assert (alone[0] == visible[5]).all()
    share = jnp.zeros(16).at[hide(jax.random.split(RNG, 4000), (4, 4), 0.75)[1]].add(1 / 4000)
    np.testing.assert_allclose(share, 0.75, atol=4 * (0.75 * 0.25 / 4000) ** 0.5)


def test_constant_patches_have_a_target_of_zero():
    center, scale = statistics(jnp.full((1, 2, 12), 0.25))
    assert jnp.allclose((0.25 - center) / scale, 0)


def test_gelu_is_exact_and_epsilon_is_1e_6():
    """A block without attention's part: x + fc2(gelu(fc1(norm(x)))), written out again."""
    with jax.enable_x64(True):
        x = 1e-3 * jnp.array(np.random.default_rng(0).normal(size=(1, 3, 8)))
        block = Block(heads=2, dtype="float64")
        params = jax.tree.map(lambda x: x.astype("float64"), block.init(RNG, x)["params"])
        params["proj"]["kernel"] *= 0
        y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        y = y @ params["fc1"]["kernel"]
        y = 0.5 * y * (1 + jax.scipy.special.erf(y / 2**0.5))
        expected = x + y @ params["fc2"]["kernel"]
        np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=1e-14)


def test_normalize():
    images = jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1)
    assert jnp.allclose(normalize(images, (0.5,), (0.25,)).ravel(), jnp.array([-2.0, 2.0]))
    sixteen = jnp.array([0, 65535], jnp.uint16).reshape(1, 1, 2, 1)
    assert jnp.allclose(normalize(sixteen, (0.5,), (0.25,)).ravel(), jnp.array([-2.0, 2.0]))
    assert jnp.allclose(
        denormalize(normalize(images, (0.3,), (0.2,)), (0.3,), (0.2,)), images / 255
    )
    with pytest.raises(UserError, match="4 channels"):
        normalize(jnp.zeros((1, 2, 2, 4)), (0.1, 0.2, 0.3), (1.0,))


# --- The whole. ---


SHAPES = [((2, 32, 32, 3), 8), ((2, 16, 24, 1), (8, 4)), ((3, 20, 12, 13), (5, 4))]


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_any_shape_patch_and_channels(shape, patch):
    objective = tiny(model=dict(patch=patch))
    batch = batch_of(*shape)
    params, buffers = jax.jit(objective.init)(RNG, batch)
    grads = jax.jit(jax.grad(lambda p: objective.loss(p, buffers, batch, RNG, 0)[0]))(params)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads)), "a parameter gets no gradient"
    for images in jax.jit(objective.pictures)(params, buffers, batch, RNG).values():
        assert images.shape == shape


def mask_of(batch, patches, ratio=0.75):
    return hide(per_example(RNG, batch["index"]), (1, patches), ratio)


def test_hidden_pixels_do_not_reach_the_encoder():
    batch = batch_of(2, 32, 32, 3)
    visible, hidden = mask_of(batch, 16)
    encoder = vit(**MODEL)
    params = encoder.init(RNG, batch["image"])

    def gradient_of(images):
        return jax.grad(lambda x: (encoder.apply(params, x, visible=visible) ** 2).sum())(images)

    seen = jnp.abs(patchify(gradient_of(batch["image"]), (8, 8))).max(-1) > 0
    rows = jnp.arange(2)[:, None]
    assert seen[rows, visible].all()
    assert not seen[rows, hidden].any()


def test_the_loss_depends_only_on_hidden_patches():
    """What is painted depends on visible patches; the target of the loss is the hidden ones'."""
    batch = batch_of(2, 32, 32, 3)
    objective = tiny(target="pixels")
    params, buffers = jax.jit(objective.init)(RNG, batch)
    params["decoder"]["pred"] = jax.tree.map(jnp.zeros_like, params["decoder"]["pred"])
    _, hidden = mask_of(batch, 16)
    target = patchify(batch["image"], (8, 8))[jnp.arange(2)[:, None], hidden]
    total, weight, _ = jax.jit(objective.loss)(params, buffers, batch, RNG, 0)
    assert total / weight == pytest.approx(float((target**2).mean()), rel=1e-6)


def test_decoding_all_patches_gives_the_same_hidden_ones():
    batch = batch_of(2, 32, 32, 3)
    visible, hidden = mask_of(batch, 16)
    net = network("float32")
    variables = net.init(RNG, batch["image"], visible, hidden)
    some = net.apply(variables, batch["image"], visible, hidden)
    every = net.apply(variables, batch["image"], visible, hidden, 16)
    np.testing.assert_allclose(every[:, 4:], some, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots_with_no_batch_dims_saveable"])
def test_rematerialization_changes_only_memory(remat):
    batch = batch_of(2, 32, 32, 3)

    def gradient(remat):
        objective = tiny(model=dict(remat=remat))
        params, buffers = jax.jit(objective.init)(RNG, batch)
        loss = jax.jit(jax.grad(lambda params: objective.loss(params, buffers, batch, RNG, 0)[0]))
        return loss(params), str(jax.make_jaxpr(loss)(params)).count("dot_general")

    (kept, kept_products), (again, again_products) = gradient("none"), gradient(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), kept, again)
    assert again_products > kept_products


def test_bfloat16_computes_in_bfloat16_and_compares_in_float32():
    batch = batch_of(2, 32, 32, 3)
    losses = []
    for dtype in ("float32", "bfloat16"):
        objective = tiny(model=dict(dtype=dtype))
        params, buffers = jax.jit(objective.init)(RNG, batch)
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
        total, weight, _ = jax.jit(objective.loss)(params, buffers, batch, RNG, 0)
        assert total.dtype == jnp.float32
        losses.append(float(total / weight))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_pictures_show_masked_and_reconstructed_images():
    batch = {"image": jnp.full((2, 32, 32, 3), 64, jnp.uint8), "index": jnp.arange(2)}
    batch["image"] = batch["image"].at[:, ::3].set(200)
    objective = tiny(mean=(0.5,), std=(0.25,))
    params, buffers = jax.jit(objective.init)(RNG, batch)
    pictures = jax.jit(objective.pictures)(params, buffers, batch, RNG)
    assert list(pictures) == ["masked", "painted, true mean and variance", "original"]
    masked, painted, original = pictures.values()
    np.testing.assert_allclose(original, batch["image"] / 255, atol=1e-6)
    visible, hidden = mask_of(batch, 16)
    rows = jnp.arange(2)[:, None]
    of = lambda images, patches: patchify(images, (8, 8))[rows, patches]  # noqa: E731
    np.testing.assert_allclose(of(masked, hidden), 0.5, atol=1e-6)
    for images in (masked, painted):
        np.testing.assert_allclose(of(images, visible), of(original, visible), atol=1e-6)
    # Normalised predictions have about the true patch's brightness once they are put back.
    params["decoder"]["pred"] = jax.tree.map(jnp.zeros_like, params["decoder"]["pred"])
    painted = jax.jit(objective.pictures)(params, buffers, batch, RNG)[
        "painted, true mean and variance"
    ]
    mean = of(original, hidden).mean(-1, keepdims=True)
    np.testing.assert_allclose(of(painted, hidden), jnp.broadcast_to(mean, (2, 12, 192)), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(model=dict(patch=7)), "32 x 32 pixels cannot be cut into patches of 7 x 7"),
        (dict(model=dict(heads=5)), "5 heads do not divide a width of 32"),
        (dict(decoder_width=18), "a width that is a multiple of 4, not 18"),
        (dict(model=dict(width=0)), "set model.size, or"),
        (dict(model=dict(remat="half")), "model.remat = 'half'"),
        (dict(mask_ratio=0.99), "at least one must be visible"),
        (dict(mean=(0.1, 0.2)), "objective.mean has 2 values"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        jax.eval_shape(tiny(**settings).init, RNG, batch_of(2, 32, 32, 3))


def test_sizes_are_the_fields():
    assert {name: tuple(shape.values()) for name, shape in SIZES.items()} == {
        "Ti": (192, 12, 3),
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "H": (1280, 32, 16),
    }
