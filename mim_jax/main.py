"""Trains what a config describes, and goes on with a run that stopped.

    python -m mim_jax.main --config=configs/mae_emoji.py --workdir=runs/emoji
    python -m mim_jax.main --config=configs/mae_base.py --config.optimizer.base_lr=1e-4
    python -m mim_jax.main --config=configs/mae_base.py --smoke

A run's folder holds config.json, metrics.jsonl, checkpoints/ and pictures/. Exit codes: 0 done,
1 failed, 2 a mistake in what was asked for, in one sentence, 130 and 143 stopped by a signal and
saved.
"""

import argparse
import json
import os
import platform
import signal
import sys
import threading
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mim_jax import UserError, __version__, recipe
from mim_jax.checkpoint import Checkpoints
from mim_jax.command import Beginning, exit_code, make_folder, need_labels, parse
from mim_jax.log import Log, in_words
from mim_jax.pictures import draw_sheet
from mim_jax.probe import Probe
from mim_jax.sharding import replicated, to_global, whole
from mim_jax.train import TrainState, evaluate, train

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.main", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--workdir", default="", help="the run's folder; by default runs/CONFIG")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny model, built-in images, 20 steps"
    )
    parser.add_argument(
        "--profile", default="", help="FIRST:LAST step of an xprof trace, as 100:105"
    )
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="",
        help="one of several processes, which JAX finds on TPU pods, under Slurm and Open MPI; "
        "elsewhere say ADDRESS:PORT,PROCESSES,PROCESS",
    )
    options, overrides = parse(parser, argv)
    workdir = options.workdir or f"runs/{Path(options.config).stem}"

    def command() -> int:
        if options.distributed is not None:
            join(options.distributed)
        config = recipe.load(options.config, overrides, options.smoke)
        return run(config, workdir, options.profile)

    return exit_code(command, workdir)


def join(processes: str) -> None:
    """Makes this process one of several; "" lets JAX find the others.

    Where one dies in silence, the others end when its heart has not beaten for a minute.
    """
    try:
        address, count, this = processes.split(",") if processes else (None, None, None)
        numbers = (int(count), int(this)) if processes else (None, None)
    except ValueError:
        raise UserError(
            f"--distributed={processes}: say ADDRESS:PORT,PROCESSES,PROCESS, as localhost:1234,2,0."
        ) from None
    jax.distributed.initialize(address, *numbers, heartbeat_timeout_seconds=60)


def leave(code: int) -> NoReturn:
    """Ends the process. One of several that failed does not wait for those that wait for it."""
    if code in (1, 2) and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(config: ConfigDict, workdir: str, profile: str = "") -> int:
    """Trains from where the folder stands to the end; logs, evaluates, draws, saves on the way."""
    this = recipe.build(config)
    need_labels(this, config)
    beginning = Beginning(this, config)
    trace = Trace(profile, workdir)
    probe = None
    if config.probe.images:
        rows = dict(batch_size=this.rows, images=config.probe.images)
        probe = Probe(recipe.encoder(config), this.data, this.mesh, **rows)
    about = record(config, this, make_folder(config, this, workdir, beginning.bytes))
    checkpoints = Checkpoints(workdir, config.save.keep, about)
    start = checkpoints.latest or 0
    state = checkpoints.restore(beginning.like) if start else beginning.state()
    note(about, workdir)  # now that the folder is ours, and the run can begin
    log = Log(
        workdir, step=start, steps=this.steps, batch_size=config.batch_size,
        tensorboard=config.log.tensorboard, wandb=config.log.wandb, warn=this.objective.warn,
    )  # fmt: skip
    log.say(f"{config.objective.name}: {beginning.parameters:,} parameters\n{this.story}")
    log.unread(this.data.unread)
    if start >= this.steps:
        log.say(f"{workdir} is done: it stands at step {start:,} of {this.steps:,}.")
        return 0
    if start:
        log.say(f"going on after step {start:,}")

    def due(block: ConfigDict) -> bool:
        every = recipe.in_steps(block, "every", this.steps_per_epoch)
        return step == this.steps or (every > 0 and step % every == 0)

    def batches_from(step: int):
        return log.waited(
            this.data.training_batches(
                config.batch_size,
                seed=config.seed,
                start=step,
                stop=this.steps,
                on_bad=log.bad_file,
            )
        )

    steps = train(
        this.objective, this.optimizer, batches_from, state=state, mesh=this.mesh,
        steps=this.steps, seed=config.seed, accumulate=config.accumulate, ema=config.ema,
    )  # fmt: skip
    lr = np.asarray(this.schedule(np.arange(this.steps)))  # at once: no step waits for its own
    stop = Stop()
    log.say("compiling the first step")
    trace.after(start)
    for step, state, metrics in log.timed(steps):
        trace.after(step, metrics)
        stop.after(step)
        log.train(
            step, metrics, due=due(config.log),
            lr=float(lr[step - 1]), epoch=step / this.steps_per_epoch,
        )  # fmt: skip
        if due(config.evaluate):
            batches = this.data.evaluation_batches(
                this.rows, limit=config.evaluate.limit, on_bad=log.bad_file
            )
            means = evaluate(this.objective, state, batches, mesh=this.mesh, seed=config.seed)
            log.flush()
            log.evaluation(step, means)
        if probe and due(config.probe):
            log.flush()
            log.evaluation(step, probe(state))
        if due(config.pictures) and config.pictures.count:
            path = Path(workdir) / "pictures" / f"step_{step:07d}.png"
            draw(this, state, config, path, f"step {step:,}  {in_words(metrics)}")
        if due(config.save) or stop.signal:
            log.flush()  # so that no record is missing if this is the last that is heard of it
            if not np.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']} at step {step}.")
            checkpoints.save(state)
        if stop.signal:
            break
    trace.end(metrics)
    log.flush()
    checkpoints.close()
    if stop.signal and step < this.steps:
        log.say(f"stopped and saved after step {step:,}: the same command goes on from here")
        return 128 + stop.signal
    log.say(f"done: {workdir}")
    return 0


