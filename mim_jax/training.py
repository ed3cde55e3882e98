"""A run from its newest checkpoint to its end: the loop and its periodic actions."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from shlex import quote

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mim_jax import UserError, flops, recipe, workdir
from mim_jax.checkpoint import Checkpoints
from mim_jax.checkpoint.trees import flat
from mim_jax.divergence import ADVICE, Failures, RollbackError, Spikes, all_finite, data_step
from mim_jax.experiment import pictures_of
from mim_jax.goodput import Goodput
from mim_jax.log import Log, format_metrics
from mim_jax.probe import Probe
from mim_jax.progress import Bar, images_in, track
from mim_jax.recipe import Run
from mim_jax.sheets import draw_sheet
from mim_jax.start import Start, model_flops
from mim_jax.stop import Stop, StoppedError
from mim_jax.train import TrainState, evaluate, train
from mim_jax.watchdog import Watchdog

ACTIONS = ("evaluate", "probe", "pictures", "save")  # blocks of the config with an interval


class Trace:
    """An xprof trace of the steps "FIRST:LAST", in the run's profile/."""

    def __init__(self, steps: str, path: str, last: int):
        self.path, self.staging = path, contextlib.ExitStack()
        try:
            self.first, self.last = (int(step) for step in steps.split(":")) if steps else (0, 0)
        except ValueError:
            self.first, self.last = -1, -1
        if not (0 < self.first <= self.last or not steps):
            raise UserError(f"--profile={steps} must be FIRST:LAST, for example 100:105.")
        if self.first > last:
            raise UserError(f"--profile={steps}: the run ends after step {last:,}.")
        self.running = False

    def after(self, step: int, metrics: dict | None = None) -> None:
        """Starts the trace before the first step, and ends it when the last is computed."""
        if self.last and step == self.first - 1:
            jax.block_until_ready(metrics)
            folder = workdir.staged(workdir.open_path(self.path) / "profile")
            jax.profiler.start_trace(self.staging.enter_context(folder))
            self.running = True
        if step == self.last:
            self.end(metrics)

    def end(self, metrics: dict | None) -> None:
        """Ends the trace, also if its last step was not reached."""
        if self.running:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.staging.close()
            self.running = False


