r"""Tests claims of the papers at a small scale: CIFAR-10, a million parameters, three seeds.

    python -m benchmarks.claims few_labels --data=/data
    python -m benchmarks.claims few_labels --table

--data is a folder with cifar10/ or cifar10.tar.gz (train/ and test/ with a folder per class), and
for `ablation` also camvid/ or camvid.tar.gz (images and masks, see docs/segmentation.md).

few_labels: pretraining, then fine-tuning on 1000 labels, against training from scratch (BEiT,
    figure 20; MAE, table 3).
mask_ratio: masking 25, 75 and 90 % of the patches (MAE, figure 5).
ablation: blockwise or random masks, tokens or pixels, and recovering all patches (BEiT, table 4).
mask_tokens: the encoder with mask tokens takes more operations and time (MAE, table 1c: 3.3 times).
larger: larger networks without pretraining on 1000 labels (BEiT, figure 21).

A claim is a sweep of settings and seeds. Each result is appended as a row to NAME.csv in --to;
existing rows are skipped, and an interrupted run continues from its checkpoint in --runs. The
settings are those of the configs for CIFAR-10 with fewer steps; none was searched. The table states
the smallest detectable difference between two settings: the half-width of a 95 % confidence
interval, from the spread within settings.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
CAMVID = (  # the classes by their value in the masks; 11, without a name, is ignored
    *("sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car"),
    *("pedestrian", "bicyclist", ""),
)
T_95 = {2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228, 12: 2.179}  # by degrees of freedom
PRETRAINING, TUNING, TOKENIZER = 300, 100, 600  # steps: a row takes about six minutes of one core
HEAD = ("setting", "seed", "metric", "value", "pretraining_steps", "tuning_steps", "cpu_seconds")


class Stage(NamedTuple):
    """A run: its name, its config, the keys to change, and the runs that it starts from."""

    name: str
    config: str
    keys: dict[str, object]
    init_from: dict[str, str] = {}  # noqa: RUF012 - {key of init_from: name of a stage}
    seeded: bool = True  # false: one run for all seeds


class Setting(NamedTuple):
    """One row of a claim for each seed: stages, of which the last one is measured."""

    stages: tuple[Stage, ...]
    metric: str = "accuracy"


SMALL = {"batch_size": 64, "save.every_steps": 100, "pictures.every_steps": 0}
PRETRAIN = SMALL | {
    "steps": PRETRAINING,
    "epochs": 0,
    "optimizer.warmup_steps": PRETRAINING // 10,
    "optimizer.warmup_epochs": 0,
    "evaluate.every_steps": PRETRAINING,
    "evaluate.every_epochs": 0,
    "evaluate.limit": 500,
    "probe.every_steps": 0,
    "probe.every_epochs": 0,
    "save.every_epochs": 0,
    "pictures.every_epochs": 0,
}
TUNE = SMALL | {
    "steps": TUNING,
    "optimizer.warmup_steps": TUNING // 10,
    "evaluate.every_steps": TUNING,
    "evaluate.limit": 2000,
}
TOKENS = Stage(
    "dvae",
    "dvae_cifar10",
    {
        "steps": TOKENIZER,
        "batch_size": 16,
        "objective.temperature_steps": TOKENIZER // 2,
        "optimizer.warmup_steps": TOKENIZER // 10,
        "evaluate.every_steps": TOKENIZER,
        "pictures.every_steps": 0,
        "save.every_steps": 100,
    },
    seeded=False,
)
BEIT = {
    "model.width": 128,
    "model.patch": 4,
    "model.positions": "learned",
    "model.relative_bias": "none",
    "model.layer_scale": 0.0,
    "model.initializer": "beit",
    "tokenizer.vocabulary": 1024,  # as dvae_cifar10
    "tokenizer.width": 128,
    "tokenizer.stem": 4,
    "objective.num_masked": 25,
    "objective.min_block": 4,
    "objective.mean": (0.491, 0.482, 0.447),
    "objective.std": (0.247, 0.243, 0.262),
    "data.name": "cifar10",
    "data.evaluation_split": "test",
    "data.size": 32,
    "data.tokenizer_size": 32,
    "data.crop_scale": (0.4, 1.0),
}


def pretrained_by_mae(percent: int) -> Stage:
    """Returns the pretraining by MAE with a masking ratio in per cent."""
    keys = {"objective.mask_ratio": percent / 100}
    return Stage(f"mae_{percent}", "mae_cifar10", PRETRAIN | keys)


def pretrained_by_beit(name: str, **keys: object) -> Stage:
    """Returns the pretraining by BEiT; pixels as targets need no tokenizer."""
    if keys.get("objective.target") == "pixels":
        return Stage(name, "beit_emoji", PRETRAIN | BEIT | keys | {"init_from.tokenizer": ""})
    return Stage(name, "beit_emoji", PRETRAIN | BEIT | keys, {"tokenizer": TOKENS.name})


def finetuned(stage: Stage, *before: Stage, **keys: object) -> Setting:
    """Returns a setting that fine-tunes the encoder of a stage on 1000 labels."""
    tune = Stage(f"{stage.name}_tune", "cifar10_finetune", TUNE | keys, {"encoder": stage.name})
    return Setting((*before, stage, tune))


def scratch(name: str, **keys: object) -> Setting:
    return Setting((Stage(name, "cifar10_scratch", TUNE | keys),))


def segmented(stage: Stage, *before: Stage) -> Setting:
    """Returns a setting that trains UPerNet on the encoder of a stage, on CamVid."""
    keys = TUNE | {
        "batch_size": 8,
        "model.patch": 4,
        "model.key_bias": False,
        "data.name": "camvid",
        "data.size": 64,
        "data.short_side": 80,
        "evaluate.limit": 0,
    }
    tune = Stage(f"{stage.name}_camvid", "camvid_tiny", keys, {"encoder": stage.name})
    return Setting((*before, stage, tune), metric="miou")


def claims() -> dict[str, dict[str, Setting]]:
    """Returns the settings of each claim that is a sweep, by name."""
    beit = {"model.key_bias": False}
    kinds = {
        "blockwise, tokens": {},
        "random, tokens": {"objective.sampling": "random"},
        "blockwise, pixels": {"objective.target": "pixels"},
        "random, pixels": {"objective.sampling": "random", "objective.target": "pixels"},
        "blockwise, tokens, all patches": {"objective.recover": "all"},
    }
    stages = {kind: pretrained_by_beit(slug(kind), **keys) for kind, keys in kinds.items()}
    ablation = {kind: finetuned(stage, TOKENS, **beit) for kind, stage in stages.items()}
    ablation |= {
        f"CamVid: {kind}": segmented(stages[kind], TOKENS)
        for kind in ("blockwise, tokens", "random, tokens")
    }
    return {
        "few_labels": {
            "from scratch": scratch("scratch"),
            "MAE": finetuned(pretrained_by_mae(75)),
            "BEiT": finetuned(pretrained_by_beit("blockwise_tokens"), TOKENS, **beit),
        },
        "mask_ratio": {
            f"{percent} %": finetuned(pretrained_by_mae(percent)) for percent in (25, 75, 90)
        },
        "ablation": ablation,
        "larger": {
            "width 64, 4 blocks": scratch(
                "w64", **{"model.width": 64, "model.depth": 4, "model.heads": 2}
            ),
            "width 128, 6 blocks": scratch("scratch"),
            "width 192, 8 blocks": scratch(
                "w192", **{"model.width": 192, "model.depth": 8, "model.heads": 6}
            ),
        },
    }


def slug(text: str) -> str:
    return text.replace(",", "").replace(" ", "_")


def unpacked(data: Path, runs: Path, name: str) -> Path:
    """Returns the folder of a data set; an archive is unpacked into `runs` first."""
    if (data / name).is_dir():
        return data / name
    folder = runs / "data" / name
    if not folder.is_dir():
        if not (archive := data / f"{name}.tar.gz").is_file():
            sys.exit(f"--data={data} has neither {name}/ nor {name}.tar.gz.")
        with tarfile.open(archive) as tar:
            tar.extractall(folder.with_suffix(".part"), filter="data")
        folder.with_suffix(".part").rename(folder)
    inner = list(folder.iterdir())
    return inner[0] if len(inner) == 1 and inner[0].is_dir() else folder


def overrides(keys: Mapping[str, object]) -> list[str]:
    """Returns keys and values as KEY=VALUE."""
    texts = {k: ",".join(map(str, x)) if isinstance(x, tuple) else x for k, x in keys.items()}
    return [f"{key}={text}" for key, text in texts.items()]


def perform(stage: Stage, seed: int, data: Path, runs: Path) -> Path:
    """Trains a stage, from its newest checkpoint on. Returns its run directory."""
    place = runs / f"seed_{seed}" if stage.seeded else runs
    keys = dict(stage.keys) | {"seed": seed if stage.seeded else 0}
    for key, source in stage.init_from.items():
        keys[f"init_from.{key}"] = runs / source if source == TOKENS.name else place / source
    keys["data.name"] = f"folder:{unpacked(data, runs, keys.get('data.name', 'cifar10'))}"
    if stage.config in ("cifar10_finetune", "cifar10_scratch"):
        keys["data.labels"] = "folder"
    if stage.config == "camvid_tiny":
        keys["data.classes"] = runs / "camvid.csv"
        keys["data.classes"].write_text("".join(f"{i},{x}\n" for i, x in enumerate(CAMVID)))
    workdir = place / stage.name
    command = [sys.executable, "-m", "mim_jax.main", f"--workdir={workdir}"]
    command.append(f"--config={ROOT / 'configs' / stage.config}.py")
    command += [f"--config.{override}" for override in overrides(keys)]
    if code := subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(code)  # the run has reported why
    return workdir


def measured(workdir: Path, metric: str) -> float:
    """Returns the last value of a metric of a run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[f"evaluate/{metric}"] for line in lines if f"evaluate/{metric}" in line][-1]


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sweep(name: str) -> Iterator[dict]:
    """Yields the settings and seeds of a claim as rows without results."""
    for seed in SEEDS:
        for setting in claims()[name]:
            yield dict(setting=setting, seed=seed)


