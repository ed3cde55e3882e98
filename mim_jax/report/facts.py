"""The tables of a report: figures, problems, keys, and facts about code, devices and data."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mim_jax import goodput, schema, workdir
from mim_jax.report.charts import EVALUATION, TITLES
from mim_jax.runs import RecordedRun, best, headline, is_better

MOST_FAULTS = 20  # warnings and failures that are listed
ABSENT = "-"  # shown for a key that a run does not have


def numbers(run: RecordedRun) -> list[tuple[str, str, str]]:
    """Returns the figures at the top: label, value and a note."""
    rows = []
    metric = headline(run)
    wanted = ["loss", metric, "evaluate/probe_knn", "evaluate/probe_linear"]
    for key in dict.fromkeys(wanted):
        points = run.series(key)
        if not points:
            continue
        title = TITLES.get(key.removeprefix(EVALUATION), (key, ""))[0]
        note = "in training" if key == "loss" else "on the evaluation split"
        if (top := best(key, points)) and top[0] != points[-1][0]:
            word = "lowest" if is_better(key, 0, 1) else "highest"
            note += f"; {word} {top[1]:.4g} at step {top[0]:,}"
        rows.append((title, f"{points[-1][1]:.4g}", note))
    speeds = [y for _, y in run.series("images_per_second")]
    if speeds:
        note = "images per second, median"
        if chips := [y for _, y in run.series("images_per_second_per_chip")]:
            note += f"; {np.median(chips):,.4g} per chip"
        rows.append(("Speed", f"{np.median(speeds):,.4g}", note))
    seconds = goodput.newest(run.metrics)
    if total := sum(seconds.values()):
        rows.append(("Time", duration(total), f"of all processes: {goodput.describe(seconds)}"))
        rows.append(("Goodput", f"{seconds['step'] / total:.1%}", "of the time in training steps"))
    return rows


def duration(seconds: float) -> str:
    """Formats a duration with two units."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(minutes)} min {int(seconds % 60)} s" if minutes >= 1 else f"{seconds:.0f} s"


def problems(run: RecordedRun) -> list[tuple[str, str]]:
    """Returns warnings and failures: (place, text)."""
    rows = []
    if run.status == "stale":
        rows.append(
            (f"step {run.step:,}", "The process ended unexpectedly. Run the same command again.")
        )
    usual = ("start", "stopped", "done")
    faults = [event for event in run.events if event["event"] not in usual]
    for event in faults[-MOST_FAULTS:]:
        rows.append((f"step {event['step']:,}", str(event.get("text", ""))))
    if len(faults) > MOST_FAULTS:
        rows.append(("before", f"{len(faults) - MOST_FAULTS:,} more, in events.jsonl"))
    for key in dict.fromkeys(name for record in run.metrics for name in record):
        bad = [step for step, value in run.series(key) if not math.isfinite(value)]
        if bad:
            rows.append((f"step {bad[0]:,}", f"{key} is not finite in {len(bad):,} record(s)."))
    bad_files = workdir.read_lines(run.path / "bad_files.jsonl")
    if bad_files:
        first = ", ".join(str(record.get("file", "")) for record in bad_files[:3])
        count = f"{len(bad_files):,} file{'s' if len(bad_files) > 1 else ''}"
        rows.append(("data", f"{count} could not be used, first {first}."))
    for path in sorted((run.path / "checkpoints").glob("*.corrupt-*")):
        rows.append((f"step {path.name.split('.')[0]}", "A checkpoint was corrupt: set aside."))
    return rows


class Setting(NamedTuple):
    """A key of a config."""

    key: str
    value: str
    default: str  # "" if every config must set it
    changed: bool
    meaning: str


def settings(run: RecordedRun) -> list[Setting]:
    """Returns the keys of a run's config, and whether each has its default."""
    try:
        keys = schema.keys_of(run.config)
    except Exception:  # an objective that this installation does not have
        keys = {}
    rows = []
    for key, value in schema.flatten(run.config).items():
        entry = keys.get(key)
        unset = inspect.Parameter.empty
        default_value = unset if entry is None else entry.default
        required = default_value is unset
        default = "" if required else plain(default_value)
        changed = required or default != plain(value)
        rows.append(Setting(key, plain(value), default, changed, entry.meaning if entry else ""))
    return rows


def plain(value: Any) -> str:
    """Formats a value of a config; tuples and lists are equal."""
    if isinstance(value, tuple | list):
        return f"({', '.join(plain(x) for x in value)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """Returns the keys whose values differ between runs: (key, value of each run)."""
    settings = [{k: plain(x) for k, x in schema.flatten(run.config).items()} for run in runs]
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    rows = [(key, [of_run.get(key, ABSENT) for of_run in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def facts(run: RecordedRun) -> list[tuple[str, str]]:
    """Returns facts about the run's code, devices and data."""
    record, data = run.record, run.record.get("data", {})
    git = record.get("git") or {}
    commit = str(git.get("commit", ""))[:12] + (" with changes" if git.get("changed") else "")
    names = run.class_names
    shown = ", ".join(names[:40]) + (f", ... ({len(names):,})" if len(names) > 40 else "")
    versions = ", ".join(f"{k} {x}" for k, x in record.get("versions", {}).items())
    starts = sum(event["event"] == "start" for event in run.events)
    rows = [
        ("Directory", str(run.path)),
        ("Objective", run.objective),
        ("Data", str(run.config["data"].get("name", ""))),
        ("Images", f"{data['images']:,} for training" if "images" in data else ""),
        ("Evaluation images", f"{data.get('evaluation_images', 0):,}" if data else ""),
        ("Classes", shown),
        ("Devices", str(record.get("devices", ""))),
        ("Processes started", f"{starts}" if starts else ""),
        ("Versions", versions),
        ("Commit", commit),
        ("Code of the objective", str(record.get("code", ""))),
    ]
    return [(name, text) for name, text in rows if text]
