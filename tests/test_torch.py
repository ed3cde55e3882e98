"""MAE against PyTorch: the same weights, images and masks give the same loss and gradients.

There are two oracles: Hugging Face's MAE, and one written from the paper for the images and patches
that Hugging Face's does not accept. Both compute in float64, so that a difference in float32 is our
own error. Weights have the official names (tests/official.py) and random values: at their initial
values they hide mistakes, for example in a norm's scale.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.masking import hide
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import vit
from mim_jax.objectives import mae, per_example
from mim_jax.optim import adamw, warmup_and_decay
from mim_jax.sharding import make_mesh
from mim_jax.train import TrainState, train_step
from tests.official import mae_shapes, to_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
F = torch.nn.functional

ENCODER = dict(width=32, depth=1, heads=4)
DECODER = dict(width=16, depth=2, heads=2)
SETTINGS = dict(mask_ratio=0.75, mean=(0.0,), std=(1.0,))
SETTINGS |= {f"decoder_{name}": value for name, value in DECODER.items()}


def random_state(patch, channels) -> dict[str, np.ndarray]:
    """Returns random weights by their official names."""
    shapes = mae_shapes(
        width=ENCODER["width"],
        depth=ENCODER["depth"],
        decoder_width=DECODER["width"],
        decoder_depth=DECODER["depth"],
        patch=patch,
        channels=channels,
    )
    rng = np.random.default_rng(0)
    return {name: rng.normal(scale=0.2, size=shape) for name, shape in shapes.items()}


def random_batch(size, channels, seed=0) -> dict[str, np.ndarray]:
    images = np.random.default_rng(seed).normal(size=(4, *size, channels))
    return {"image": images, "index": np.array([5, 2, 9, 0]) + 10 * seed}


def order_of(rng, batch, num_patches) -> np.ndarray:
    """Returns the patches (b, n) in the order that the objective must draw, visible ones first."""
    rngs = per_example(rng, jnp.array(batch["index"]))
    return np.concatenate(hide(rngs, (1, num_patches), SETTINGS["mask_ratio"]), axis=1)


def to_torch(state) -> dict:
    return {name: torch.tensor(value, requires_grad=True) for name, value in state.items()}


def assert_close(ours, theirs, tolerance):
    """Asserts equal trees, each array to within `tolerance` of its largest value."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        atol, name = tolerance * np.abs(y).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


# --- The oracles: state, batch, order -> loss, predictions of all patches in image order. ---


