"""Progress of long operations: bars on a terminal, and a line every minute elsewhere."""

import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

DELAY = 3.0  # seconds before an operation shows its progress
INTERVAL = 60.0  # seconds between lines where there is no terminal


class Bar(tqdm):
    """A progress bar whose clock also advances while no unit is completed, as in compilation.

    Args:
        description: what is being done.
        total: number of units, if it is known.
        unit: what is counted, a plural; "": only the elapsed time is shown.
        first: number of units that are done already.
        lines: whether to print lines where there is no terminal.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        unit: str = "",
        first: int = 0,
        lines: bool = True,
    ):
        self.terminal, self.ended = sys.stderr.isatty(), threading.Event()
        super().__init__(
            desc=description,
            total=total,
            initial=first,
            unit=f" {unit}",
            leave=False,
            delay=DELAY,
            disable=not (self.terminal or lines),
            mininterval=0.1 if self.terminal else INTERVAL,
            miniters=1,
            dynamic_ncols=True,
            file=sys.stderr if self.terminal else io.StringIO(),
            bar_format=None if unit else "{desc}: {elapsed}",
        )
        if self.terminal or not unit:
            threading.Thread(target=self.move_clock, daemon=True).start()

    def move_clock(self) -> None:
        """Draws the bar every second, or prints a line every INTERVAL, until it is closed."""
        while not self.ended.wait(1 if self.terminal else INTERVAL):
            if time.time() > self.start_t + self.delay:
                self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar, or prints it as a line; tqdm calls it with msg="" to clear the bar."""
        if self.terminal:
            return super().display(msg, pos)
        if msg is None:
            print(self, file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """Removes the bar."""
        self.ended.set()
        super().close()


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    unit: str,
    count: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Yields items and shows how many units of `total` are done; `count` are those of an item."""
    with Bar(description, total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update(count(item))


def images_in(batch: dict[str, Any]) -> int:
    """Returns the number of images in a batch, without padding."""
    return int((batch["valid"] > 0).sum())


def write_line(text: str) -> None:
    """Prints a line above the bars."""
    with tqdm.external_write_mode(sys.stdout):
        print(text, flush=True)
