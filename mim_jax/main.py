"""Trains a config, or continues a run that stopped.

    mim-jax train --config=configs/mae_emoji.py --workdir=runs/emoji
    mim-jax train --config=configs/mae_base.py --config.optimizer.base_lr=1e-4
    mim-jax train --config=configs/mae_base.py --smoke

The run directory holds config.json, metrics.jsonl, checkpoints/ and pictures/. Exit codes: 0 done,
1 failed, 2 a mistake of the user, reported in one sentence, 130 and 143 stopped by a signal after
saving.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mim_jax import UserError, cli, flops, objectives, recipe, schema, workdir
from mim_jax.checkpoint import Checkpoints
from mim_jax.experiment import pictures_of
from mim_jax.log import Log, format_metrics
from mim_jax.probe import Probe
from mim_jax.recipe import Run
from mim_jax.sheets import draw_sheet
from mim_jax.start import Start, claim_workdir
from mim_jax.train import TrainState, evaluate, train


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("train", __doc__)
    cli.add_config(parser)
    parser.add_argument("--workdir", default="", help="the run directory; default: runs/CONFIG")
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
        help="one of several processes; JAX finds the others on TPU pods, under Slurm and Open "
        "MPI; elsewhere pass ADDRESS:PORT,PROCESSES,PROCESS",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the config and the recipe's arithmetic"
    )
    options, overrides = cli.parse(parser, argv)
    path = cli.workdir_of(options)

    def command() -> int:
        if options.distributed is not None:
            join(options.distributed)
        config = schema.load(options.config, overrides, options.smoke, options.trust_code)
        if options.dry_run:
            print(config, recipe.build(config).summary, f"run directory: {path}", sep="\n")
            return 0
        return run_config(config, path, options.profile)

    return cli.exit_code(command, path)


def join(processes: str) -> None:
    """Makes this process one of several; with "" JAX finds the others.

    If one dies silently, the others end when its heartbeat has been missing for a minute.
    """
    if not processes:
        jax.distributed.initialize(heartbeat_timeout_seconds=60)
        return
    try:
        address, count, index = processes.split(",")
        numbers = int(count), int(index)
    except ValueError:
        raise UserError(
            f"--distributed={processes} must be ADDRESS:PORT,PROCESSES,PROCESS, for example "
            "localhost:1234,2,0."
        ) from None
    jax.distributed.initialize(address, numbers[0], numbers[1], heartbeat_timeout_seconds=60)


def run_config(config: ConfigDict, path: str, profile: str = "") -> int:
    """Trains from the newest checkpoint in the run directory, or from the start, to the end."""
    with Stop() as stop:
        return train_config(config, path, profile, stop)


def train_config(config: ConfigDict, path: str, profile: str, stop: "Stop") -> int:
    """Does what run_config describes, until a signal arrives. Returns the exit code."""
    run = recipe.build(config)
    run.require_labels(config.data.evaluation_split)
    start = Start(run, config)
    trace = Trace(profile, path)
    probe = probe_of(run, config)
    trajectory = claim_workdir(path, run, config, start.bytes)
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
    checkpoints = Checkpoints(path, config.save.keep, record)
    first = checkpoints.latest or 0
    state = checkpoints.restore(start.like) if first else start.state()
    if jax.process_index() == 0:  # the directory is ours now, and the run can start
        workdir.write(path, record)
    log = Log(
        path,
        step=first,
        steps=run.steps,
        batch_size=config.batch_size,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        warn=run.objective.warn,
        every={
            name: recipe.in_steps(config[name], "every", run.steps_per_epoch) for name in ACTIONS
        },
        devices=run.mesh.size,
        peak_share=peak_share(run, config),
    )
    log.say(f"{config.objective.name}: {start.parameters:,} parameters\n{run.summary}")
    log.unread(run.data.unread)
    if not first:
        values, problem = recipe.observe_values(run, config)
        log.say(values)
        if problem:
            raise UserError(problem)
    if first >= run.steps:
        log.say(f"{path} is complete: it is at step {first:,} of {run.steps:,}.")
        return 0
    if first:
        log.say(f"continuing after step {first:,}")
    log.event("start", first, record["devices"])
    try:
        training = Training(run, config, path, log, checkpoints, probe, stop)
        return training.loop(state, first, trace)
    except Exception as error:
        log.event("failed", log.last_step, str(error) or type(error).__name__)
        with contextlib.suppress(OSError):  # which would hide the first error
            checkpoints.close()  # after the save in progress
        raise


def peak_share(run: Run, config: ConfigDict) -> float:
    """Returns the share of a chip's peak that one image per second uses, 0 if it is unknown.

    Operations that rematerialization repeats do not count.
    """
    peak, network = flops.peak(jax.devices()[0].device_kind), run.model or run.tokenizer
    if not peak or not network or network.dtype != "bfloat16":
        return 0.0
    plain = config.copy_and_resolve_references()
    if "model" in plain:
        plain.model.remat = "none"
    networks = schema.networks(recipe.with_dtypes(plain, run.mesh))
    function = objectives.find(config.objective.name)
    objective = recipe.build_objective(plain, function, networks, run.data)
    step = Start(run._replace(objective=objective), plain).trace_step()
    return flops.of_step(step.jaxpr) / (config.batch_size / run.mesh.size) / peak


def probe_of(run: Run, config: ConfigDict) -> Probe | None:
    """Returns the probe that the config asks for."""
    if not config.probe.images:
        return None
    run.data.require_one_size()
    encoder, rows = recipe.encoder_of(run, config), run.rows
    return Probe(encoder, run.data, run.mesh, batch_size=rows, images=config.probe.images)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ACTIONS = ("evaluate", "probe", "pictures", "save")  # blocks of the config with an interval


class Training:
    """The loop of a run and its periodic actions: log, evaluate, probe, draw, save."""

    def __init__(
        self,
        run: Run,
        config: ConfigDict,
        path: str,
        log: Log,
        checkpoints: Checkpoints,
        probe: Probe | None,
        stop: "Stop",
    ):
        self.run, self.config, self.path = run, config, path
        self.log, self.checkpoints, self.probe, self.stop = log, checkpoints, probe, stop

    def loop(self, state: TrainState, first: int, trace: "Trace") -> int:
        """Trains from step `first` to the end or to a signal. Returns the exit code."""
        run, log, stop = self.run, self.log, self.stop
        steps = train(
            run.objective,
            run.optimizer,
            self.batches_from,
            state=state,
            mesh=run.mesh,
            steps=run.steps,
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            ema=self.config.ema,
        )
        rates = np.asarray(run.schedule(np.arange(run.steps)))  # at once: a step never waits
        log.say("compiling the first step")
        trace.after(first)
        for step, state, metrics in log.timed(steps):
            trace.after(step, metrics)
            stop.after(step)
            log.train(
                step,
                metrics,
                due=self.is_due(self.config.log, step),
                lr=float(rates[step - 1]),
                epoch=step / run.steps_per_epoch,
            )
            try:
                self.act(step, state, metrics)
            except StoppedError:
                log.say(f"interrupted after step {step:,}")
            self.save(step, state, metrics)
            if stop.signal:
                break
        trace.end(metrics)
        log.flush()
        self.checkpoints.close()
        if stop.signal and step < run.steps:
            log.say(f"stopped and saved after step {step:,}: run the same command to continue")
            log.event("stopped", step, f"by signal {stop.signal}")
            return 128 + stop.signal
        log.say(f"done: {self.path}")
        log.event("done", step)
        return 0

    def batches_from(self, step: int) -> Iterator[dict]:
        """Yields the batches after `step` updates."""
        batches = self.run.data.training_batches(
            self.config.batch_size,
            seed=self.config.seed,
            start=step,
            stop=self.run.steps,
            on_bad=self.log.bad_file,
        )
        return self.log.waited(batches)

    def is_due(self, block: ConfigDict, step: int) -> bool:
        """Returns whether the action of a block of the config follows a step."""
        every = recipe.in_steps(block, "every", self.run.steps_per_epoch)
        return step == self.run.steps or (every > 0 and step % every == 0)

    def act(self, step: int, state: TrainState, metrics: dict) -> None:
        """Evaluates, probes and draws, as far as it is due. Raises StoppedError after a signal."""
        run, config, log = self.run, self.config, self.log
        if self.is_due(config.evaluate, step):
            with log.pace.action("evaluate"):
                batches = run.data.evaluation_batches(
                    run.rows, limit=config.evaluate.limit, on_bad=log.bad_file
                )
                batches = self.stop.guard(batches)
                means = evaluate(run.objective, state, batches, mesh=run.mesh, seed=config.seed)
            log.flush()
            log.evaluation(step, means)
        if self.probe and self.is_due(config.probe, step):
            log.flush()
            with log.pace.action("probe"):
                means = self.probe(state, self.stop.guard)
            log.evaluation(step, means)
        if self.is_due(config.pictures, step) and config.pictures.count:
            with log.pace.action("pictures"):
                self.draw(step, state, metrics)

    def save(self, step: int, state: TrainState, metrics: dict) -> None:
        """Saves the state if that is due, or if the run stops here."""
        if not self.is_due(self.config.save, step) and not self.stop.signal:
            return
        self.log.flush()  # so that no record is missing if the process ends here
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss is {metrics['loss']} at step {step}: the newest checkpoint is from "
                "before. Try a lower optimizer.lr or base_lr, a longer warm-up, or "
                "optimizer.clip_norm=1."
            )
        with self.log.pace.action("save"):
            self.checkpoints.save(state)

    def draw(self, step: int, state: TrainState, metrics: dict) -> None:
        """Draws a sheet of the objective's pictures of the first images of the evaluation split."""
        run, name = self.run, self.config.objective.name
        columns = pictures_of(run, state, self.config.pictures.count, self.config.seed)
        if jax.process_index() == 0 and all(len(images) for images in columns.values()):
            draw_sheet(
                Path(self.path) / "pictures" / f"step_{step:07d}.png",
                columns,
                f"{name}, step {step:,}  {format_metrics(metrics)}",
                stretch=run.data.image.dtype != "uint8",
                legend=run.data.legend,
            )