def record(config: ConfigDict, this: recipe.Run, trajectory: dict) -> dict:
    """What a run's config.json says, and its checkpoints."""
    return dict(
        config=config.to_dict(),
        trajectory=trajectory,
        versions={"python": platform.python_version(), "mim-jax": __version__}
        | {name: version(name) for name in PACKAGES},
        devices=f"{this.mesh.size} x {jax.devices()[0].device_kind}",
    )


def note(about: dict, workdir: str) -> None:
    """Writes config.json."""
    if jax.process_index() == 0:
        path = Path(workdir) / "config.json"
        part = path.with_suffix(".part")  # the other processes read it at any moment
        part.write_text(json.dumps(about, indent=2) + "\n")
        part.replace(path)


def draw(this: recipe.Run, state: TrainState, config: ConfigDict, path: Path, said: str) -> None:
    """A sheet of what the objective makes of the first images of the evaluation split."""
    count = -(-config.pictures.count // this.mesh.size) * this.mesh.size
    batch = to_global(next(this.data.evaluation_batches(count, limit=count)), this.mesh)
    pictures = jax.jit(this.objective.pictures, out_shardings=replicated(this.mesh))
    params, buffers = whole((state.averaged, state.buffers), this.mesh)
    columns = pictures(params, buffers, batch, jax.random.key(config.seed))
    counts = np.asarray(whole(batch["mask"], this.mesh)) > 0  # else padding, or a bad file
    columns = {caption: np.asarray(images)[counts] for caption, images in columns.items()}
    if jax.process_index() == 0 and counts.any():
        title, stretch = f"{config.objective.name}, {said}", this.data.dtype != "uint8"
        draw_sheet(path, columns, title, stretch=stretch)


class Stop:
    """Whether SIGINT or SIGTERM came; a second one ends the process at once.

    Of several processes any may get SIGTERM: JAX notifies the others, and all stop after one step.
    """

    def __init__(self):
        self.signal = 0
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def after(self, step: int) -> None:
        """Asks the other processes."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM


class Trace:
    """An xprof trace of some steps, asked for as "FIRST:LAST", under the run's profile/."""

    def __init__(self, steps: str, workdir: str):
        self.folder = Path(workdir) / "profile"
        try:
            self.first, self.last = (int(step) for step in steps.split(":")) if steps else (0, 0)
        except ValueError:
            self.first, self.last = -1, -1
        if not (0 < self.first <= self.last or not steps):
            raise UserError(f"--profile={steps}: say FIRST:LAST, as --profile=100:105.")
        self.begun = False

    def after(self, step: int, metrics: dict | None = None) -> None:
        """Begins before the first of the steps, ends when the last is computed."""
        if self.last and step == self.first - 1:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self.folder)
            self.begun = True
        if step == self.last:
            self.end(metrics)

    def end(self, metrics: dict) -> None:
        """Also of a trace whose last step did not come."""
        if self.begun:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.begun = False


if __name__ == "__main__":
    try:
        leave(main())
    except Exception:
        traceback.print_exc()
        leave(1)
