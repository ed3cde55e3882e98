r"""Evaluates a run on every example of its evaluation split, or of another split.

    mim-jax evaluate runs/mae_base_finetune
    mim-jax evaluate runs/mae_base_finetune --config.data.evaluation_split=test

--config is a run directory, or a config file with --config.init_from.encoder=RUN, where RUN is a
trained or converted classifier with the network of that config. --to=FILE.json also writes the
results to a file. If there are classes, results by class are printed. Exit codes: 0 done, 2 user
error.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mim_jax import cli, recipe, schema, workdir
from mim_jax.checkpoint.saved import peek
from mim_jax.data.class_names import list_names
from mim_jax.progress import images_in, track
from mim_jax.start import Start, source_run
from mim_jax.train import evaluate
from mim_jax.transfer import compare, encoder_in

MEASURES = ("accuracy", "IoU")  # columns of by_class after the share


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("evaluate", __doc__)
    cli.add_config(parser, "a run directory, or a config file")
    parser.add_argument("--to", default="", help="a .json file to write")
    options, overrides = cli.parse(parser, argv, cli.TRAINING_KEYS)
    cli.require_suffix(parser, options.to, ".json")

    def command() -> int:
        config = schema.load(options.config, overrides, trust_code=options.trust_code)
        return evaluate_run(options.config, recipe.fit_to_devices(config), options.to)

    return cli.exit_code(command, options.to)


def evaluate_run(path: str, config, to: str) -> int:
    """Prints and writes the results on the evaluation split, and returns the exit code."""
    source = source_run(path, config, "encoder")
    class_names = workdir.class_names_of(workdir.read(source))
    run = recipe.build(config, class_names=class_names)
    run.require_labels(config.data.evaluation_split)
    start = Start(run, config)
    if to:  # opened early, so that no work is lost if it cannot be written
        workdir.create(to)
    if source == path:
        compare(encoder_in(config.to_dict()), encoder_in(workdir.read(path)["config"]), path)
        state = peek(path, start.like)
    else:
        state = start.state(strict=True)
    count = len(run.data.evaluation.examples)
    batches = run.data.evaluation_batches(run.rows)
    batches = track(batches, "evaluating", count, unit="images", count=images_in)
    means = evaluate(run.objective, state, batches, mesh=run.mesh, seed=config.seed)
    metrics = {name: np.asarray(value).tolist() for name, value in means.items()}
    print(f"{path}, step {int(state.step):,}, split {config.data.evaluation_split}")
    if names := run.data.class_names:
        print(f"{len(names):,} classes: {list_names(names)}")
    if run.labeled and not class_names:
        print(
            f"warning: {source} does not record the names of its classes: assuming this order",
            file=sys.stderr,
        )
    for name, value in metrics.items():
        if not isinstance(value, list):
            print(f"{name:>20} {value:.4f}")
    if "by_class" in metrics:
        print_classes(metrics["by_class"], run.data.class_names)
    if to:
        workdir.open_path(to).write_text(json.dumps(without_nan(metrics), indent=1) + "\n")
    return 0


def without_nan(values: Any) -> Any:
    """Returns nested values with NaN replaced by None, because JSON has no NaN."""
    if isinstance(values, dict):
        return {name: without_nan(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_nan(value) for value in values]
    return None if math.isnan(values) else values


def print_classes(rows: list[list[float]], names: Sequence[str]) -> None:
    """Prints shares and measures of each class, "-" where a class does not occur."""
    names = names or range(len(rows))
    width = max(7, *(len(str(name)) for name in names))
    print(
        f"\n{'class':>{width}}  of all"
        + "".join(f"{name:>10}" for name in MEASURES[: len(rows[0]) - 1])
    )
    for name, (share, *measures) in zip(names, rows, strict=True):
        values = "".join(f"{'-' if math.isnan(x) else f'{x:.4f}':>10}" for x in measures)
        print(f"{name:>{width}} {share:7.2%}{values}")


if __name__ == "__main__":
    cli.exit_with(main)
