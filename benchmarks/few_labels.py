r"""Compares fine-tuning with training from scratch on few labels, after the same search for both.

    python -m benchmarks.few_labels emoji --held-out='train[80%:]'
    python -m benchmarks.few_labels cifar10 --held-out='train[-2000:]' \
        --config.data.name=folder:/data/cifar10 --config.data.labels=folder

NAME selects configs/NAME_scratch.py and configs/NAME_finetune.py; the encoder that the latter
starts from must be trained first. For each of the two, every combination of learning rate and layer
decay is trained once and evaluated on labeled images that are held out of the training split. The
best combination is trained with --seeds seeds and evaluated on the evaluation split, which was not
used for the search. Runs are in --runs, and finished ones are not repeated. The results are printed
as tables; --picture draws the accuracy by step (pip install matplotlib).
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

KINDS = {"scratch": "from scratch", "finetune": "pretrained"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--held-out", required=True, help="the split for the search")
    parser.add_argument("--base-lr", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--layer-decay", type=float, nargs="+", default=[0.75, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--picture", type=Path, help="the PNG to write")
    options, overrides = parser.parse_known_args()

    def run(kind: str, place: str, **keys: float | str) -> list[tuple[int, float]]:
        """Trains a run unless it is finished. Returns the steps and accuracies of evaluations."""
        workdir = options.runs / options.name / kind / place
        command = [
            *(sys.executable, "-m", "mim_jax.main", f"--workdir={workdir}"),
            f"--config=configs/{options.name}_{kind}.py",
            *overrides,
            *(f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()),
        ]
        if code := subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(code)  # the run has printed the reason
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return [(m["step"], m["evaluate/accuracy"]) for m in lines if "evaluate/accuracy" in m]

    curves = {}
    for kind, title in KINDS.items():
        print(f"\n{title}: accuracy on {options.held_out}\n")
        print("| base_lr | layer_decay | accuracy |\n|---|---|---|")
        accuracies = {}
        for rate, decay in itertools.product(options.base_lr, options.layer_decay):
            accuracies[rate, decay] = run(
                kind,
                f"{rate}_{decay}",
                optimizer__base_lr=rate,
                optimizer__layer_decay=decay,
                data__evaluation_split=options.held_out,
            )[-1][1]
            print(f"| {rate} | {decay} | {100 * accuracies[rate, decay]:.1f} |", flush=True)
        rate, decay = max(accuracies, key=accuracies.get)
        curves[kind] = [
            run(
                kind,
                f"seed_{seed}",
                optimizer__base_lr=rate,
                optimizer__layer_decay=decay,
                seed=seed,
            )
            for seed in range(options.seeds)
        ]
    print(f"\n{options.seeds} seeds of the best\n\n| | accuracy | lowest, highest |\n|---|---|---|")
    for kind, title in KINDS.items():
        last = [100 * curve[-1][1] for curve in curves[kind]]
        print(f"| {title} | {statistics.mean(last):.1f} | {min(last):.1f}, {max(last):.1f} |")
    if options.picture:
        draw(curves, options.picture)


def draw(curves: dict[str, list], path: Path) -> None:
    """Draws the accuracy of each seed as a line, labeled with the mean accuracy at the end."""
    import matplotlib.pyplot as plt  # not a dependency: the tables do not need it

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for (kind, lines), color in zip(curves.items(), ("#888888", "#1f77b4"), strict=True):
        for line in lines:
            steps, accuracy = zip(*line, strict=True)
            axes.plot(steps, [100 * x for x in accuracy], color=color, alpha=0.8)
        last = statistics.mean(line[-1][1] for line in lines)
        axes.annotate(
            f"{KINDS[kind]}, {100 * last:.1f}",
            (steps[-1], 100 * last),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
    axes.set(xlabel="step", ylabel="accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
