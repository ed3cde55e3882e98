r"""What pretraining gives where labels are few: fine-tuned against from scratch, searched alike.

    python -m benchmarks.few_labels emoji --held-out='train[80%:]'
    python -m benchmarks.few_labels cifar10 --held-out='train[-2000:]' \
        --config.data.name=folder:/data/cifar10 --config.data.labels=folder

NAME stands for configs/NAME_scratch.py and configs/NAME_finetune.py; the encoder that the second
starts from must have been trained. For each of the two, every pair of a rate and a layer decay is
tried once and measured on labeled images held out of the training split. The best pair runs with
as many seeds as asked for and is measured on the evaluation split, which has chosen nothing. Runs
lie in --runs; those that are there already are not run again. Printed are tables, and
--picture draws accuracy by step (pip install matplotlib).
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
    parser.add_argument("--held-out", required=True, help="the split that chooses")
    parser.add_argument("--base-lr", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--layer-decay", type=float, nargs="+", default=[0.75, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--picture", type=Path, help="the PNG to write")
    options, overrides = parser.parse_known_args()

    def run(kind: str, place: str, **keys: float | str) -> list[tuple[int, float]]:
        """-> (step, accuracy) of a run, which is done first where it has not been."""
        workdir = options.runs / options.name / kind / place
        command = [
            *(sys.executable, "-m", "mim_jax.main", f"--workdir={workdir}"),
            f"--config=configs/{options.name}_{kind}.py",
            *overrides,
            *(f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()),
        ]
        if code := subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(code)  # it has said why
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
    """A line a seed, the mean accuracy at their end beside them."""
    import matplotlib.pyplot as plt  # not a dependency: the tables do without

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
