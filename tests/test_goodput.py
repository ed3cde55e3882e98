"""Goodput: every second of a process is counted once, over restarts and rollbacks."""

import contextlib
import random

import pytest

from mim_jax import goodput
from mim_jax.goodput import KINDS, REPEATED, Goodput
from tests.test_log import logger, records


class Clock:
    """A clock that advances only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_the_seconds_add_up_to_the_time_of_the_process():
    clock = Clock()
    times = Goodput(age=3.0, clock=clock)
    expected = dict.fromkeys(KINDS, 0.0) | {"start": 3.0}
    random.seed(0)

    def work(kind, depth=0):
        """Spends some time on a kind of work, interrupted by others."""
        for _ in range(3):
            seconds = random.random()
            clock.now += seconds
            expected[kind] += seconds
            if depth < 3:
                inner = random.choice(KINDS)
                with times.during(inner):
                    work(inner, depth + 1)

    work("start")
    for kind in ("compile", "step", "step", "save"):
        times.begin(kind)
        work(kind)
    with contextlib.suppress(ZeroDivisionError), times.during("evaluate"):
        clock.now += 2
        expected["evaluate"] += 2
        raise ZeroDivisionError
    clock.now += 1
    expected["save"] += 1
    record = times.record()
    assert sum(record.values()) == pytest.approx(clock.now - 1000 + 3, abs=0.01)
    assert times.seconds == pytest.approx(expected)


def spend(times, clock, **seconds):
    for kind, x in seconds.items():
        times.begin(kind)
        clock.now += x


def test_repeated_steps_are_lost(tmp_path, capsys):
    """A process is killed after step 3 and its last checkpoint was after step 1."""
    clock = Clock()
    times = Goodput(clock=clock)
    lines = logger(tmp_path, goodput=times)
    spend(times, clock, start=10, compile=5)
    for step in (1, 2, 3):
        spend(times, clock, input=1, step=4, save=2)
        lines.times(step)

    again = Goodput(clock=clock)
    again.add_earlier(records(tmp_path / "metrics.jsonl"))
    spend(again, clock, start=7)
    lines = logger(tmp_path, step=1, goodput=again)
    kept = [record["step"] for record in records(tmp_path / "metrics.jsonl")]
    assert kept == [1, 1]  # the totals are not lost if this process is killed, too
    expected = dict(start=17, compile=5, step=4, input=1, save=6, evaluate=0, lost=10)
    assert again.seconds == expected
    assert goodput.newest(records(tmp_path / "metrics.jsonl")) == expected

    spend(again, clock, compile=5, step=20)  # a rollback before anything else is recorded
    logger(tmp_path, step=1, goodput=again)
    assert again.seconds == expected | dict(compile=10, lost=30)
    assert sum(again.seconds.values()) == clock.now - 1000


@pytest.mark.parametrize("damaged", ["many", None, float("nan")])
def test_damaged_records_do_not_count(damaged):
    line = {f"goodput/{kind}": 1.0 for kind in KINDS}
    totals = goodput.newest([line, line | {"goodput/lost": damaged}, {"loss": 1.0}])
    assert totals == dict.fromkeys(KINDS, 1.0)
    assert goodput.newest([]) == dict.fromkeys(KINDS, 0.0)


def test_the_description():
    assert goodput.describe(dict(start=1.0, step=3.0, lost=0.0)) == "75.0% step, 25.0% start"
    assert set(REPEATED) < set(KINDS)
    assert 0 < goodput.process_age() < 1e6
