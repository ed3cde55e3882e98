"""The watchdog: ends a process that waits too long, and no other."""

import subprocess
import sys
import time

from mim_jax.watchdog import Watchdog
from tests.conftest import ROOT

SCRIPT = """
import itertools, time
from mim_jax.watchdog import Watchdog

def batches():
    yield 1
    time.sleep(60)

with Watchdog(0.01) as watchdog:
    for step in watchdog.each("a step", itertools.count(1)):
        for batch in watchdog.each("a batch", batches()):
            print("batch", batch, flush=True)
"""


def test_a_stalled_process_ends_with_a_reason():
    started = time.monotonic()
    call = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stdout == "batch 1\n"
    assert "failed: a batch has taken 0.0 minutes" in done.stderr
    assert "a worker process, or the storage of the data may be stuck" in done.stderr
    assert time.monotonic() - started < 30


def test_progress_is_no_stall():
    with Watchdog(0.01) as watchdog:  # 0.6 seconds
        for _ in watchdog.each("a batch", range(1, 6)):
            time.sleep(0.2)
        time.sleep(1)  # no stage
        with watchdog.during("a save"):
            time.sleep(0.1)
    with Watchdog(0) as watchdog, watchdog.during("a save"):
        time.sleep(0.1)
