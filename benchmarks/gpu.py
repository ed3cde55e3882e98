"""Measures images per second in training on a GPU, next to PyTorch, eager and compiled.

    pip install -e '.[cuda13,torch]'
    python -m benchmarks.gpu [--only mae_base ...] [--batch=128] [--rounds=5] [--steps=10]

Rows are MAE with ViT-B and ViT-L, BEiT-B with given tokens, and fine-tuning of ViT-B. In PyTorch
these are Hugging Face's models with scaled_dot_product_attention, bfloat16 autocast with float32
parameters, and fused AdamW. Both compute whole steps on images in device memory. Each round times
ours, eager and compiled PyTorch one after another; the ratio is the median over the rounds. MFU is
computed from the FLOPs that XLA counts in our step for a CPU, and a peak of --peak TFLOP/s (989 for
an H100). `--smoke` runs tiny networks on any device, to test this file.
"""

import argparse
import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from benchmarks.step_time import ADAMW, seconds
from mim_jax.checkpoint.trees import abstract
from mim_jax.models.vit import SIZES, ViT, vit
from mim_jax.normalize import MEAN, STD, normalize
from mim_jax.objectives import Objective, classify, mae
from mim_jax.objectives.beit import BEiT
from mim_jax.optim import adamw
from mim_jax.sharding import by_row, make_mesh, place
from mim_jax.train import initialize, jit_step

VOCABULARY, LABELS, MASKED = 8192, 1000, 75
SMOKE = dict(width=32, depth=2, heads=2)
ROWS = {  # objective and size of the encoder
    "mae_base": ("mae", "B"),
    "mae_large": ("mae", "L"),
    "beit_base": ("beit", "B"),
    "finetune_base": ("finetune", "B"),
}


def given_tokens(model: ViT) -> Objective:
    """Returns BEiT's objective on batches that contain the tokens and the masks."""
    network = BEiT(model, VOCABULARY)

    def predict(params, batch):
        images = normalize(batch["image"], MEAN, STD)
        return network.apply({"params": params}, images, batch["masked"], batch["places"])

    def init(rng, batch):
        inputs = normalize(batch["image"], MEAN, STD), batch["masked"], batch["places"]
        return network.init(rng, *inputs)["params"], {}

    def loss(params, buffers, batch, rng, step):
        tokens = jnp.take_along_axis(batch["tokens"], batch["places"], axis=1)
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        losses = cross_entropy(predict(params, batch), tokens)
        return losses.sum(), losses.size, ({}, buffers)

    def unused(*arguments):
        raise NotImplementedError

    return Objective(init, loss, evaluate=unused, pictures=unused)


def make_batch(count: int) -> dict[str, np.ndarray]:
    """Returns random images and targets."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((count, 196)), axis=1)
    return dict(
        image=rng.random((count, 224, 224, 3), dtype=np.float32),
        index=np.arange(count, dtype=np.int32),
        valid=np.ones(count, np.float32),
        label=rng.integers(LABELS, size=count, dtype=np.int32),
        tokens=rng.integers(VOCABULARY, size=(count, 196), dtype=np.int32),
        masked=order < MASKED,
        places=np.argsort(order, axis=1)[:, :MASKED].astype(np.int32),
    )


def our_objective(name: str, shape: dict, dtype: str) -> Objective:
    """Returns the objective of a row; `shape` is the encoder's width, depth and heads."""
    if name == "mae":
        return mae.objective(vit(**shape, patch=16, dtype=dtype))
    if name == "beit":
        beit = dict(initializer="beit", key_bias=False, positions="learned", layer_scale=0.1)
        return given_tokens(vit(**shape, patch=16, dtype=dtype, **beit))
    model = vit(**shape, patch=16, dtype=dtype, positions="learned", initializer="timm")
    return classify.objective(model, num_labels=LABELS)


