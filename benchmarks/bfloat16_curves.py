"""Compares the losses of a small BEiT on the built-in emoji in bfloat16 and in float32.

    mim-jax train --config=configs/dvae_emoji.py
    python -m benchmarks.bfloat16_curves --tokenizer=runs/dvae_emoji

Trains configs/beit_emoji.py, narrowed to a width of 64, with LayerScale 1e-5 and 0.1, each in
float32 and in bfloat16 from the same initial parameters on the same batches. Writes the loss of
every step to bfloat16.csv and draws bfloat16.svg, averaged over 20 steps.
"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mim_jax import recipe, schema
from mim_jax.start import Start
from mim_jax.train import train

LAYER_SCALES, DTYPES = ("1e-5", "0.1"), ("float32", "bfloat16")
WINDOW = 20  # steps that the drawn curves are averaged over


def losses(layer_scale: str, dtype: str, tokenizer: str, steps: int) -> list[float]:
    """Returns the training loss of each step."""
    overrides = [
        f"steps={steps}",
        "batch_size=16",
        "model.width=64",
        f"model.layer_scale={layer_scale}",
        f"model.dtype={dtype}",
        "tokenizer.dtype=float32",
        f"init_from.tokenizer={tokenizer}",
        "optimizer.warmup_steps=50",
    ]
    config = schema.load("configs/beit_emoji.py", overrides)
    run = recipe.build(config)

    def batches(start: int):
        return run.data.training_batches(
            config.batch_size, seed=config.seed, start=start, stop=steps, on_bad=None
        )

    steps_of_run = train(
        run.objective,
        run.optimizer,
        batches,
        state=Start(run, config).state(),
        mesh=run.mesh,
        steps=steps,
        seed=config.seed,
    )
    return [float(metrics["loss"]) for _, _, metrics in steps_of_run]


def draw(curves: dict[tuple[str, str], list[float]], path: Path) -> None:
    """Draws the curves, one panel for each LayerScale."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for panel, scale in zip(panels, LAYER_SCALES, strict=True):
        for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
            mean = np.convolve(curves[scale, dtype], np.ones(WINDOW) / WINDOW, "valid")
            panel.plot(np.arange(len(mean)) + WINDOW, mean, style, label=dtype)
        panel.set(title=f"LayerScale {scale}", xlabel="step")
    panels[0].set_ylabel("cross-entropy (nats)")
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="runs/dvae_emoji", help="a run of a tokenizer")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--to", type=Path, default=Path("docs/results"))
    flags = parser.parse_args()
    curves = {}
    for scale in LAYER_SCALES:
        for dtype in DTYPES:
            curves[scale, dtype] = losses(scale, dtype, flags.tokenizer, flags.steps)
            print(f"LayerScale {scale}, {dtype}: {curves[scale, dtype][-1]:.4f}", flush=True)
    flags.to.mkdir(parents=True, exist_ok=True)
    with (flags.to / "bfloat16.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *(f"LayerScale {scale}, {dtype}" for scale, dtype in curves)])
        for step, values in enumerate(zip(*curves.values(), strict=True), 1):
            rows.writerow([step, *(f"{x:.6f}" for x in values)])
    draw(curves, flags.to / "bfloat16.svg")


if __name__ == "__main__":
    main()
