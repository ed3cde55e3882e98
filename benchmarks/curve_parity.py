"""Trains the same small network with mim_jax and in PyTorch, and compares all losses.

    pip install -e '.[torch]' timm matplotlib
    python -m benchmarks.curve_parity --model=mae [--dtype=float64] [--steps=300]

Models: mae, beit (transformers), finetune (timm, with layer decay), segment (transformers' BEiT
with UPerNet) and dvae (plain PyTorch). Both have the same initial weights, converted by
`mim_jax.convert`, and the same images in the same order, masks and dropped branches. mim_jax uses
its own objective, optimizer and step; PyTorch uses AdamW and a schedule that is written out here.
The losses of every step are written to MODEL_DTYPE.csv and drawn in MODEL_DTYPE.png in --to. The
classes for segmentation are levels of brightness, so that any images can be used.

With --dtype=bfloat16, four runs are compared: ours in bfloat16 and float32, PyTorch's with autocast
and in float32. The printed ratio is that of the mean differences from float32.

The limits are a relative difference of 1e-6 in float64, of 1e-3 in float32 over the first 100
steps, and a ratio of 1.5 in bfloat16. The exit code is 1 if one is exceeded.
"""

import argparse
import csv
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch

from benchmarks.torch_pairs import CLASSES, PAIRS, DalleEncoder, Pair, Recipe, Sizes
from mim_jax import data
from mim_jax.optim import adamw, warmup_and_decay
from mim_jax.sharding import make_mesh
from mim_jax.train import TrainState, train

matplotlib.use("Agg")
LIMITS = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 1.5}
FIRST = 100  # steps of the limit in float32


def open_images(name: str, model: str, sizes: Sizes) -> data.Data:
    """Opens the images with the crops and flips of small recipes."""
    labels = "folder" if model == "finetune" and name.startswith("folder:") else ""
    return data.make(
        name=name,
        size=sizes.image,
        tokenizer_size=sizes.image // 2 if model == "beit" else 0,
        evaluation_split="train",
        labels=labels,
        crop_scale=(0.6, 1.0),
        flip=True,
        threads=1,
    )


def batches(images: data.Data, sizes: Sizes, dtype: str) -> Iterator[dict]:
    """Yields the batches of all steps: images in [0, 1] in a dtype, and classes of pixels."""
    loaded = images.training_batches(sizes.batch, seed=sizes.seed, start=0, stop=sizes.steps)
    for batch in loaded:
        floats = {
            name: x.astype(dtype) / np.asarray(np.iinfo(x.dtype).max, dtype)
            for name, x in batch.items()
            if name.endswith("image")
        }
        brightness = floats["image"].mean(-1)
        levels = np.digitize(brightness, [0.25, 0.5, 0.75, 0.97]).astype(np.uint8)
        assert levels.max() < CLASSES
        levels[:, 0] = 255  # a row of pixels without a label
        yield batch | floats | dict(segmentation=levels)


def rate_of(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """Returns the learning rate by step, written out from the official code."""
    warmup = steps // 10

    def rate(step: int) -> float:
        if recipe.schedule == "mmseg":
            return recipe.lr * (1 - step / steps) * min(step / warmup, 1)
        if step < warmup:
            return recipe.lr * step / (warmup - (recipe.schedule == "beit"))
        return recipe.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return rate


def initial(pair: Pair, example: dict, seed: int) -> tuple[dict, dict]:
    """Returns our parameters and buffers before training, in float32."""
    state = jax.jit(pair.objective.init)(jax.random.key(seed), example)
    params, buffers = jax.tree.map(np.asarray, state)
    if "tokenizer" in buffers:  # without the mean of its logit, no token is much more likely
        view = torch.tensor(np.asarray(example["tokenizer_image"])).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = DalleEncoder(buffers["tokenizer"])(0.1 + 0.8 * view)
        buffers["tokenizer"]["output"]["bias"] = -logits.mean((0, 2, 3)).numpy()
    return params, buffers


def cast(tree: dict, dtype: str) -> dict:
    """Converts the floats of a tree of arrays."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, tree)


def optimizer_of(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Returns our optimizer with its schedule."""
    schedule = warmup_and_decay(
        recipe.lr, min_lr=0.0, warmup_steps=steps // 10, steps=steps, code=recipe.schedule
    )

    def rate(step: jax.Array) -> jax.Array:  # for an integer step it would be float32
        return schedule(step.astype(jnp.result_type(float)))

    optimizer = adamw(
        rate,
        b1=recipe.betas[0],
        b2=recipe.betas[1],
        weight_decay=recipe.weight_decay,
        undecayed=recipe.undecayed,
        layer_decay=recipe.layer_decay,
    )
    if recipe.clip_norm:
        return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optimizer)
    return optimizer


def ours(pair: Pair, state: tuple[dict, dict], stream: Callable, sizes: Sizes) -> list[float]:
    """Trains with this library. Returns the loss of each step."""
    params, buffers = jax.tree.map(jnp.asarray, state)
    optimizer, loss = optimizer_of(pair.recipe, sizes.steps), pair.objective.loss

    def loss_at(params: dict, buffers: dict, batch: dict, rng: jax.Array, step: jax.Array):
        # For an integer step, temperatures would be float32.
        return loss(params, buffers, batch, rng, step.astype(jnp.result_type(float)))

    begin = TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params))
    steps = train(
        pair.objective._replace(loss=loss_at),
        optimizer,
        lambda start: stream(),
        state=begin,
        mesh=make_mesh(jax.devices()[:1]),
        steps=sizes.steps,
        seed=sizes.seed,
    )
    return [float(metrics["loss"]) for _, _, metrics in steps]


