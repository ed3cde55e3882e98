"""Compares the time of a training step of MAE with Hugging Face's, on a CPU or a GPU.

    python -m benchmarks.step_time [--size=B] [--batch=16] [--rounds=7]
    python -m benchmarks.step_time --batch=256 --steps=20 [--compile]       # on a GPU

Both compute a whole step (forward, backward and AdamW) on the same images of 224 x 224 in memory.
Ours is the compiled `train_step` of `mim_jax.train`, with a donated state; theirs is
`ViTMAEForPreTraining` in PyTorch, eager or with torch.compile, with the faster of its two
implementations of AdamW. Both have the default decoder, 8 blocks of width 512. On a CPU both use
float32 and all cores; on a GPU bfloat16 with float32 parameters, in PyTorch by autocast. After
three warm-up steps of each, every round times some steps of ours and then as many of theirs. The
result is the median of the rounds' ratios, because a disturbance that lasts slows down both.
"""

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mim_jax.checkpoint.trees import abstract
from mim_jax.models.vit import SIZES, vit
from mim_jax.objectives import mae
from mim_jax.optim import adamw
from mim_jax.sharding import by_row, make_mesh, place
from mim_jax.train import initialize, jit_step

ADAMW = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
PATCH = {"H": 14}  # 16 for all others


def ours(size: str, images: np.ndarray, dtype: str, remat: str) -> tuple[Callable, float, float]:
    """Returns a function that performs a number of steps, the FLOPs of a step, and its peak memory.

    Both are XLA's estimates. The memory is in GB, and 0 if it is unknown.
    """
    batch = {"image": jnp.array(images), "index": jnp.arange(len(images))}
    rng = jax.random.key(0)

    def lower(dtype: str, device: jax.Device):
        model = vit(size=size, patch=PATCH.get(size, 16), dtype=dtype, remat=remat)
        objective, mesh = mae.objective(model), make_mesh([device])
        b1, b2 = ADAMW["betas"]
        optimizer = adamw(
            optax.constant_schedule(ADAMW["lr"]), b1=b1, b2=b2, weight_decay=ADAMW["weight_decay"]
        )
        example = {name: x[:1] for name, x in batch.items()}
        begin = functools.partial(initialize, objective, optimizer, example, seed=0)
        shapes = jax.eval_shape(begin)
        placed = place(shapes, mesh)
        like = jax.tree.map(abstract, shapes, placed)
        rows = {name: abstract(x, by_row(mesh)) for name, x in batch.items()}
        lowered = jit_step(objective, optimizer, like, mesh=mesh).lower(like, rows, rng)
        return jax.jit(begin, out_shardings=placed), lowered

    begin, lowered = lower(dtype, jax.devices()[0])
    state, compiled = begin(), lowered.compile()
    # XLA does not count the FLOPs of a GPU's libraries, so those of a program for a CPU are used.
    flops = lower("float32", jax.local_devices(backend="cpu")[0])[1].cost_analysis()["flops"]

    def run(steps: int):
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, batch, rng)
        jax.block_until_ready((state, metrics))

    peak = compiled.memory_analysis().peak_memory_in_bytes / 1e9
    return run, flops, peak


def theirs(size: str, images: np.ndarray, dtype: str, compiled: bool) -> tuple[Callable, str]:
    """Returns a function that performs a number of steps, and the kind of PyTorch's AdamW."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    encoder = SIZES[size]
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=images.shape[1],
            patch_size=PATCH.get(size, 16),
            hidden_size=encoder["width"],
            num_hidden_layers=encoder["depth"],
            num_attention_heads=encoder["heads"],
            intermediate_size=4 * encoder["width"],
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    )
    model = model.to(device).train()
    trained = [x for x in model.parameters() if x.requires_grad]
    groups = [  # as ours: parameters with one axis do not decay
        dict(params=[x for x in trained if x.ndim > 1]),
        dict(params=[x for x in trained if x.ndim == 1], weight_decay=0.0),
    ]
    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(device)
    forward = torch.compile(model) if compiled else model

    def backward():
        model.zero_grad()
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = forward(pixels).loss
        loss.backward()

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def update(optimizer):
        optimizer.step()
        wait()

    backward()
    times = {}
    for kind in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(groups, **ADAMW, **{kind: True})
        update(optimizer)  # creates the moments
        times[kind] = min(seconds(lambda: update(optimizer)) for _ in range(3))  # noqa: B023
    kind = min(times, key=times.get)
    optimizer = torch.optim.AdamW(groups, **ADAMW, **{kind: True})

    def run(steps: int):
        for _ in range(steps):
            backward()
            optimizer.step()
        wait()

    return run, kind


def seconds(function: Callable) -> float:
    """Returns the time that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="B", choices=SIZES, help="size of the encoder")
    parser.add_argument("--batch", type=int, default=16, metavar="IMAGES")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps of each in a round")
    parser.add_argument("--remat", default="none", help="model.remat of ours")
    parser.add_argument("--compile", action="store_true", help="use torch.compile for PyTorch")
    flags = parser.parse_args()

    torch.set_num_threads(os.cpu_count())
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    print(", ".join(f"{name} {version(name)}" for name in names))
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads each"
    print(cpu if on_cpu else device.device_kind)

    rng = np.random.default_rng(0)
    images = rng.random((flags.batch, 224, 224, 3), dtype=np.float32)
    our_steps, flops, peak = ours(flags.size, images, dtype, flags.remat)
    their_steps, kind = theirs(flags.size, images, dtype, flags.compile)
    how = "torch.compile" if flags.compile else "eager"
    print(f"MAE ViT-{flags.size}, batch {flags.batch}, {dtype}; theirs {how}, AdamW {kind}")
    memory = f", at most {peak:.2f} GB" if peak else ""
    print(f"our step: {flops / 1e9:.1f} GFLOPs by XLA's count{memory}")
    our_steps(3)
    their_steps(3)

    speeds, ratios = {"ours": [], "theirs": []}, []
    for i in range(flags.rounds):
        a = seconds(lambda: our_steps(flags.steps)) / flags.steps
        b = seconds(lambda: their_steps(flags.steps)) / flags.steps
        speeds["ours"].append(flags.batch / a)
        speeds["theirs"].append(flags.batch / b)
        ratios.append(b / a)
        print(f"round {i + 1}: ours {a:.4f} s, theirs {b:.4f} s, ratio {b / a:.3f}", flush=True)
    for name, values in speeds.items():
        rate = statistics.median(values)
        print(
            f"{name}: {rate:.3f} images/s (median), {rate / flags.batch * flops / 1e12:.2f} TFLOP/s"
        )
    print(
        f"ours / theirs: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), median and range of {flags.rounds} rounds"
    )


if __name__ == "__main__":
    main()
