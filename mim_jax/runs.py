"""Lists the runs below a directory or bucket: recipe, step, metrics, and whether they still run.

    mim-jax runs runs
    mim-jax runs gs://bucket/experiments --metric=evaluate/accuracy

A run is finished, failed, stopped by a signal, running, or stale: its process ended without a
record, for example because it was killed. A running process holds the lock of the run. Where locks
cannot be seen, a run without a record for ten minutes is stale. Exit codes: 0 done, 2 user error.
"""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from mim_jax import UserError, cli, workdir

QUIET = 600  # seconds without a record after which a run is stale, at least, if locks are invisible
REQUIRED = ("objective", "batch_size", "steps", "epochs")  # keys that every recorded config has
EXAMPLES = "data set's examples"  # key of a trajectory
LARGEST = 2**53  # of numbers that are shown: integers up to it are exact as floats
LOWER_IS_BETTER = ("loss", "error", "kl", "norm")  # parts of the names of such metrics


class RecordedRun(NamedTuple):
    """The contents of the files of a run directory."""

    path: epath.Path
    record: dict[str, Any]  # config.json
    metrics: list[dict[str, float]]  # metrics.jsonl
    events: list[dict[str, Any]]  # events.jsonl
    changed: float  # when a record was last added, in seconds since 1970
    now: float

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @property
    def objective(self) -> str:
        """The name of the objective, with control characters escaped."""
        name = str(self.config["objective"]["name"])
        return name if name.isprintable() else ascii(name)[1:-1]

    @property
    def class_names(self) -> list[str]:
        """The names of the classes of the data."""
        return [str(name) for name in workdir.class_names_of(self.record)]

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return int(max((x["step"] for x in (*self.metrics, *self.events)), default=0))

    @property
    def steps(self) -> int:
        """The length of the run, 0 if it is unknown."""
        if self.config["steps"]:
            return int(self.config["steps"])
        examples = self.record["trajectory"].get(EXAMPLES, 0)
        return int(self.config["epochs"] * examples / self.config["batch_size"])

    @property
    def status(self) -> str:
        """One of finished, failed, stopped, running and stale."""
        last = self.events[-1]["event"] if self.events else ""
        if last == "done" or (self.steps and self.step >= self.steps):
            return "finished"
        if last in ("failed", "stopped"):
            return last
        locked = workdir.is_locked(self.path)
        if locked is not None:
            return "running" if locked else "stale"
        times = [x["time"] for x in self.metrics if "time" in x][-20:]
        interval = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0
        return "running" if self.now - self.changed < max(QUIET, 5 * interval) else "stale"

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Returns [(step, value), ...] of a metric where it is a number, by increasing step."""
        points = [(int(x["step"]), x.get(metric)) for x in self.metrics]
        return [(step, value) for step, value in points if isinstance(value, int | float)]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("runs", __doc__)
    parser.add_argument(
        "root", nargs="?", default="runs", help="a directory, local or in a bucket; default: runs"
    )
    parser.add_argument(
        "--metric", default="", help="the metric whose last and best values are shown"
    )
    options = parser.parse_args(argv)

    def command() -> int:
        runs = list(runs_below(options.root))
        if not runs:
            raise UserError(f"there are no runs below {options.root}.")
        print(table([row_of(run, options.root, options.metric) for run in runs]))
        return 0

    return cli.exit_code(command, options.root)


def read_run(path: str | epath.PathLike) -> RecordedRun:
    """Reads the files of a run directory, which may still be written to.

    Raises:
        UserError: if there is no run.
    """
    folder = workdir.open_path(path)
    if not folder.is_dir():
        raise UserError(f"there is no directory {path}.")
    record = workdir.read(folder)
    if not record or workdir.is_converted(record):
        raise UserError(f"{path} is not the directory of a training run.")
    if problem := damage_of(record):
        raise UserError(f"{folder / 'config.json'} is damaged: {problem}.")
    files = [folder / name for name in ("metrics.jsonl", "events.jsonl")]
    parts = [part for file in files for part in workdir.parts_of(file)]
    changed = max((part.stat().mtime for part in parts), default=0.0)
    metrics, events = ([x for x in workdir.read_lines(file) if is_step(x)] for file in files)
    metrics = sorted(metrics, key=lambda x: x["step"])
    events = [x for x in events if is_number(x.get("time")) and isinstance(x.get("event"), str)]
    events = sorted(events, key=lambda x: x["time"])
    return RecordedRun(folder, record, metrics, events, changed, time.time())


def damage_of(record: Mapping[str, Any]) -> str:
    """Returns what is wrong with a run's record, "" if it has the entries that are read here."""
    config, data = record["config"], record.get("data", {})
    if missing := [key for key in REQUIRED if key not in config]:
        return f"it lacks {', '.join(missing)}"
    if not isinstance(config["batch_size"], int) or config["batch_size"] < 1:
        return f"batch_size = {config['batch_size']!r} must be at least 1"
    if "name" not in config["objective"]:
        return "it lacks objective.name"
    numbers = {name: config[name] for name in ("steps", "epochs")}
    numbers |= {EXAMPLES: record["trajectory"].get(EXAMPLES, 0)}
    numbers |= {name: data.get(name, 0) for name in ("images", "evaluation_images")}
    if "tokenizer" in config:
        if "vocabulary" not in config["tokenizer"]:
            return "it lacks tokenizer.vocabulary"
        numbers["vocabulary"] = config["tokenizer"]["vocabulary"]
    for name, value in numbers.items():
        if not is_number(value) or value < 0:
            return f"{name} = {value!r} must be a number of at least 0"
    return ""


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number of usual size."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def is_step(record: Mapping[str, Any]) -> bool:
    return is_number(record.get("step"))