def compute(name: str, row: dict, data: Path, runs: Path) -> dict:
    """Returns the complete row of a setting and a seed."""
    setting, start = claims()[name][row["setting"]], cpu_seconds()
    for stage in setting.stages:
        workdir = perform(stage, row["seed"], data, runs)
    pretrained = len(setting.stages) > 1
    return row | dict(
        metric=setting.metric,
        value=round(measured(workdir, setting.metric), 6),
        pretraining_steps=PRETRAINING if pretrained else 0,
        tuning_steps=TUNING,
        cpu_seconds=round(cpu_seconds() - start),
    )


def mask_token_rows(rounds: int = 3) -> Iterator[dict]:
    """Yields operations and times of a step with and without mask tokens in the encoder.

    Operations are those of ViT-L/16 and the paper's decoder, which is traced but not run. Times are
    of the process on the CPU, of a small network; a round measures both kinds.
    """
    import jax

    from mim_jax import flops, recipe, schema
    from mim_jax.start import Start
    from mim_jax.train import jit_step

    steps = {}
    for kind in ("decoder", "encoder"):
        override = f"objective.mask_tokens={kind}"
        large = schema.load(
            str(ROOT / "configs/mae_large_800_pixels.py"),
            [override, "data.name=emoji", "data.evaluation_split=validation", "batch_size=8"],
        )
        run = recipe.build(large, jax.devices()[:1])
        count = flops.step_flops(Start(run, large).trace_step().jaxpr)
        yield dict(setting=f"{kind}: GFLOPs an image", seed=0, value=round(count / 8e9, 3))
        small = schema.load(
            str(ROOT / "configs/mae_emoji.py"),
            [override, "model.width=192", "model.depth=12", "model.heads=3", "model.patch=4"],
        )
        run = recipe.build(small, jax.devices()[:1])
        state = Start(run, small).state()
        batches = run.data.training_batches(8, seed=0, start=0, stop=1)
        step = jit_step(run.objective, run.optimizer, state, mesh=run.mesh)
        batch, rng = jax.device_put(next(batches)), jax.random.key(0)
        steps[kind] = [step, jax.block_until_ready(step(state, batch, rng)[0]), batch, rng]
    for i in range(rounds):
        for kind, (step, state, batch, rng) in steps.items():
            start = time.process_time()
            steps[kind][1] = jax.block_until_ready(step(state, batch, rng)[0])
            seconds = time.process_time() - start
            yield dict(setting=f"{kind}: ms an image", seed=i, value=round(seconds / 8e-3, 1))


