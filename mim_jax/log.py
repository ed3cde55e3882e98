"""Logging of a run: lines on the screen, metrics in metrics.jsonl, and events in events.jsonl.

metrics.jsonl: one JSON object per record of training or of an evaluation.
events.jsonl: one JSON object per start, warning and end: {"time", "step", "event", "text"}.
evaluation.json: the newest evaluation, with its arrays, such as results by class.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from mim_jax import UserError
from mim_jax.goodput import KINDS, Goodput
from mim_jax.progress import write_line
from mim_jax.workdir import append_to, keep_lines, open_path, read_lines, storage_of, write_text


class Pace:
    """Durations of the periodic actions of a run, for an estimate of the remaining time.

    `every` is {name of an action: its interval in steps}. All actions are due after the last step.
    """

    def __init__(self, steps: int, every: Mapping[str, int]):
        self.steps, self.every = steps, every
        self.seconds: dict[str, list[float]] = {name: [] for name in every}

    @contextlib.contextmanager
    def action(self, name: str) -> Iterator[None]:
        """Measures an action."""
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)

    def remaining(self, name: str, step: int) -> int:
        """Returns the number of times that an action is due after `step`."""
        every, steps = self.every[name], self.steps
        if not every:
            return int(step < steps)
        return steps // every - step // every + int(steps % every > 0 and step < steps)

    def seconds_left(self, step: int, per_step: float) -> float:
        """Returns the remaining seconds of the run, from the steps and actions measured so far."""
        seconds = (self.steps - step) * per_step
        for name, durations in self.seconds.items():
            if typical := durations[1:] or durations:  # the first action includes compilation
                seconds += self.remaining(name, step) * sum(typical) / len(typical)
        return seconds


class Log:
    """Writes metrics by step to metrics.jsonl, and to TensorBoard, W&B and Trackio if enabled.

    Only process 0 writes; the other processes measure the same times.

    Args:
        workdir: the run directory.
        step: number of updates so far.
        steps: number of updates of the whole run.
        batch_size: images per update.
        tensorboard: whether to write TensorBoard events.
        wandb: project of Weights & Biases, "" for none.
        trackio: project of Trackio, "" for none.
        warn: (step, metrics) -> a warning, or "".
        every: {name of a periodic action: its interval in steps}.
        devices: number of devices that share a batch.
        peak_share: share of a device's peak FLOP/s that one image per second uses; 0: unknown.
        goodput: the times of the run so far; by default those of a run that starts now.
    """

    def __init__(
        self,
        workdir: str,
        *,
        step: int,
        steps: int,
        batch_size: int,
        tensorboard: bool,
        wandb: str,
        trackio: str,
        warn: Callable,
        every: Mapping[str, int] | None = None,
        devices: int = 1,
        peak_share: float = 0.0,
        goodput: Goodput | None = None,
    ):
        self.steps, self.batch_size, self.warn, self.warning = steps, batch_size, warn, ""
        self.devices, self.peak_share = devices, peak_share
        self.goodput = goodput or Goodput()
        self.pace = Pace(steps, every or {})
        self.writes = jax.process_index() == 0
        self.workdir = open_path(workdir)
        self.training = self.waiting = 0.0  # seconds since the last line
        self.last_step, self.first = step, True
        self.pending: tuple[int, dict, dict, float] | None = None
        self.known_bad = {json.dumps(x) for x in keep_lines(self.workdir / "bad_files.jsonl")}
        repeats = self.writes and self.remove_after(step)
        self.metrics, self.events, self.bad_files = (
            append_to(self.workdir / f"{name}.jsonl", jax.process_index())
            for name in ("metrics", "events", "bad_files")
        )
        if repeats:
            self.metrics.append({"step": step} | self.goodput.record())
        self.sinks = sinks(workdir, step, tensorboard, wandb, trackio) if self.writes else []

    def remove_after(self, step: int) -> bool:
        """Removes the metrics after a step, which will be repeated. Returns whether there were any.

        The time spent on them is lost.
        """
        path = self.workdir / "metrics.jsonl"
        before = len(read_lines(path))
        kept = keep_lines(path, lambda record: step_of(record) <= step)
        self.goodput.repeat_after(kept)
        return len(kept) < before

    def timed(self, steps: Iterable) -> Iterator:
        """Yields the steps and measures their time, from which images per second are computed."""
        steps = iter(steps)
        while True:
            start = time.perf_counter()
            step = next(steps, None)
            self.training += time.perf_counter() - start
            if step is None:
                return
            yield step

    def waited(self, batches: Iterable) -> Iterator:
        """Yields the batches and measures the time spent waiting for them: the input wait."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            with self.goodput.during("input"):
                batch = next(batches, None)
            self.waiting += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def action(self, name: str) -> Iterator[None]:
        """Measures a periodic action."""
        kind = name if name in KINDS else "evaluate"
        with self.pace.action(name), self.goodput.during(kind):
            yield

    def times(self, step: int) -> None:
        """Writes the seconds of the run by kind of work."""
        self.write(step, self.goodput.record())

    def train(self, step: int, metrics: dict, due: bool, **more: float) -> None:
        """Records a step. A line is written one step late, so that no device waits for it."""
        self.flush()
        if self.first and not due:  # the first step includes compilation
            self.last_step, self.training, self.waiting = step, 0.0, 0.0
        self.first = False
        if due:
            count = step - self.last_step
            speed = count * self.batch_size / self.training
            left = self.pace.seconds_left(step, self.training / count)
            more |= dict(images_per_second=speed, input_wait=self.waiting / self.training)
            more |= dict(images_per_second_per_chip=speed / self.devices, time=time.time())
            if self.peak_share:
                more["mfu"] = speed / self.devices * self.peak_share
            more |= memory() | self.goodput.record()
            self.pending = step, metrics, more, left
            self.last_step, self.training, self.waiting = step, 0.0, 0.0

    def flush(self) -> None:
        """Writes the pending line."""
        if self.pending is None:
            return
        step, metrics, more, left = self.pending
        self.pending = None
        values = {name: float(value) for name, value in metrics.items()}
        line, warning = format_metrics(values), self.warn(step, values)
        values |= more
        self.write(step, values)
        self.say(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  {line}  lr {values['lr']:.2e}  "
            f"{format_speed(values, self.devices)}  ETA {clock(left)}"
        )
        if warning and warning != self.warning:
            self.say(f"warning: {warning}")
            self.event("warning", step, warning)
        self.warning = warning

    def evaluation(self, step: int, means: Mapping[str, float | np.ndarray]) -> None:
        """Writes the results of an evaluation: numbers as metrics, arrays to evaluation.json."""
        arrays = {name: np.asarray(x).tolist() for name, x in means.items() if np.ndim(x)}
        if arrays and self.writes:
            write_text(self.workdir / "evaluation.json", json.dumps({"step": step} | arrays) + "\n")
        means = {name: value for name, value in means.items() if not np.ndim(value)}
        self.write(step, {f"evaluate/{name}": float(value) for name, value in means.items()})
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  evaluation: {numbers}")

    def event(self, kind: str, step: int, text: str = "") -> None:
        """Records the start or the end of a process, or a warning."""
        if self.writes:
            self.events.append(dict(time=time.time(), step=step, event=kind, text=text))
        self.store()

    def store(self) -> None:
        """Stores all records now; otherwise records in a bucket are stored within half a minute."""
        for lines in (self.metrics, self.events, self.bad_files):
            lines.flush()

    def unread(self, files: Sequence[tuple[str, str]]) -> None:
        """Records files that are not images, with the reason."""
        if files and self.writes:
            for name, reason in files:
                self.record_bad(name, reason)
            self.say(f"{len(files):,} files are not readable images: see bad_files.jsonl")

    def bad_file(self, name: str, reason: str) -> None:
        """Records a file that cannot be used, with the reason. Every process records its own."""
        if self.record_bad(name, reason):
            write_line(f"cannot use {name}: {reason} (in bad_files.jsonl)")

    def record_bad(self, name: str, reason: str) -> bool:
        """Records a file in bad_files.jsonl. Returns False if it was recorded before."""
        record = {"file": name, "reason": reason}
        if (line := json.dumps(record)) in self.known_bad:
            return False
        self.known_bad.add(line)
        self.bad_files.append(record)
        return True

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a record to metrics.jsonl and to all sinks."""
        if self.writes:
            self.metrics.append({"step": step} | values)
        for sink in self.sinks:
            sink(step, values)

    def say(self, text: str) -> None:
        """Prints text, in process 0 only.

        If the output is closed, as by `| head`, the run saves and stops, as after SIGTERM.
        """
        if not self.writes:
            return
        try:
            write_line(text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.raise_signal(signal.SIGTERM)


def format_metrics(metrics: dict) -> str:
    """Formats an objective's metrics in one line, the loss first."""
    rest = (f"{k} {float(v):.4g}" for k, v in metrics.items() if k not in ("loss", "grad_norm"))
    return "  ".join((f"loss {float(metrics['loss']):.4f}", *rest))


