"""Goodput: the seconds of a run by the kind of work that its processes did.

Every second of a process belongs to one of the KINDS:

    start      imports, opening the data, creating or restoring the state
    compile    the first step, without its input
    step       training
    input      waiting for batches
    save       copying the state for a checkpoint, and waiting for the last one
    evaluate   evaluations, probes and pictures
    lost       training, input and evaluation that a restart or a rollback repeats

The sums over all processes of a run are in its metrics, as "goodput/step" and so on. Goodput is the
share of "step". Names and definitions follow ml-goodput-measurement (Google).
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

KINDS = ("start", "compile", "step", "input", "save", "evaluate", "lost")
REPEATED = ("step", "input", "evaluate")  # kinds that become "lost" when steps are repeated
PREFIX = "goodput/"


class Goodput:
    """A stopwatch that is always running for exactly one kind of work.

    `seconds` are the totals {kind: seconds} of this process and of earlier ones.

    Args:
        age: seconds since the process started.
        clock: returns the time in seconds.
    """

    def __init__(self, age: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self.clock, self.since, self.kind = clock, clock() - age, "start"
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def begin(self, kind: str) -> None:
        """Ends the current kind of work and begins another."""
        now = self.clock()
        self.seconds[self.kind] += now - self.since
        self.kind, self.since = kind, now

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """A context in which the work is of a kind."""
        outer = self.kind
        self.begin(kind)
        try:
            yield
        finally:
            self.begin(outer)

    def add_earlier(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds the totals of earlier processes, from the newest metrics record."""
        for kind, seconds in newest(records).items():
            self.seconds[kind] += seconds

    def repeat_after(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Moves the work after a step to "lost", because the run continues from that step.

        Args:
            records: the metrics up to that step.
        """
        self.begin(self.kind)
        kept = newest(records)
        for kind in REPEATED:
            self.seconds["lost"] += self.seconds[kind] - kept[kind]
            self.seconds[kind] = kept[kind]

    def record(self) -> dict[str, float]:
        """Returns the totals until now as metrics."""
        self.begin(self.kind)
        return {PREFIX + kind: round(seconds, 3) for kind, seconds in self.seconds.items()}


def newest(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the totals {kind: seconds} in the newest metrics record that has them, or zeros."""
    totals = dict.fromkeys(KINDS, 0.0)
    for record in records:
        values = {kind: record.get(PREFIX + kind, math.nan) for kind in KINDS}
        if all(isinstance(x, int | float) and math.isfinite(x) for x in values.values()):
            totals = values
    return totals


def describe(seconds: Mapping[str, float]) -> str:
    """Formats totals by decreasing share: "81 % step, 9 % compile, ..."."""
    total = sum(seconds.values())
    shares = sorted(((x / total, kind) for kind, x in seconds.items() if x), reverse=True)
    return ", ".join(f"{share:.1%} {kind}" for share, kind in shares)


def process_age() -> float:
    """Returns the seconds since this process was started, 0 where they are unknown."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the boot, see proc(5)
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
