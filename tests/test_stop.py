"""Signals in several processes: all stop at the same point. test_main.py has those of one."""

import signal
import subprocess
import sys

import jax
import pytest

from mim_jax.stop import Stop, StoppedError
from tests.conftest import ROOT


@pytest.fixture
def notices(monkeypatch):
    """Two processes, of which another is notified before the fifth point."""
    points = []

    def reached(point):
        points.append(point)
        return point == 5

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("mim_jax.stop.multihost_utils.reached_preemption_sync_point", reached)
    monkeypatch.setattr("mim_jax.stop.processes.begin_training", lambda: None)
    monkeypatch.setattr("mim_jax.stop.processes.has_preemption_service", lambda: True)
    return points


def test_an_evaluation_ends_at_the_point_of_a_notice(notices):
    """Points are counted over steps and batches, as JAX requires increasing numbers."""
    stop = Stop()
    stop.after(1)
    assert list(stop.guard("ab")) == ["a", "b"]
    stop.after(2)
    assert not stop.signal
    batches = stop.guard(iter("abc"))
    with pytest.raises(StoppedError):
        next(batches)
    assert stop.signal == signal.SIGTERM
    assert notices == [1, 2, 3, 4, 5]


def test_all_steps_end_at_the_point_of_a_notice(notices):
    stop = Stop()
    for step in range(11, 16):
        assert not stop.signal
        stop.after(step)
    assert stop.signal == signal.SIGTERM


def test_signals_become_sigterm_in_several_processes(notices):
    """So that JAX notifies the other processes."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    stop = Stop()
    stop.exits, stop.unsaved = False, True
    try:
        with stop:
            for number in (signal.SIGHUP, signal.SIGINT):
                signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM] * 2
    assert not stop.signal


SCRIPT = """
import os, signal, sys, time
from mim_jax.stop import Stop

with Stop() as stop:
    stop.after(1)
    for number in sys.argv[1:]:
        os.kill(os.getpid(), int(number))
        time.sleep(0.5)
    print("saved", stop.signal, flush=True)
"""


@pytest.mark.parametrize(
    ("numbers", "code", "printed"),
    [
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGHUP], 0, "saved 15\n"),
        ([signal.SIGHUP], 0, "saved 15\n"),
        ([signal.SIGTERM, signal.SIGINT], 130, ""),
        ([signal.SIGINT, signal.SIGINT], 130, ""),
    ],
)
def test_repeated_signals(numbers, code, printed):
    """A preempted machine may send several; Ctrl-C does not wait for the save."""
    call = [sys.executable, "-c", SCRIPT, *(str(int(number)) for number in numbers)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, printed), done.stderr