def theirs(
    pair: Pair, state: tuple[dict, dict], stream: Callable, sizes: Sizes, autocast: bool
) -> list[float]:
    """Trains with PyTorch. Returns the loss of each step."""
    recipe, module = pair.recipe, pair.module(*state)
    groups = pair.groups(module, recipe)
    for group in groups:
        group["lr"] = recipe.lr * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    rate = rate_of(recipe, sizes.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / recipe.lr)
    rng, draw, losses = jax.random.key(sizes.seed), jax.jit(pair.draw), []
    for step, batch in enumerate(stream()):
        draws = draw(jax.random.fold_in(rng, step), batch)
        tensors = [
            {name: torch.tensor(np.asarray(x)) for name, x in arrays.items()}
            for arrays in (batch, draws)
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = pair.loss(module, *tensors, step)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm:
            clip(module, recipe.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def clip(module: torch.nn.Module, largest: float) -> None:
    """Clips the norm of the gradient. PyTorch's own function divides by the norm plus 1e-6."""
    gradients = [x.grad for x in module.parameters() if x.grad is not None]
    norm = torch.cat([x.flatten() for x in gradients]).norm()
    for x in gradients:
        x.mul_((largest / norm).clamp(max=1))


def curves(model: str, dtype: str, sizes: Sizes, images: str = "emoji") -> dict[str, list[float]]:
    """Trains both. Returns the losses by the name of a run: ours first, then PyTorch's.

    With bfloat16 these are followed by both in float32.
    """
    opened = open_images(images, model, sizes)
    wide = "float64" if dtype == "float64" else "float32"

    def stream() -> Iterator[dict]:
        return batches(opened, sizes, wide)

    first = PAIRS[model](sizes, "float32", opened.num_labels)
    example = next(batches(opened, sizes, "float32"))
    state = cast(initial(first, example, sizes.seed), wide)
    results = {}
    with jax.enable_x64(dtype == "float64"):
        for kind in dict.fromkeys((dtype, wide)):
            pair = PAIRS[model](sizes, kind, opened.num_labels)
            results[f"mim_jax, {kind}"] = ours(pair, state, stream, sizes)
            autocast = kind == "bfloat16"
            name = "PyTorch, autocast" if autocast else f"PyTorch, {kind}"
            results[name] = theirs(pair, state, stream, sizes, autocast)
    return results


def relative(losses: list[float], right: list[float]) -> float:
    """Returns the largest relative difference of two curves."""
    a, b = np.asarray(losses), np.asarray(right)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def bfloat16_ratio(results: dict[str, list[float]]) -> tuple[float, float]:
    """Returns the mean differences from float32 of ours in bfloat16 and of autocast."""
    fast, autocast, wide, exact = map(np.asarray, results.values())
    return float(np.abs(fast - wide).mean()), float(np.abs(autocast - exact).mean())


def draw_curves(results: dict[str, list[float]], path: Path, title: str) -> None:
    """Draws the curves, and below them the relative differences from the last one."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(5, 4), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    *_, reference = results.values()
    for i, (name, losses) in enumerate(results.items()):
        steps = np.arange(1, len(losses) + 1)
        above.plot(steps, losses, ("-", "--", ":", "-.")[i], label=name, linewidth=1.2)
        if losses is not reference:
            difference = np.abs(np.divide(losses, reference) - 1)
            below.semilogy(steps, np.maximum(difference, 1e-17), linewidth=0.8, label=name)
    above.set(ylabel="loss", title=title)
    above.legend(fontsize="small")
    below.set(xlabel="step", ylabel="relative difference")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def write(results: dict[str, list[float]], path: Path) -> None:
    """Writes the loss of each step to a CSV file."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *results])
        for step, losses in enumerate(zip(*results.values(), strict=True), 1):
            rows.writerow([step, *(repr(x) for x in losses)])


def summarize(results: dict[str, list[float]], dtype: str) -> tuple[str, bool]:
    """Describes the differences, and returns whether they are within the limit.

    The last line of the text has the largest relative difference.
    """
    ours, torchs, *_ = results.values()
    largest, limit = relative(ours, torchs), LIMITS[dtype]
    last = f"max relative difference: {largest:.3g} over {len(ours)} steps"
    if dtype == "bfloat16":
        fast, autocast = bfloat16_ratio(results)
        value, first = fast / autocast, f"ours {fast:.3g}, autocast {autocast:.3g}, ratio "
        line = f"mean difference from float32: {first}{value:.3f}"
    else:
        steps = len(ours) if dtype == "float64" else min(FIRST, len(ours))
        value = relative(ours[:steps], torchs[:steps])
        line = f"largest relative difference over the first {steps} steps: {value:.3g}"
    return f"{line} (limit {limit:g})\n{last}", value <= limit


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns 1 if a difference exceeds its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PAIRS, required=True)
    parser.add_argument("--dtype", choices=LIMITS, default="float64")
    parser.add_argument("--images", default="emoji", help="as data.name, for example folder:PATH")
    parser.add_argument("--to", type=Path, default=Path("docs/results/curve_parity"))
    for name, default in Sizes._field_defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args(arguments)
    if flags.model == "finetune" and not importlib.util.find_spec("torchvision"):
        sys.exit("--model=finetune needs timm, which imports torchvision: pip install torchvision")
    torch.set_num_threads(1)
    sizes = Sizes(**{name: getattr(flags, name) for name in Sizes._fields})
    results = curves(flags.model, flags.dtype, sizes, flags.images)
    flags.to.mkdir(parents=True, exist_ok=True)
    name = f"{flags.model}_{flags.dtype}"
    write(results, flags.to / f"{name}.csv")
    draw_curves(results, flags.to / f"{name}.png", f"{flags.model}, {flags.dtype}")
    text, within = summarize(results, flags.dtype)
    print(text)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