class StoppedError(Exception):
    """A signal arrived during a periodic action."""


class Stop:
    """A context in which SIGINT, SIGTERM and SIGHUP stop a run after the step at hand.

    Until a step is done there is nothing to save: the process exits at once, even while it
    compiles. A second signal ends it at once too. In a notebook, where the process must go on,
    KeyboardInterrupt is raised instead. The previous handlers are restored at the end.

    SIGTERM may reach any of several processes: JAX notifies the others, and all stop after the
    same step.
    """

    def __init__(self):
        self.signal = 0
        self.unsaved = False  # whether a step was done
        self.previous: dict[int, Any] = {}
        self.exits = "ipykernel" not in sys.modules

    def __enter__(self) -> "Stop":
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            self.previous[number] = signal.signal(number, self.record)
        if self.exits:  # Python's handlers wait until a compilation ends; this thread does not
            reader, self.writer = os.pipe()
            os.set_blocking(self.writer, False)
            self.wakeup = signal.set_wakeup_fd(self.writer)
            threading.Thread(target=self.watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self.previous and self.exits:
            signal.set_wakeup_fd(self.wakeup)
            os.close(self.writer)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def record(self, number: int, frame) -> None:
        """Handles a signal in the main thread."""
        if not self.exits and (self.signal or not self.unsaved):
            raise KeyboardInterrupt
        self.signal = number

    def watch(self, reader: int) -> None:
        """Ends the process at the first signal if there is nothing to save, and at the second."""
        seen = 0
        while number := os.read(reader, 1):
            seen += number[0] in SIGNALS
            if number[0] in SIGNALS and (seen > 1 or not self.unsaved):
                print("stopped: nothing new was saved", file=sys.stderr, flush=True)
                os._exit(128 + number[0])
        os.close(reader)

    def after(self, step: int) -> None:
        """Notes that a step is done. Asks the other processes, if there are any."""
        self.unsaved = True
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM

    def guard(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yields the batches of a periodic action. Raises StoppedError after a signal."""
        for batch in batches:
            if self.signal and jax.process_count() == 1:  # several must do the same
                raise StoppedError
            yield batch


class Trace:
    """An xprof trace of the steps "FIRST:LAST", in the run's profile/."""

    def __init__(self, steps: str, path: str):
        self.folder = Path(path) / "profile"
        try:
            self.first, self.last = (int(step) for step in steps.split(":")) if steps else (0, 0)
        except ValueError:
            self.first, self.last = -1, -1
        if not (0 < self.first <= self.last or not steps):
            raise UserError(f"--profile={steps} must be FIRST:LAST, for example 100:105.")
        self.running = False

    def after(self, step: int, metrics: dict | None = None) -> None:
        """Starts before the first of the steps and ends when the last is computed."""
        if self.last and step == self.first - 1:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self.folder)
            self.running = True
        if step == self.last:
            self.end(metrics)

    def end(self, metrics: dict | None) -> None:
        """Ends the trace, also if its last step was not reached."""
        if self.running:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.running = False


if __name__ == "__main__":
    cli.exit_with(main)
