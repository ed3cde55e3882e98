"""Ends a process that waits too long for a worker, another process or a storage."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

from mim_jax import processes

STAGES = {  # stage: possible causes if it does not end
    "a batch": "a worker process, or the storage of the data",
    "a step": "the compilation, the device, or another process",
    "an evaluation": "a worker process, the storage of the data, or another process",
    "pictures": "the device, or the storage of the data",
    "a save": "the storage of the run directory",
}


class Watchdog:
    """A context in which every stage must end within some minutes, or the process exits with 1.

    Args:
        minutes: the limit of each stage; 0: none.
    """

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.stage, self.since = "", time.monotonic()
        self.ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.minutes:
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()

    @contextlib.contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Limits the time of a stage, one of STAGES."""
        outer = self.stage
        self.stage, self.since = stage, time.monotonic()
        try:
            yield
        finally:
            self.stage, self.since = outer, time.monotonic()

    def each(self, stage: str, items: Iterable) -> Iterator:
        """Yields items, each of which must arrive in time."""
        items = iter(items)
        while True:
            with self.during(stage):
                item = next(items, None)
            if item is None:
                return
            yield item

    def watch(self) -> None:
        """Ends the process when a stage has taken too long."""
        while not self.ended.wait(min(10.0, 20 * self.minutes)):
            minutes = (time.monotonic() - self.since) / 60
            if self.stage and minutes > self.minutes:
                processes.fail(
                    f"{self.stage} has taken {minutes:.1f} minutes, more than stall_minutes = "
                    f"{self.minutes:g}: {STAGES[self.stage]} may be stuck"
                )