def format_speed(values: Mapping[str, float], devices: int) -> str:
    """Formats speed, utilization, input wait and memory in one line."""
    speed = f"{values['images_per_second']:,.0f} images/s"
    if devices > 1:
        speed += f" ({values['images_per_second_per_chip']:,.0f} per chip)"
    parts = [speed]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"input wait {values['input_wait']:.1%}")
    if "device_memory_gib" in values:
        parts.append(f"memory {values['device_memory_gib']:.1f} GiB")
    return "  ".join(parts)


def memory() -> dict[str, float]:
    """Returns the peak memory in GiB of this process and, where JAX reports it, of its device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    values = {"host_memory_gib": peak / 2**30}
    return values | ({"device_memory_gib": device / 2**30} if device else {})


def clock(seconds: float) -> str:
    """Formats seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def sinks(workdir: str, step: int, tensorboard: bool, wandb: str, trackio: str) -> list:
    """Returns functions (step, values) that store records, each continuing after `step`."""
    writers = []
    if tensorboard:
        writers.append(tensorboard_events(workdir, step))
    if wandb:
        writers.append(wandb_run(workdir, wandb))
    if trackio:
        writers.append(trackio_run(workdir, trackio))
    return writers


def step_of(record: Mapping) -> float:
    """Returns the step of a record, infinity if it has none."""
    step = record.get("step")
    return step if isinstance(step, int | float) else float("inf")


def optional(package: str, extra: str):
    """Imports an optional package."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"log.{extra} needs {package}: pip install 'mim-jax[{extra}]'.") from error


def tensorboard_events(workdir: str, step: int):
    folder = open_path(workdir) / "tensorboard"
    if not storage_of(folder).appends:  # tensorboardX does not survive a failed upload
        raise UserError(
            "log.tensorboard = True needs a run directory on a disk: set it to False for a bucket; "
            "log.wandb and log.trackio work, and `mim-jax report` draws the metrics."
        )
    writer = optional("tensorboardX", "tensorboard").SummaryWriter(str(folder), purge_step=step + 1)

    def write(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def wandb_run(workdir: str, project: str):
    run = optional("wandb", "wandb").init(
        project=project,
        dir=workdir if os.path.isdir(workdir) else None,
        id=Path(workdir).name,
        resume="allow",
    )
    return lambda step, values: run.log(values, step=step)


def trackio_run(workdir: str, project: str):
    name = Path(workdir).absolute().name
    run = optional("trackio", "trackio").init(project=project, name=name, resume="allow")
    return lambda step, values: run.log(values, step=step)