def runs_below(root: str | epath.PathLike) -> Iterator[RecordedRun]:
    """Yields the runs in and below a directory, by name, without searching inside runs.

    A run whose record is damaged is left out, with a warning. Links to a directory that contains
    them are not followed.
    """
    yield from unseen_runs(root, set())


def unseen_runs(root: str | epath.PathLike, seen: set[str]) -> Iterator[RecordedRun]:
    """Yields the runs in and below a directory, except in directories already seen."""
    folder = workdir.open_path(root)
    if not folder.is_dir():
        raise UserError(f"there is no directory {root}.")
    target = os.path.realpath(folder)  # without links
    if target in seen:
        return
    seen.add(target)
    if workdir.is_run(folder):
        try:
            if not workdir.is_converted(workdir.read(folder)):
                yield read_run(folder)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from unseen_runs(path, seen)


def is_better(metric: str, value: float, other: float) -> bool:
    """Returns whether a value of a metric is better than another."""
    lower = any(part in metric for part in LOWER_IS_BETTER)
    return value < other if lower else value > other


def best(metric: str, points: Iterable[tuple[int, float]]) -> tuple[int, float] | None:
    """Returns the step and the value of the best finite point of a metric."""
    winner = None
    for step, value in points:
        if math.isfinite(value) and (winner is None or is_better(metric, value, winner[1])):
            winner = step, value
    return winner


def headline(run: RecordedRun) -> str:
    """Returns the most informative metric of a run."""
    names = {name for record in run.metrics for name in record}
    preferred = ("evaluate/miou", "evaluate/accuracy", "evaluate/loss", "loss")
    return next((name for name in preferred if name in names), "loss")


def row_of(run: RecordedRun, root: str, metric: str) -> dict[str, str]:
    """Returns the cells of a run in the table, by column."""
    metric = metric or headline(run)
    points = run.series(metric)
    top = best(metric, points)
    step = f"{run.step:,}" + (f"/{run.steps:,}" if run.steps else "")
    place = str(run.path).removeprefix(str(workdir.open_path(root))).lstrip("/")
    return {
        "run": place or run.name,
        "objective": run.objective,
        "status": run.status,
        "step": step,
        "metric": metric,
        "last": f"{points[-1][1]:.4g}" if points else "-",
        "best": f"{top[1]:.4g} at {top[0]:,}" if top else "-",
        "changed": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed)),
    }


def table(rows: list[dict[str, str]]) -> str:
    """Formats rows of equal keys as aligned columns."""
    rows = [{name: name for name in rows[0]}, *rows]
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    return "\n".join(
        "  ".join(f"{row[name]:{width}}" for name, width in widths.items()).rstrip() for row in rows
    )


if __name__ == "__main__":
    cli.exit_with(main)
