r"""Predicts the time of a training step on a TPU, by part of the network and kind of work.

    pip install -e '.[tpu]'
    python -m benchmarks.tpu_step --config=configs/mae_base.py --images=64

Does the same as `mim-jax plan --parts` for a given number of images per chip and accumulate=1, to
compare programs. mim_jax/plan/cost.py describes the predictions and their accuracy. `--text` writes
the compiled program to a file.
"""

import argparse
import sys
from pathlib import Path

from mim_jax import cli
from mim_jax.plan.__main__ import describe
from mim_jax.plan.cost import cost_of
from mim_jax.plan.hardware import FORM, target_of
from mim_jax.plan.step import Step, load


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a config file")
    parser.add_argument("--target", default="v5e:1x1", help=FORM)
    parser.add_argument("--images", type=int, default=64, help="per chip")
    parser.add_argument("--text", help="also write the compiled program to this file")
    options, overrides = cli.parse(parser, argv)
    return cli.exit_code(lambda: predict(options, overrides), "")


def predict(options: argparse.Namespace, overrides: list[str]) -> int:
    """Compiles the step and prints its predicted time."""
    target = target_of(options.target)
    batch = options.images * len(target.devices)
    keys = [f"batch_size={batch}", "accumulate=1", *overrides]
    step = Step(load(options.config, keys, target), target)
    print(f"{step.start.parameters:,} parameters\n{step.run.summary}", flush=True)
    if options.text:
        Path(options.text).write_text(step.compile().text)
    print(*describe(cost_of(step), parts=True), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
