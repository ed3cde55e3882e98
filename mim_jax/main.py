"""Trains a config, or continues a run that stopped.

    mim-jax train --config=configs/mae_emoji.py --workdir=runs/emoji
    mim-jax train --config=configs/mae_base.py --config.optimizer.base_lr=1e-4
    mim-jax train --config=configs/mae_base.py --smoke

The run directory holds config.json, metrics.jsonl, checkpoints/ and pictures/. Exit codes: 0 done,
1 failed, 2 user error, reported in one sentence, 130 and 143 stopped by a signal after saving.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Collection
from typing import Any

import jax
from ml_collections import ConfigDict

from mim_jax import cli, objectives, processes, recipe, schema, workdir
from mim_jax.checkpoint import Checkpoints
from mim_jax.checkpoint.files import has_checkpoints
from mim_jax.goodput import Goodput, process_age
from mim_jax.probe import Probe
from mim_jax.recipe import Run
from mim_jax.start import Start, claim_workdir, require_runs, sources_of
from mim_jax.stop import Stop
from mim_jax.training import Trace, Training
from mim_jax.watchdog import Watchdog


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("train", __doc__)
    cli.add_config(parser)
    parser.add_argument(
        "--workdir",
        default="",
        help="the run directory; default: runs/CONFIG, or runs/CONFIG_smoke with --smoke",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny model, built-in images, 20 steps"
    )
    parser.add_argument(
        "--profile", default="", help="steps of an xprof trace, FIRST:LAST, for example 100:105"
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="",
        help="one of several processes; JAX finds the others on TPU pods, under Slurm and Open "
        "MPI; elsewhere pass ADDRESS:PORT,PROCESSES,PROCESS",
    )
    parser.add_argument(
        "--change",
        default="",
        metavar="KEYS",
        help="keys, separated by commas, whose values may differ from those of the existing run",
    )
    parser.add_argument(
        "--from-step", type=int, default=0, help="continue from the checkpoint of this step"
    )
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=0,
        help="save and stop after this many minutes, like SIGTERM; 0: never",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the config and a summary of the recipe"
    )
    options, overrides = cli.parse(parser, argv)
    if not options.max_minutes >= 0:  # also NaN
        parser.error(f"--max-minutes={options.max_minutes:g} must be at least 0")
    path = cli.workdir_of(options)

    def command() -> int:
        if options.distributed is not None:
            processes.join(options.distributed)
        config = schema.load(options.config, overrides, options.smoke, options.trust_code)
        if options.dry_run:
            run = recipe.build(config)
            if not has_checkpoints(path):  # a run that has begun no longer reads its sources
                require_runs(sources_of(config))
            Start(run, config).trace_step()  # raises the mistakes that the first step would
            keys = (f"{key} = {value!r}" for key, value in schema.flatten(config).items())
            print(*keys, "", run.summary, f"run directory: {path}", sep="\n")
            return 0
        if options.max_minutes:
            stop_after(options.max_minutes)
        change = [key for key in options.change.split(",") if key]
        return run_config(config, path, options.profile, change, options.from_step)

    return cli.exit_code(command, path)


def stop_after(minutes: float) -> None:
    """Sends SIGTERM to this process after some minutes."""
    seconds = min(60 * minutes, threading.TIMEOUT_MAX)
    terminate = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    terminate.daemon = True
    terminate.start()


def run_config(
    config: ConfigDict,
    path: str,
    profile: str = "",
    change: Collection[str] = (),
    from_step: int = 0,
) -> int:
    """Trains to the end, from a checkpoint in the run directory or from the start.

    Args:
        config: the complete config.
        path: the run directory.
        profile: steps to trace, "FIRST:LAST"; "" for none.
        change: keys whose values may differ from those of the run that is continued.
        from_step: step of the checkpoint to continue from; 0: the newest.

    Returns:
        The exit code.
    """
    with Stop() as stop:
        return train_config(config, path, profile, change, from_step, stop)


def train_config(
    config: ConfigDict, path: str, profile: str, change: Collection[str], from_step: int, stop: Stop
) -> int:
    """Implements `run_config`, until a signal arrives."""
    goodput = Goodput(process_age() if cli.owns_process else 0.0)
    run = recipe.build(config)
    run.require_labels(config.data.evaluation_split)
    start, trace, probe = Start(run, config), Trace(profile, path, run.steps), probe_of(run, config)
    trajectory, history = claim_workdir(path, run, config, start.bytes, change)
    record = record_of(run, config, trajectory) | (dict(history=history) if history else {})
    checkpoints = Checkpoints(path, config.save.keep, record)
    if from_step:
        checkpoints.return_to(from_step)
    watchdog = Watchdog(config.stall_minutes)
    training = Training(run, config, path, start, checkpoints, probe, stop, watchdog, goodput)
    try:
        with watchdog, processes.recording(training.record_end):
            return training.train_to_end(trace)
    except Exception as error:
        training.log.event("failed", training.log.last_step, str(error) or type(error).__name__)
        if cli.is_loss_of_process(error):  # a save in progress would wait for it
            checkpoints.abandon()
        with contextlib.suppress(OSError):  # so that it does not hide the first error
            checkpoints.close()  # after the save in progress
        raise


def record_of(run: Run, config: ConfigDict, trajectory: dict[str, Any]) -> dict[str, Any]:
    """Returns the record for config.json and the checkpoints of a run."""
    record = workdir.record_of(
        config.to_dict(),
        trajectory,
        devices=f"{run.mesh.size} x {jax.devices()[0].device_kind}",
        code=objectives.code_of(config.objective.name),
    )
    record["git"] = workdir.git_state()
    record["data"] = dict(
        images=run.data.examples,
        evaluation_images=len(run.data.evaluation.examples),
        class_names=list(run.data.class_names),
        class_colors=run.data.segmentation_colors,
    )
    return record


def probe_of(run: Run, config: ConfigDict) -> Probe | None:
    """Returns the probe that the config describes."""
    if not config.probe.images:
        return None
    run.data.require_one_size()
    encoder, rows = recipe.encoder_of(run, config), run.rows
    return Probe(encoder, run.data, run.mesh, batch_size=rows, images=config.probe.images)


if __name__ == "__main__":
    cli.exit_with(main)
