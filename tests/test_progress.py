import io
import time

import numpy as np
import pytest

from mim_jax import progress
from mim_jax.progress import Bar, images_in, track, write_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)


def batches(*valid):
    return [{"valid": np.array(x)} for x in valid]


def test_lines_without_a_terminal(at_once, capsys):
    items = batches([1, 1], [1, 0])
    tracked = track(items, "evaluating", 3, unit="images", count=images_in)
    assert list(tracked) == items
    lines = capsys.readouterr().err.splitlines()
    assert "evaluating: 100%" in lines[-1]
    assert "3/3" in lines[-1]
    assert all("\r" not in line for line in lines)


def test_the_elapsed_time_of_what_is_not_counted(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    lines, end = "", time.monotonic() + 30
    with Bar("compiling"):
        while lines.count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.05)
            lines += capsys.readouterr().err
    assert lines.startswith("compiling: 00:00\ncompiling: 00:0")


def test_silence_without_a_terminal(capsys, monkeypatch):
    assert list(track(range(3), "evaluating", unit="images")) == [0, 1, 2]  # too short
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with Bar("training", 3, unit="steps", lines=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_clock_moves_while_nothing_advances(at_once, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Bar("compiling", 10, unit="steps", first=2) as bar:
        bar.nrows, bar.ncols, bar.dynamic_ncols = 24, 80, None
        end = time.monotonic() + 30
        while terminal.getvalue().count("2/10") < 3 and time.monotonic() < end:
            time.sleep(0.1)
    assert terminal.getvalue().count("compiling:  20%") >= 3
    assert terminal.getvalue().endswith("\r")  # the bar is removed


def test_lines_are_printed_above_bars(at_once, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Bar("training", 10, unit="steps") as bar:
        bar.nrows, bar.ncols, bar.dynamic_ncols = 24, 80, None
        bar.update(3)
        before = len(terminal.getvalue())
        write_line("step 3/10")
        assert capsys.readouterr().out == "step 3/10\n"
        assert "3/10" in terminal.getvalue()[before:]  # drawn again
