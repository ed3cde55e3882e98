"""Signals that stop a run."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from mim_jax import preemption, processes

SIGNALS = {  # signal: the one that it counts as, which determines the exit code
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


class StoppedError(Exception):
    """A signal arrived during a periodic action."""


class Stop:
    """A context in which SIGINT, SIGTERM and SIGHUP stop a run after the current step.

    Before the first step there is nothing to save: the process exits at once, even while it
    compiles. Ctrl-C after another signal also ends it at once; further SIGTERMs do not, because
    a preempted machine may send several. In a notebook, where the process must continue,
    KeyboardInterrupt is raised instead. The previous handlers are restored at the end.

    SIGHUP and preemption notices of the machine (see preemption.py) count as SIGTERM.

    SIGTERM may reach any of several processes: JAX notifies the others, and all stop after the
    same training step or the same batch of an evaluation. SIGINT is handled like SIGTERM.
    Before the first step, all processes exit at once, unless the program has started JAX's
    preemption service itself, which delays SIGTERM until that step.
    """

    def __init__(self):
        self.signal = 0
        self.unsaved = False  # whether a step has been done
        self.points = 0  # number of calls of `reached`
        self.previous: dict[int, Any] = {}
        self.exits = "ipykernel" not in sys.modules
        self.ended = threading.Event()

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if number == signal.SIGTERM and processes.has_preemption_service():
                continue
            self.previous[number] = signal.signal(number, self.record)
        if self.exits:  # Python's handlers wait until a compilation ends; this thread does not
            reader, self.writer = os.pipe()
            os.set_blocking(self.writer, False)
            self.wakeup = signal.set_wakeup_fd(self.writer)
            threading.Thread(target=self.watch, args=[reader], daemon=True).start()
        preemption.watch(self.ended)
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.previous and self.exits:
            signal.set_wakeup_fd(self.wakeup)
            os.close(self.writer)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def record(self, number: int, frame) -> None:
        """Handles a signal in the main thread."""
        again = bool(self.signal) and number == signal.SIGINT
        if not self.exits and (again or not self.unsaved):
            raise KeyboardInterrupt
        if self.unsaved and jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # to JAX
        else:
            self.signal = self.signal or SIGNALS[signal.Signals(number)]

    def watch(self, reader: int) -> None:
        """Ends the process at a signal if there is nothing to save, or at Ctrl-C after another."""
        seen = False
        while byte := os.read(reader, 1):
            if byte[0] not in SIGNALS:
                continue
            number = SIGNALS[signal.Signals(byte[0])]
            if not self.unsaved or (seen and number == signal.SIGINT):
                with contextlib.suppress(OSError):
                    print("stopped: nothing new was saved", file=sys.stderr, flush=True)
                processes.leave(128 + number, f"by signal {number}")
            seen = True
        os.close(reader)

    def after(self, step: int) -> None:
        """Records that a step is done, and whether any process received a signal."""
        if not self.unsaved and jax.process_count() > 1:
            processes.begin_training()
            self.unsaved = True
            if self.signal:  # just before this step was done
                self.signal = 0
                signal.raise_signal(signal.SIGTERM)
        self.unsaved = True
        self.reached()

    def reached(self) -> bool:
        """Returns whether the processes stop here. All of them must call it equally often."""
        self.points += 1
        if jax.process_count() > 1:
            if not self.unsaved:
                return False
            if multihost_utils.reached_preemption_sync_point(self.points):
                self.signal = signal.SIGTERM
        return bool(self.signal)

    def guard(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yields the batches of a periodic action. Raises StoppedError after a signal."""
        for batch in batches:
            if self.reached():
                raise StoppedError
            yield batch
