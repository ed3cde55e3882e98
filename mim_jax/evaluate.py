r"""Measures what a run has learned, on each example of its evaluation split or of another.

    python -m mim_jax.evaluate --config=runs/mae_base_finetune
    python -m mim_jax.evaluate --config=runs/mae_base_finetune --config.data.evaluation_split=test

--config is the folder of a run, or a config file with --config.init_from.encoder=RUN, a classifier
as that config describes, whether trained or converted. What is printed can also be written:
--to=FILE.json. Of a classifier there is a table by class. Exit codes: 0 done, 2 a mistake in what
was asked for.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mim_jax import command, recipe
from mim_jax.checkpoint import peek
from mim_jax.train import evaluate
from mim_jax.transfer import compare, config_of, facts


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.evaluate", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the folder of a run, or a config file")
    parser.add_argument("--to", default="", help="a .json to write")
    options, overrides = command.parse(parser, argv)
    return command.exit_code(lambda: measure(options.config, overrides, options.to), options.to)


def measure(run: str, overrides: list[str], to: str) -> int:
    """Prints and writes the means over the evaluation split."""
    config = command.here(recipe.load(run, overrides))
    this = recipe.build(config)
    command.need_labels(this, config)
    beginning = command.Beginning(this, config)
    if to:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).open("a").close()  # before the work, which is lost if this cannot be
    if command.trained(run, config, "encoder") == run:
        compare(facts(config), facts(config_of(run)), run)
        state = peek(run, beginning.like)
    else:
        state = beginning.state(entire=True)
    batches = this.data.evaluation_batches(this.rows)
    means = evaluate(this.objective, state, batches, mesh=this.mesh, seed=config.seed)
    numbers = {name: np.asarray(value).tolist() for name, value in means.items()}
    print(f"{run}, step {int(state.step):,}, split {config.data.evaluation_split}")
    for name, value in numbers.items():
        if not isinstance(value, list):
            print(f"{name:>20} {value:.4f}")
    if "by_class" in numbers:
        print("\n  class  of all  accuracy")
        for label, (share, accuracy) in enumerate(numbers["by_class"]):
            print(f"{label:>7} {share:7.2%} {accuracy:9.4f}")
    if to:
        Path(to).write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
