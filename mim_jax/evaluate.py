r"""Evaluates a run on every example of its evaluation split, or of another split.

    python -m mim_jax.evaluate --config=runs/mae_base_finetune
    python -m mim_jax.evaluate --config=runs/mae_base_finetune --config.data.evaluation_split=test

--config is a run directory, or a config file with --config.init_from.encoder=RUN: a classifier as
that config describes it, trained or converted. --to=FILE.json also writes the numbers. For a
classifier a table by class is printed. Exit codes: 0 done, 2 a mistake of the user.
"""

import json
from pathlib import Path

import numpy as np

from mim_jax import cli, recipe, schema, workdir
from mim_jax.checkpoint import peek
from mim_jax.start import Start, source_run
from mim_jax.train import evaluate
from mim_jax.transfer import compare, encoder_in


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("evaluate", __doc__)
    cli.add_config(parser, "a run directory, or a config file")
    parser.add_argument("--to", default="", help="a .json file to write")
    options, overrides = cli.parse(parser, argv)

    def command() -> int:
        config = schema.load(options.config, overrides, trust_code=options.trust_code)
        return evaluate_run(options.config, recipe.fit_to_devices(config), options.to)

    return cli.exit_code(command, options.to)


def evaluate_run(path: str, config, to: str) -> int:
    """Prints and writes the means over the evaluation split."""
    run = recipe.build(config)
    run.require_labels(config.data.evaluation_split)
    start = Start(run, config)
    if to:  # open the file before the work, which would be lost if it cannot be written
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).open("a").close()
    if source_run(path, config, "encoder") == path:
        compare(encoder_in(config.to_dict()), encoder_in(workdir.read(path)["config"]), path)
        state = peek(path, start.like)
    else:
        state = start.state(entire=True)
    batches = run.data.evaluation_batches(run.rows)
    means = evaluate(run.objective, state, batches, mesh=run.mesh, seed=config.seed)
    metrics = {name: np.asarray(value).tolist() for name, value in means.items()}
    print(f"{path}, step {int(state.step):,}, split {config.data.evaluation_split}")
    for name, value in metrics.items():
        if not isinstance(value, list):
            print(f"{name:>20} {value:.4f}")
    if "by_class" in metrics:
        print("\n  class  of all  accuracy")
        for label, (share, accuracy) in enumerate(metrics["by_class"]):
            print(f"{label:>7} {share:7.2%} {accuracy:9.4f}")
    if to:
        Path(to).write_text(json.dumps(metrics, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.exit_with(main)