def ours(name: str, shape: dict, batch: dict) -> tuple[Callable[[int], Any], float]:
    """Returns a function that performs a number of steps, and the FLOPs of a step."""

    def lower(dtype, device):
        objective, mesh = our_objective(name, shape, dtype), make_mesh([device])
        b1, b2 = ADAMW["betas"]
        rate = optax.constant_schedule(ADAMW["lr"])
        optimizer = adamw(rate, b1=b1, b2=b2, weight_decay=ADAMW["weight_decay"])
        example = {
            key: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for key, x in batch.items()
        }
        begin = functools.partial(initialize, objective, optimizer, example, seed=0)
        shapes = jax.eval_shape(begin)
        placed = place(shapes, mesh)
        like = jax.tree.map(abstract, shapes, placed)
        rows = {key: abstract(jnp.asarray(x), by_row(mesh)) for key, x in batch.items()}
        step = jit_step(objective, optimizer, like, mesh=mesh)
        return jax.jit(begin, out_shardings=placed), step.lower(like, rows, jax.random.key(0))

    dtype = "bfloat16" if jax.default_backend() != "cpu" else "float32"
    begin, lowered = lower(dtype, jax.devices()[0])
    state, compiled = begin(), lowered.compile()
    arrays, rng = jax.device_put(batch), jax.random.key(0)
    # XLA does not count the FLOPs of a GPU's libraries, so those of a program for a CPU are used.
    counted = lower("float32", jax.local_devices(backend="cpu")[0])[1]

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, arrays, rng)
        jax.block_until_ready((state, metrics))

    return run, counted.cost_analysis()["flops"]


def their_model(name: str, shape: dict) -> torch.nn.Module:
    """Returns Hugging Face's model of a row, with scaled_dot_product_attention."""
    settings = dict(
        image_size=224,
        patch_size=16,
        hidden_size=shape["width"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["width"],
        attn_implementation="sdpa",
    )
    if name == "mae":
        config = transformers.ViTMAEConfig(**settings, norm_pix_loss=True)
        return transformers.ViTMAEForPreTraining(config)
    if name == "beit":
        config = transformers.BeitConfig(
            **settings,
            vocab_size=VOCABULARY,
            use_absolute_position_embeddings=True,
            use_mask_token=True,
            layer_scale_init_value=0.1,
            drop_path_rate=0.0,
        )
        return transformers.BeitForMaskedImageModeling(config)
    config = transformers.ViTConfig(**settings, num_labels=LABELS)
    return transformers.ViTForImageClassification(config)


def theirs(name: str, shape: dict, batch: dict, compiled: bool) -> Callable[[int], None]:
    """Returns a function that performs a number of steps in PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = their_model(name, shape).to(device).train()
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).contiguous().to(device)
    inputs = dict(pixel_values=images)
    if name == "beit":
        masked, tokens = torch.tensor(batch["masked"]), torch.tensor(batch["tokens"]).long()
        inputs |= dict(bool_masked_pos=masked.to(device), labels=tokens[masked].to(device))
    elif name == "finetune":
        inputs |= dict(labels=torch.tensor(batch["label"]).long().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    forward = torch.compile(model) if compiled else model

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = forward(**inputs).loss
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def measure(row: str, flags: argparse.Namespace) -> None:
    """Measures a row and prints its line."""
    name, size = ROWS[row]
    shape, batch = SMOKE if flags.smoke else SIZES[size], make_batch(flags.batch)
    step, flops = ours(name, shape, batch)
    runs = {"ours": step, "eager": theirs(name, shape, batch, compiled=False)}
    if not flags.smoke:
        runs["compiled"] = theirs(name, shape, batch, compiled=True)
    for run in runs.values():
        run(3)
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(flags.rounds):
        for who, run in runs.items():
            times[who].append(seconds(lambda: run(flags.steps)) / flags.steps)  # noqa: B023
    rates = ", ".join(
        f"{who} {flags.batch / statistics.median(x):.1f} images/s" for who, x in times.items()
    )
    ratios = [
        f"{statistics.median(b / a for a, b in zip(times['ours'], x, strict=True)):.3f} times {who}"
        for who, x in times.items()
        if who != "ours"
    ]
    mfu = flops / statistics.median(times["ours"]) / flags.peak / 1e12
    print(f"{row}, batch {flags.batch}: {rates}; {', '.join(ratios)}; MFU {mfu:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of the GPU in bfloat16")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, on any device")
    flags = parser.parse_args()
    for row in flags.only:
        measure(row, flags)


if __name__ == "__main__":
    main()