def read(path: Path) -> list[dict]:
    """Reads the rows of a claim, [] if there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return [row | dict(seed=int(row["seed"])) for row in csv.DictReader(file)]


def append(path: Path, row: dict) -> None:
    """Appends a row to the file of a claim."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, HEAD)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def smallest_difference(groups: list[list[float]]) -> float:
    """Returns the half-width of a 95 % interval of a difference of two means; NaN if unknown.

    The variance is pooled over the groups that have several values.
    """
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return float("nan")
    total = sum((len(group) - 1) * statistics.variance(group) for group in several)
    count = min(map(len, several))
    quantile = next((t for df, t in sorted(T_95.items()) if df >= freedom), 2.0)
    if freedom < min(T_95):
        quantile = 12.706
    return quantile * (total / freedom * 2 / count) ** 0.5


def by_setting(rows: list[dict], metric: str = "") -> dict[str, list[float]]:
    """Returns the values of each setting, of one metric or of all."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if not metric or row["metric"] == metric:
            values.setdefault(row["setting"], []).append(float(row["value"]))
    return values


def table(name: str, rows: list[dict]) -> str:
    """Returns the results of a claim as a Markdown table, with the unfinished settings."""
    values, swept = by_setting(rows), name in claims()
    lines = ["| setting | mean | lowest, highest | seeds |", "|---|---|---|---|"]
    for setting in claims()[name] if swept else values:
        results = values.get(setting, [])
        seeds = f"{len(results)} of {len(SEEDS)}" if swept else str(len(results))
        if not results:
            lines.append(f"| {setting} | not yet run | | {seeds} |")
            continue
        mean = statistics.mean(results)
        ends = f"{min(results):.4g}, {max(results):.4g}"
        lines.append(f"| {setting} | {mean:.4g} | {ends} | {seeds} |")
    lines.append("")
    metrics = dict.fromkeys(row["metric"] for row in rows)
    for metric in metrics:
        limit = smallest_difference(list(by_setting(rows, metric).values()))
        known = f"{limit:.3g}" if limit == limit else "unknown, no setting has two values"
        lines.append(f"Smallest difference in {metric} that can be seen: {known}.")
    return "\n".join(lines)


def draw(name: str, rows: list[dict], path: Path) -> None:
    """Draws each seed as a point and the means as lines, in one panel per metric."""
    import matplotlib.pyplot as plt  # not a dependency: the tables do not need it

    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    groups = [by_setting(rows, metric) for metric in metrics]
    figure, panels = plt.subplots(
        len(metrics),
        1,
        figsize=(5, 0.9 * len(metrics) + 0.35 * sum(map(len, groups))),
        height_ratios=[len(group) + 1 for group in groups],
        layout="constrained",
        squeeze=False,
    )
    for axes, metric, values in zip(panels[:, 0], metrics, groups, strict=True):
        for i, results in enumerate(values.values()):
            axes.plot(results, [i] * len(results), "o", alpha=0.6)
            axes.plot([statistics.mean(results)] * 2, [i - 0.3, i + 0.3], color="black")
        axes.set_yticks(range(len(values)), values)
        axes.invert_yaxis()
        axes.set(xlabel=metric)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_title(name)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*claims(), "mask_tokens"])
    parser.add_argument("--data", type=Path, help="the folder of the data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"))
    parser.add_argument("--to", type=Path, default=Path("docs/results/claims"))
    parser.add_argument("--table", action="store_true", help="only print the table of the rows")
    flags = parser.parse_args(arguments)
    path = flags.to / f"{flags.name}.csv"
    finished = {(row["setting"], row["seed"]) for row in read(path)}
    if flags.name == "mask_tokens" and not finished and not flags.table:
        for row in mask_token_rows():
            append(path, row | dict(metric=row["setting"].split(": ")[1]))
    elif flags.name != "mask_tokens" and not flags.table:
        if not flags.data:
            parser.error("--data is required: the folder of the data sets")
        for row in sweep(flags.name):
            if (row["setting"], row["seed"]) not in finished:
                append(path, compute(flags.name, row, flags.data, flags.runs))
    rows = read(path)
    print(table(flags.name, rows))
    if rows:
        draw(flags.name, rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