def positions(grid, width):
    """Returns (1, 1 + n, d): zeros for the class token; sin and cos of the column, then the row."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows = [torch.zeros(width)]
    for row in range(grid[0]):
        for column in range(grid[1]):
            x, y = column * omega, row * omega
            rows.append(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]))
    return torch.stack(rows)[None]


HF_TOKENS = {"cls_token": "vit.embeddings.cls_token", "mask_token": "decoder.mask_token"}
HF_TOP = {
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
HF_BLOCK = {
    "norm1": ["layernorm_before"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attn.proj": ["attention.o_proj"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}


def hf_names(name: str) -> list[str]:
    """Returns the names of an official array in transformers 5: three for qkv."""
    if name in HF_TOKENS:
        return [HF_TOKENS[name]]
    module, leaf = name.rsplit(".", 1)
    if match := re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", module):
        block = f"{'decoder.decoder_layers' if match[1] else 'vit.layers'}.{match[2]}"
        return [f"{block}.{place}.{leaf}" for place in HF_BLOCK[match[3]]]
    return [f"{HF_TOP[module]}.{leaf}"]


def hugging_face(state, batch, order, patch, normalize_target):
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    grid = (images.shape[2] // patch[0], images.shape[3] // patch[1])
    config = transformers.ViTMAEConfig(
        image_size=images.shape[2],
        patch_size=patch[0],
        num_channels=images.shape[1],
        hidden_size=ENCODER["width"],
        num_hidden_layers=ENCODER["depth"],
        num_attention_heads=ENCODER["heads"],
        intermediate_size=4 * ENCODER["width"],
        decoder_hidden_size=DECODER["width"],
        decoder_num_hidden_layers=DECODER["depth"],
        decoder_num_attention_heads=DECODER["heads"],
        decoder_intermediate_size=4 * DECODER["width"],
        mask_ratio=SETTINGS["mask_ratio"],
        norm_pix_loss=normalize_target,
        layer_norm_eps=1e-6,  # the default is not the official one
    )
    weights = {  # with the positions, which are zero in a new model
        "vit.embeddings.position_embeddings": positions(grid, ENCODER["width"]),
        "decoder.decoder_pos_embed": positions(grid, DECODER["width"]),
    }
    for name, value in state.items():
        names = hf_names(name)
        weights |= zip(names, value.chunk(len(names)), strict=True)
    output = torch.func.functional_call(
        transformers.ViTMAEForPreTraining(config),
        weights,
        images,
        {"noise": torch.tensor(order).argsort(1)},  # noise which sorts into this order
        strict=True,  # no weight is missing or unexpected
    )
    return output.loss, output.logits


def from_the_paper(state, batch, order, patch, normalize_target):
    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def block(x, name, heads):
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (b, h, n, d)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        y = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + linear(y, f"{name}.mlp.fc2")

    (b, n), (p, q) = order.shape, patch
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    grid = (images.shape[2] // p, images.shape[3] // q)
    visible = torch.tensor(order)[:, : int(n * (1 - SETTINGS["mask_ratio"])), None].long()

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], patch)
    x = x.flatten(2).mT + positions(grid, ENCODER["width"])[:, 1:]
    x = torch.cat([state["cls_token"].expand(b, -1, -1), x.take_along_dim(visible, 1)], 1)
    for i in range(ENCODER["depth"]):
        x = block(x, f"blocks.{i}", ENCODER["heads"])
    x = linear(norm(x, "norm"), "decoder_embed")
    tokens = state["mask_token"].repeat(b, n, 1).scatter(1, visible.expand_as(x[:, 1:]), x[:, 1:])
    x = torch.cat([x[:, :1], tokens], 1) + positions(grid, DECODER["width"])
    for i in range(DECODER["depth"]):
        x = block(x, f"decoder_blocks.{i}", DECODER["heads"])
    predictions = linear(norm(x, "decoder_norm"), "decoder_pred")[:, 1:]

    target = images.unfold(2, p, p).unfold(3, q, q).permute(0, 2, 3, 4, 5, 1).reshape(b, n, -1)
    if normalize_target:
        var, mean = torch.var_mean(target, -1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    hidden = torch.ones(b, n).scatter(1, visible[..., 0], 0.0)
    error = ((predictions - target) ** 2).mean(-1)
    return (error * hidden).sum() / hidden.sum(), predictions


# --- The comparison. ---


@pytest.mark.parametrize(
    "dtype, size, patch, channels, normalize_target",
    [
        ("float64", (32, 32), (8, 8), 3, True),
        ("float64", (16, 16), (4, 4), 1, False),
        ("float64", (16, 16), (4, 4), 13, True),
        ("float64", (24, 40), (8, 8), 3, False),
        ("float64", (40, 24), (4, 8), 13, True),
        ("float32", (32, 32), (8, 8), 3, True),
        ("float32", (24, 40), (8, 4), 1, False),
    ],
)
def test_loss_predictions_and_gradients(dtype, size, patch, channels, normalize_target):
    model = dict(**ENCODER, patch=patch, dtype=dtype)
    target = "normalized_pixels" if normalize_target else "pixels"
    objective = mae.objective(vit(**model), target=target, **SETTINGS)
    network = mae.MAE(vit(**model), Decoder(**DECODER, dtype=dtype, remat="none"))
    num_patches = math.prod(size) // math.prod(patch)

    @jax.jit
    def compute(params, batch, rng, order):
        def loss(params):
            total, weight, _ = objective.loss(params, {}, batch, rng, 0)
            return total / weight

        visible, hidden = jnp.split(order, [int(num_patches * (1 - SETTINGS["mask_ratio"]))], 1)
        predictions = network.apply(
            {"params": params}, batch["image"], visible, hidden, last=num_patches
        )
        value, gradients = jax.value_and_grad(loss)(params)
        return {"loss": value, "predictions": predictions, "gradients": gradients}

    state, batch = random_state(patch, channels), random_batch(size, channels)
    with jax.enable_x64(dtype == "float64"):
        rng = jax.random.key(0)
        order = order_of(rng, batch, num_patches)
        ours = compute(to_params(state), batch, rng, order)
    assert {x.dtype.name for x in jax.tree.leaves(ours)} == {dtype}

    square = size[0] == size[1] and patch[0] == patch[1]
    for oracle in (hugging_face, from_the_paper) if square else (from_the_paper,):
        weights = to_torch(state)
        loss, predictions = oracle(weights, batch, order, patch, normalize_target)
        loss.backward()
        theirs = {
            "loss": loss.item(),
            "predictions": np.take_along_axis(predictions.detach().numpy(), order[..., None], 1),
            "gradients": to_params({name: x.grad for name, x in weights.items()}),
        }
        assert_close(ours, theirs, {"float64": 1e-8, "float32": 1e-5}[dtype])


def learning_rate(epoch, lr, warmup_epochs, epochs):
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return lr * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))) / 2


def test_learning_rate():
    """The rates of the official code for the paper's recipe, with two steps per epoch."""
    golden = {0: 0.0, 0.5: 3e-5, 20: 0.0012, 40: 0.0024, 41: 0.002399989748}
    golden |= {100: 0.002363280319, 400: 0.001299095215, 420: 0.0012, 799: 1.0252344e-8}
    schedule = warmup_and_decay(2.4e-3, min_lr=0.0, warmup_steps=2 * 40, steps=2 * 800, code="mae")
    with jax.enable_x64(True):
        rates = {epoch: float(schedule(jnp.array(2.0 * epoch))) for epoch in golden}
    assert rates == pytest.approx(golden, abs=1e-12)
    assert golden == pytest.approx(
        {e: learning_rate(e, 2.4e-3, 40, 800) for e in golden}, abs=1e-12
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_steps_of_adamw(accumulate):
    """Class and mask tokens decay, biases and norms do not; rates and masks change every step."""
    patch, channels, lr, warmup, steps = (4, 4), 3, 1e-2, 3, 10
    state, rng = random_state(patch, channels), jax.random.key(0)

    theirs = to_torch(state)
    flat = {name for name, x in theirs.items() if x.ndim == 1 or name.endswith(".bias")}
    groups = [
        dict(params=[x for name, x in theirs.items() if name in flat], weight_decay=0.0),
        dict(params=[x for name, x in theirs.items() if name not in flat], weight_decay=0.05),
    ]
    adamw_of_torch = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    schedule = warmup_and_decay(lr, min_lr=0.0, warmup_steps=warmup, steps=steps, code="mae")
    optimizer = adamw(
        lambda step: schedule(step.astype(float)),  # a rate computed from an integer is float32
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
    )
    model = dict(**ENCODER, patch=patch, dtype="float64")
    objective = mae.objective(vit(**model), **SETTINGS)
    settings = dict(objective=objective, optimizer=optimizer, accumulate=accumulate)
    settings["mesh"] = make_mesh(jax.devices()[:1])
    step = jax.jit(functools.partial(train_step, **settings))
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.array, to_params(state))
        ours = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params))
        for i in range(steps):
            batch = random_batch((16, 16), channels, seed=i)
            ours, metrics = step(ours, batch, rng)

            order = order_of(jax.random.fold_in(rng, i), batch, 16)
            loss, _ = hugging_face(theirs, batch, order, patch, normalize_target=True)
            adamw_of_torch.zero_grad()
            loss.backward()
            for group in adamw_of_torch.param_groups:
                group["lr"] = learning_rate(i, lr, warmup, steps)
            adamw_of_torch.step()
            assert_close(metrics["loss"], loss.item(), 1e-8)

    assert_close(ours.params, to_params({name: x.detach() for name, x in theirs.items()}), 1e-8)
