"""The time of a training step of MAE, ours and Hugging Face's, on this machine's CPU.

    python -m benchmarks.step_time [--size=B] [--batch=16] [--rounds=7]

Both take the same images of 224 x 224 from memory and do a whole step in float32, forward,
backward and AdamW, on all cores: ours the `train_step` of `mim_jax.train` compiled, its state
donated; theirs `ViTMAEForPreTraining` in eager PyTorch, with the faster of its two AdamW. The
decoder is the default of both, 8 blocks of width 512. After two steps of each to warm up, every
round times one step of ours, then one of theirs. What counts is the median of the rounds' ratios:
a disturbance that lasts slows both of a round.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mim_jax.models.vit import SIZES
from mim_jax.objectives import mae
from mim_jax.optim import adamw
from mim_jax.sharding import make_mesh
from mim_jax.train import initialize, jit_step

ADAMW = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
PATCH = 16


def ours(size: str, images: np.ndarray) -> tuple[Callable[[], None], float | None]:
    """-> a function that does one step, and the FLOPs in it as XLA counts them."""
    objective = mae.objective(dict(size=size, patch=PATCH))
    b1, b2 = ADAMW["betas"]
    optimizer = adamw(
        optax.constant_schedule(ADAMW["lr"]), b1=b1, b2=b2, weight_decay=ADAMW["weight_decay"]
    )
    batch = {"image": jnp.array(images), "index": jnp.arange(len(images))}
    example = {name: x[:1] for name, x in batch.items()}
    rng = jax.random.key(0)
    state = jax.jit(lambda: initialize(objective, optimizer, example, seed=0))()
    compiled = jit_step(objective, optimizer, state, mesh=make_mesh()).lower(state, batch, rng)
    compiled = compiled.compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, rng)
        jax.block_until_ready((state, metrics))

    return step, (compiled.cost_analysis() or {}).get("flops")


def theirs(size: str, images: np.ndarray) -> tuple[Callable[[], None], str]:
    """-> a function that does one step, and which of PyTorch's AdamW it uses."""
    encoder = SIZES[size]
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=images.shape[1],
            patch_size=PATCH,
            hidden_size=encoder["width"],
            num_hidden_layers=encoder["depth"],
            num_attention_heads=encoder["heads"],
            intermediate_size=4 * encoder["width"],
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    ).train()
    trained = [x for x in model.parameters() if x.requires_grad]
    groups = [  # as ours: what has one axis does not decay
        dict(params=[x for x in trained if x.ndim > 1]),
        dict(params=[x for x in trained if x.ndim == 1], weight_decay=0.0),
    ]
    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()

    def backward():
        model.zero_grad()
        model(pixels).loss.backward()

    backward()
    times = {}
    for kind in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(groups, **ADAMW, **{kind: True})
        optimizer.step()  # makes the moments
        times[kind] = min(seconds(optimizer.step) for _ in range(3))
    kind = min(times, key=times.get)
    optimizer = torch.optim.AdamW(groups, **ADAMW, **{kind: True})

    def step():
        backward()
        optimizer.step()

    return step, kind


def seconds(step: Callable) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="B", choices=SIZES, help="of the encoder")
    parser.add_argument("--batch", type=int, default=16, metavar="IMAGES")
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args()

    torch.set_num_threads(os.cpu_count())
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads each")

    rng = np.random.default_rng(0)
    images = rng.random((flags.batch, 224, 224, 3), dtype=np.float32)
    our_step, flops = ours(flags.size, images)
    their_step, kind = theirs(flags.size, images)
    print(f"MAE ViT-{flags.size}/{PATCH}, batch {flags.batch}, float32; theirs with AdamW {kind}")
    if flops:
        print(f"our step: {flops / 1e9:.1f} GFLOPs by XLA's count")
    for _ in range(2):
        our_step()
        their_step()

    speeds, ratios = {"ours": [], "theirs": []}, []
    for i in range(flags.rounds):
        a, b = seconds(our_step), seconds(their_step)
        speeds["ours"].append(flags.batch / a)
        speeds["theirs"].append(flags.batch / b)
        ratios.append(b / a)
        print(f"round {i + 1}: ours {a:.3f} s, theirs {b:.3f} s, ratio {b / a:.3f}", flush=True)
    for name, values in speeds.items():
        print(f"{name}: {statistics.median(values):.3f} images/s (median)")
    print(
        f"ours / theirs: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), median and range of {flags.rounds} rounds"
    )


if __name__ == "__main__":
    main()
