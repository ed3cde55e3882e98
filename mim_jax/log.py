"""What a run says while it goes: a line on the screen, a JSON object a line in metrics.jsonl."""

import importlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mim_jax import UserError


class Log:
    """Numbers by step. `metrics.jsonl` always; TensorBoard and Weights & Biases where asked for.

    Only the first process of several writes; the others keep the same clock and say nothing.
    """

    def __init__(
        self, workdir: str, *, step: int, steps: int, batch_size: int,
        tensorboard: bool, wandb: str, warn: Callable,
    ):  # fmt: skip
        self.steps, self.batch_size, self.warn, self.warning = steps, batch_size, warn, ""
        self.writes = jax.process_index() == 0
        self.training = self.waiting = 0.0  # seconds since the last line
        self.last_step, self.first, self.pending = step, True, None
        self.sinks = sinks(workdir, step, tensorboard, wandb) if self.writes else []
        self.bad_files = lines_once(Path(workdir) / "bad_files.jsonl")

    def timed(self, steps: Iterable) -> Iterator:
        """The same steps; the seconds that they take are what images per second counts."""
        steps = iter(steps)
        while True:
            start = time.perf_counter()
            step = next(steps, None)
            self.training += time.perf_counter() - start
            if step is None:
                return
            yield step

    def waited(self, batches: Iterable) -> Iterator:
        """The same batches; the seconds spent waiting for them are the input wait."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def train(self, step: int, metrics: dict, due: bool, **more: float) -> None:
        """Takes note of a step; what is due is written a step later, so that no device waits."""
        self.flush()
        if self.first and not due:  # compiling says nothing of the speed
            self.last_step, self.training, self.waiting = step, 0.0, 0.0
        self.first = False
        if due:
            count = step - self.last_step
            speed = count * self.batch_size / self.training
            left = (self.steps - step) * self.training / count
            more |= dict(images_per_second=speed, input_wait=self.waiting / self.training)
            self.pending = step, metrics, more, left
            self.last_step, self.training, self.waiting = step, 0.0, 0.0

    def flush(self) -> None:
        """Writes what is pending."""
        if self.pending is None:
            return
        step, metrics, more, left = self.pending
        self.pending = None
        values = {name: float(value) for name, value in metrics.items()}
        line, warning = in_words(values), self.warn(step, values)
        values |= more
        self.write(step, values)
        self.say(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  {line}  lr {values['lr']:.2e}  "
            f"{values['images_per_second']:,.0f} images/s  "
            f"input wait {values['input_wait']:.1%}  ETA {clock(left)}"
        )
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {step}.")
        if warning and warning != self.warning:
            self.say(f"warning: {warning}")
        self.warning = warning

    def evaluation(self, step: int, means: dict[str, float]) -> None:
        """Writes the means over the evaluation split that are single numbers."""
        means = {name: value for name, value in means.items() if not np.ndim(value)}
        self.write(step, {f"evaluate/{name}": float(value) for name, value in means.items()})
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  evaluation: {numbers}")

    def unread(self, files: Sequence[tuple[str, str]]) -> None:
        """Keeps the names of files that were left out from the start, and why."""
        if files and self.writes:
            for name, reason in files:
                self.bad_files({"file": name, "reason": reason})
            self.say(f"{len(files):,} files are no images that can be read: see bad_files.jsonl")

    def bad_file(self, name: str, reason: str) -> None:
        """Keeps the name of a file that turned out to be no use, and why. Every process does."""
        if self.bad_files({"file": name, "reason": reason}):
            print(f"cannot use {name}: {reason} (in bad_files.jsonl)", flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one record everywhere."""
        for sink in self.sinks:
            sink(step, values)

    def say(self, text: str) -> None:
        """Prints, once for all processes."""
        if self.writes:
            print(text, flush=True)


def in_words(metrics: dict) -> str:
    """What an objective measures, on a line: the loss first."""
    rest = (f"{k} {float(v):.4g}" for k, v in metrics.items() if k not in ("loss", "grad_norm"))
    return "  ".join((f"loss {float(metrics['loss']):.4f}", *rest))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def sinks(workdir: str, step: int, tensorboard: bool, wandb: str) -> list:
    """Functions (step, values) that keep records, each going on after `step`."""
    kept = [json_lines(Path(workdir) / "metrics.jsonl", step)]
    if tensorboard:
        kept.append(tensorboard_events(workdir, step))
    if wandb:
        kept.append(wandb_run(workdir, wandb))
    return kept


def json_lines(path: Path, step: int):
    """Appends to `path`, less the records after `step`: the run may have died after it saved."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if step_of(line) <= step))

    def write(step, values):
        with path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    return write


def lines_once(path: Path):
    """-> a function that appends a record to `path`, if it is not there, and says if it did."""
    there = set(path.read_text().splitlines()) if path.exists() else set()

    def write(record) -> bool:
        line = json.dumps(record)
        if line in there:
            return False
        there.add(line)
        with path.open("a") as file:
            file.write(line + "\n")
        return True

    return write


def step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut off in the middle
        return float("inf")


def optional(package: str, extra: str):
    """A package that the core install does without."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"log.{extra} needs {package}: pip install -e '.[{extra}]'.") from error


def tensorboard_events(workdir: str, step: int):
    writer = optional("tensorboardX", "tensorboard").SummaryWriter(
        str(Path(workdir) / "tensorboard"), purge_step=step + 1
    )

    def write(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def wandb_run(workdir: str, project: str):
    run = optional("wandb", "wandb").init(
        project=project, dir=workdir, id=Path(workdir).name, resume="allow"
    )
    return lambda step, values: run.log(values, step=step)
