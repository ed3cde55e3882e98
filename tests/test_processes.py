"""Two processes, of which one ends or stops: the other ends too, without JAX's stack trace."""

import signal
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

START = """
import ctypes, sys
from mim_jax import processes
from mim_jax.stop import Stop

def wait():
    while True:
        ctypes.CDLL(None).sleep(600)  # like a compilation, it does not run Python's handlers

processes.join(sys.argv[1])
"""
ENDS = """
print("joined", flush=True)
if sys.argv[1].endswith(sys.argv[2]):
    processes.leave(int(sys.argv[3]))
wait()
"""
RECORDS = """
def record(code, reason):
    print("recorded", code, reason, flush=True)

with processes.recording(record):
    print("joined", flush=True)
    if sys.argv[1].endswith("1"):
        processes.leave(1, "a step has taken 30 minutes")
    wait()
"""
STOPS = """
with Stop():
    print("joined", flush=True)
    wait()
"""
TRAINS = """
with Stop() as stop:
    stop.after(1)
    print("joined", flush=True)
    if sys.argv[1].endswith("1"):
        processes.leave(1)
    time.sleep(2)  # finishes a save
    print("saved", flush=True)
    processes.leave(1)
"""


@pytest.fixture
def pair():
    """Starts two processes of a script, and waits until both have joined."""
    started = []

    def start(script, *arguments):
        with socket.create_server(("localhost", 0)) as free:
            address = f"localhost:{free.getsockname()[1]}"
        for i in range(2):
            call = [sys.executable, "-c", START + script, f"{address},2,{i}", *arguments]
            started.append(
                subprocess.Popen(
                    call,
                    cwd=ROOT,
                    env=environment(1),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout.readline() == "joined\n", process.communicate()
        return started

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(0, 2), (1, 1)])
def test_the_other_process_ends_with_the_same_code(number, code, pair):
    processes = pair(ENDS, str(number), str(code))
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], errors
    sentence = f"stopped: process {number} of 2 has ended with exit code {code}; "
    assert errors[1 - number].splitlines()[-1] == sentence + "its output tells the reason."
    assert "stopped" not in errors[number]
    assert "Check failure" not in "".join(errors)


@pytest.mark.parametrize("number", [0, 1])
def test_sigterm_before_the_first_step_ends_all(number, pair):
    processes = pair(STOPS)
    processes[number].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    assert "stopped: nothing new was saved" in errors[number]
    assert f"process {number} of 2 has ended with exit code 143" in errors[1 - number]
    assert "Check failure" not in "".join(errors)


def test_a_process_may_finish_its_save(pair):
    processes = pair("import time\n" + TRAINS)
    outputs = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert outputs[0][0] == "saved\n"


SILENT = """
processes.SILENCE = 12
print("joined", flush=True)
wait()
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_does_not_respond_ends_the_other(number, pair):
    """Like a machine that lost its network, it does not close its connections."""
    processes = pair(SILENT)
    processes[number].send_signal(signal.SIGSTOP)
    _, error = processes[1 - number].communicate(timeout=90)
    assert processes[1 - number].returncode == 1
    assert f"failed: process {number} of 2 has not responded since" in error
    assert "Check failure" not in error


ALONE = """
import sys
from mim_jax import processes

processes.JOINING = 3
processes.join(sys.argv[1])
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_ends_if_the_other_never_joins(number):
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    call = [sys.executable, "-c", ALONE, f"{address},2,{number}"]
    done = subprocess.run(
        call, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1, done.stderr
    assert "failed: not all processes have joined within 0.05 minutes" in done.stderr
    assert "Check failure" not in done.stderr


def test_both_processes_record_why_they_end(pair):
    outputs = [process.stdout.read() for process in pair(RECORDS)]  # its buffer may have lines
    assert outputs == [
        "recorded 1 process 1 of 2 has ended with exit code 1\n",
        "recorded 1 a step has taken 30 minutes\n",
    ]