class Training:
    """The training loop of a run with its periodic actions: log, evaluate, probe, draw, save."""

    def __init__(
        self,
        run: Run,
        config: ConfigDict,
        path: str,
        start: Start,
        checkpoints: Checkpoints,
        probe: Probe | None,
        stop: Stop,
        watchdog: Watchdog,
        goodput: Goodput,
    ):
        self.run, self.config, self.path, self.start = run, config, path, start
        self.checkpoints, self.probe, self.stop = checkpoints, probe, stop
        self.watchdog, self.goodput = watchdog, goodput
        goodput.add_earlier(workdir.read_lines(workdir.open_path(path) / "metrics.jsonl"))
        self.peak_share = peak_share(run, config)
        self.skips: list[tuple[int, int]] = []  # windows of data that this process left out
        self.log = self.log_after(checkpoints.latest or 0)
        self.failures: Failures  # set by `loop`

    def train_to_end(self, trace: Trace) -> int:
        """Trains to the end, and returns the exit code. Rolls back after repeated failures.

        Raises FloatingPointError after `divergence.rollbacks` rollbacks, or if there is no
        checkpoint to return to.
        """
        run, config, log = self.run, self.config, self.log
        first = self.checkpoints.latest or 0
        state = self.state()
        renew = first < run.steps or not workdir.is_run(self.path)
        if renew and jax.process_index() == 0:  # the directory is locked, the state restored
            workdir.write(self.path, self.checkpoints.record)
        log.say(f"{config.objective.name}: {self.start.parameters:,} parameters\n{run.summary}")
        log.unread(run.data.unread)
        if not first:
            values, problem = recipe.observe_values(run, config)
            log.say(values)
            if problem:
                raise UserError(problem)
        unfinished = self.unfinished(first)
        if first >= run.steps and not unfinished:
            log.say(
                f"{self.path} is complete: it is at step {first:,} of {run.steps:,}. To train "
                "longer, pass --config.steps=N --change=steps."
            )
            return 0
        if first:
            log.say(f"continuing after step {first:,}")
            for change in self.checkpoints.record.get("history", [])[-1:]:
                for key, (old, new) in change["changes"].items():
                    log.say(f"{key} was changed from {old!r} to {new!r}")
        log.event("start", first, self.checkpoints.record["devices"])
        try:
            self.act(first, state, {}, unfinished)
        except StoppedError:
            return self.end(first)
        if first >= run.steps:
            return self.end(first)
        for rollbacks in itertools.count():
            try:
                return self.loop(state, first, trace)
            except RollbackError as error:
                if rollbacks == config.divergence.rollbacks:
                    raise FloatingPointError(f"{error}. {ADVICE}.") from None
                self.goodput.begin("start")
                first = self.roll_back(error, first)
                state = self.state()
        raise AssertionError

    def unfinished(self, step: int) -> list[str]:
        """Returns the actions of a step that a signal prevented and that are still to be done.

        All processes use the result of process 0, which reads the run's records.
        """
        names = [name for name in self.due(step) if name in self.checkpoints.unfinished]
        if not names:
            return []
        path = workdir.open_path(self.path)
        done = {
            "probe" if key.startswith("evaluate/probe_") else "evaluate"
            for record in workdir.read_lines(path / "metrics.jsonl")
            for key in record
            if record.get("step") == step and key.startswith("evaluate/")
        }
        if picture_of(path, step).exists():
            done.add("pictures")
        flags = multihost_utils.broadcast_one_to_all(np.array([name not in done for name in names]))
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    def state(self) -> TrainState:
        """Returns the newest saved state, or the initial one."""
        if not self.checkpoints.latest:
            self.checkpoints.largest = []
            return self.start.state()
        state = self.checkpoints.restore(self.start.like)
        known = self.checkpoints.skips
        self.checkpoints.skips = known + [skip for skip in self.skips if skip not in known]
        return state

    def roll_back(self, error: RollbackError, first: int) -> int:
        """Returns the step of the checkpoint to return to, and skips the data up to the failure.

        If every step since `first` failed, the checkpoint of `first` is not used again.
        """
        self.checkpoints.set_aside(after=error.last_good)
        if first and error.last_good == first:
            self.checkpoints.set_aside(after=first - 1)
            if not self.checkpoints.latest:
                raise FloatingPointError(f"{error}, and there is no older checkpoint. {ADVICE}.")
        back = self.checkpoints.latest or 0
        self.skips = [skip for skip in self.skips if skip[0] <= back]
        self.skips.append((back, error.step - back))
        self.checkpoints.skips = list(self.skips)
        self.log.flush()
        text = f"{error}: returning to step {back:,}, without the data of these steps"
        self.log.say(f"warning: {text}")
        self.log.event("rollback", error.step, text)
        self.log = self.log_after(back)
        return back

    def log_after(self, step: int) -> Log:
        """Returns a log that continues after a step."""
        run, config = self.run, self.config
        return Log(
            self.path,
            step=step,
            steps=run.steps,
            batch_size=config.batch_size,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            trackio=config.log.trackio,
            warn=run.objective.warn,
            every={
                name: recipe.in_steps(config[name], "every", run.steps_per_epoch)
                for name in ACTIONS
            },
            devices=run.mesh.size,
            peak_share=self.peak_share,
            goodput=self.goodput,
        )

    def failures_after(self, step: int) -> Failures:
        """Returns a monitor of the losses after a step."""

        def names_of(step: int) -> list[str]:
            position = data_step(step - 1, self.checkpoints.skips)
            names = self.run.data.training_names
            return names(self.config.batch_size, seed=self.config.seed, step=position)

        def say(step: int, text: str) -> None:
            self.log.say(f"warning: step {step:,}: {text}")
            self.log.event("failure", step, text)

        return Failures(
            self.path,
            first=step,
            patience=self.config.divergence.patience,
            names_of=names_of,
            skips=self.checkpoints.skips,
            say=say,
            spikes=Spikes(self.config.divergence.spike, self.checkpoints.largest),
        )

    def loop(self, state: TrainState, first: int, trace: Trace) -> int:
        """Trains from step `first` to the end or to a signal. Returns the exit code."""
        run, log, stop = self.run, self.log, self.stop
        failures = self.failures = self.failures_after(first)
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
            limits=failures.limits,
        )
        rates = np.asarray(run.schedule(np.arange(run.steps)))  # computed once, before the loop
        log.say("compiling the first step")
        self.goodput.begin("compile")
        trace.after(first)
        steps = self.with_bar(self.watchdog.each("a step", log.timed(steps)), first)
        for step, state, metrics in steps:
            self.goodput.begin("step")
            trace.after(step, metrics)
            stop.after(step)
            failures.after(step, metrics)
            log.train(
                step,
                metrics,
                due=self.is_due(self.config.log, step),
                lr=float(rates[step - 1]),
                epoch=step / run.steps_per_epoch,
            )
            if step == run.steps:
                failures.finish(run.steps - first)
            try:
                self.act(step, state, metrics, self.due(step))
            except StoppedError:
                log.say(f"interrupted after step {step:,}")
            self.save(step, state)
            if stop.signal:
                break
        trace.end(metrics)
        return self.end(step)

    def end(self, step: int) -> int:
        """Waits until everything is written. Returns the exit code after the last step."""
        log, number = self.log, self.stop.signal
        log.flush()
        with self.watchdog.during("a save"), self.goodput.during("save"):
            self.checkpoints.close()
        log.times(step)
        if number and (step < self.run.steps or self.checkpoints.unfinished):
            log.say(f"stopped and saved after step {step:,}: run the same command to continue")
            log.event("stopped", step, f"by signal {number}")
            return 128 + number
        log.say(f"done: {self.path}; for curves and pictures: mim-jax report {quote(self.path)}")
        log.event("done", step)
        return 0

    def with_bar(self, steps: Iterator[tuple], first: int) -> Iterator[tuple]:
        """Yields the steps after `first` and shows a bar on a terminal."""
        with Bar("compiling", self.run.steps, unit="steps", first=first, lines=False) as bar:
            for result in steps:
                bar.set_description("training", refresh=False)
                bar.update(result[0] - bar.n)
                yield result

    def record_end(self, code: int, reason: str) -> None:
        """Records that this process ends at once, by a signal, a stall, or another process."""
        self.log.event("stopped" if code > 128 else "failed", self.log.last_step, reason)

    def batches_from(self, step: int) -> Iterator[dict]:
        """Yields the batches after `step` updates."""
        position = data_step(step, self.checkpoints.skips)
        batches = self.run.data.training_batches(
            self.config.batch_size,
            seed=self.config.seed,
            start=position,
            stop=position + self.run.steps - step,
            on_bad=self.log.bad_file,
        )
        return self.watchdog.each("a batch", self.log.waited(batches))

    def guard(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yields the batches of a periodic action, until a signal or a stall."""
        batches = self.watchdog.each("an evaluation", self.stop.guard(batches))
        return track(batches, "evaluating", unit="images", count=images_in)

    def is_due(self, block: ConfigDict, step: int) -> bool:
        """Returns whether the action of a block of the config follows a step."""
        every = recipe.in_steps(block, "every", self.run.steps_per_epoch)
        return step == self.run.steps or (every > 0 and step % every == 0)

    def due(self, step: int) -> list[str]:
        """Returns the names of the actions that follow a step, except saving."""
        due = [name for name in ACTIONS if self.is_due(self.config[name], step)]
        unused = {"save"} if self.probe else {"save", "probe"}
        unused |= set() if self.config.pictures.count else {"pictures"}
        return [name for name in due if name not in unused]

    def act(self, step: int, state: TrainState, metrics: dict, due: Sequence[str]) -> None:
        """Performs the actions that are due. Raises StoppedError after a signal.

        Actions that a signal prevents are stored with the checkpoint and done at the next start.
        """
        run, config, log = self.run, self.config, self.log
        for count, name in enumerate(due):
            self.checkpoints.unfinished = list(due[count:])
            log.flush()
            with log.action(name):
                if name == "evaluate":
                    batches = run.data.evaluation_batches(
                        run.rows, limit=config.evaluate.limit, on_bad=log.bad_file
                    )
                    batches = self.guard(batches)
                    means = evaluate(run.objective, state, batches, mesh=run.mesh, seed=config.seed)
                elif name == "probe" and self.probe:
                    means = self.probe(state, self.guard)
                else:
                    with self.watchdog.during("pictures"):
                        self.draw(step, state, metrics)
                    continue
            log.evaluation(step, means)
        self.checkpoints.unfinished = []

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state if that is due, or if the run stops now.

        Raises FloatingPointError if the state is not finite.
        """
        if not self.is_due(self.config.save, step) and not self.stop.signal:
            return
        self.log.flush()  # so that no record is missing if the process ends here
        self.log.store()
        self.failures.check()
        self.checkpoints.largest = list(self.failures.spikes.largest)
        flags = flat(jax.device_get(all_finite(state)))
        if names := [name for name, finite in flags.items() if not finite]:
            raise FloatingPointError(
                f"{names[0]} is not finite after step {step:,}, although the loss is. {ADVICE}."
            )
        with self.log.action("save"), self.watchdog.during("a save"):
            self.checkpoints.save(state)
        self.log.times(step)

    def draw(self, step: int, state: TrainState, metrics: dict) -> None:
        """Draws the objective's pictures of the first evaluation images as a PNG file."""
        run, name = self.run, self.config.objective.name
        columns = pictures_of(run, state, self.config.pictures.count, self.config.seed)
        if jax.process_index() == 0 and all(len(images) for images in columns.values()):
            draw_sheet(
                picture_of(workdir.open_path(self.path), step),
                columns,
                f"{name}, step {step:,}  {format_metrics(metrics) if metrics else ''}",
                stretch=run.data.image.dtype != "uint8",
                legend=run.data.legend,
            )


def picture_of(folder: epath.Path, step: int) -> epath.Path:
    """Returns the path of the sheet of pictures after a step."""
    return folder / "pictures" / f"step_{step:07d}.png"


def peak_share(run: Run, config: ConfigDict) -> float:
    """Returns the share of a chip's peak that one image per second uses, or 0 if unknown."""
    peak = flops.peak(jax.devices()[0].device_kind)
    if not peak or run.dtype != "bfloat16":
        return 0.0
    return model_flops(run, config) / (config.batch_size / run.mesh.size) / peak
