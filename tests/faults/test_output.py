"""Outputs that are closed, and interruptions of a run that has nothing to save."""

import json
import signal
import subprocess
import sys

from mim_jax.runs import read_run
from tests.conftest import ROOT, environment

CALL = [sys.executable, "-m", "mim_jax.main", "--config=configs/mae_base.py", "--smoke"]
CALL += ["--config.log.every_steps=1", "--config.steps=100000", "--config.batch_size=8"]


def started(workdir):
    """Starts a run whose output is read here."""
    call = [*CALL, f"--workdir={workdir}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(call, cwd=ROOT, env=environment(1), **pipes)


def test_a_closed_output_stops_a_run(tmp_path):
    """`mim-jax train ... | head` is no failure: the run saves, as after SIGTERM."""
    process = started(tmp_path)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=120) == 143
    assert "Traceback" not in error
    assert read_run(tmp_path).status == "stopped"
    assert list((tmp_path / "checkpoints").glob("[0-9]*/digests.json"))


def test_an_interruption_of_the_first_compilation_is_recorded(tmp_path):
    """So that `mim-jax runs` does not take the run for one that is still compiling."""
    process = started(tmp_path)
    for line in process.stdout:
        if line.startswith("compiling"):
            break
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert ("stopped: nothing new was saved" in error) != ("stopped and saved after" in said)
    assert read_run(tmp_path).status == "stopped"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    assert [event["event"] for event in events] == ["start", "stopped"]
