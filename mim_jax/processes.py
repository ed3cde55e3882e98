"""Coordinates the processes of a run on several hosts: joining, and ending together.

JAX aborts a process with a stack trace when process 0 closes its connection, or some time after
another process has disappeared. Therefore a process that ends before the others announces it, and
all of them send heartbeats.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed

from mim_jax import UserError

ENDED = "mim_jax/ended"  # the value is "PROCESS CODE" of the first process that ended
LEFT = "mim_jax/left"  # has a value for each process that will end now
HEARTBEATS = "mim_jax/heartbeats"  # has a number for each process, which increases
POLL = 0.5  # seconds between two reads of ENDED
PERIOD = 5  # seconds between two heartbeats
JOINING = 300  # seconds in which all processes must join
SILENCE = 60  # seconds without a heartbeat after which a process counts as lost
GRACE = 10.0  # seconds in which a process may finish its save after another ended

training = False  # whether a step is done
leaving = threading.Event()
record_end: Callable[[int, str], None] | None = None  # of a run, by its exit code and the reason


def join(processes: str) -> None:
    """Connects this process to the others of a run; with "" JAX finds them.

    The process ends if others do not join, or if the heartbeats of one of them stop later.

    Args:
        processes: "ADDRESS:PORT,PROCESSES,PROCESS".
    """
    # JAX would delay a SIGTERM until the first step; see `begin_training`.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {  # longer than the limits of this module, because JAX aborts
        "initialization_timeout": 10 * JOINING,
        "heartbeat_timeout_seconds": 3 * SILENCE,
    }
    if processes:
        try:
            address, count, index = processes.split(",")
            options |= dict(
                coordinator_address=address, num_processes=int(count), process_id=int(index)
            )
        except ValueError:
            raise UserError(
                f"--distributed={processes} must be ADDRESS:PORT,PROCESSES,PROCESS, for example "
                "localhost:1234,2,0."
            ) from None
    timer = threading.Timer(JOINING, not_joined)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**options)
    finally:
        timer.cancel()
    peers = Peers()
    threads = [threading.Thread(target=x, daemon=True) for x in (peers.follow, peers.watch)]
    for thread in threads:
        thread.start()

    @atexit.register  # before JAX disconnects
    def end() -> None:
        leaving.set()
        for thread in threads:
            thread.join()


def not_joined() -> None:
    """Ends this process because others have not joined in time."""
    print(
        f"failed: not all processes have joined within {JOINING / 60:g} minutes; the output of "
        "those that are missing tells the reason.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def client() -> Any:
    """Returns JAX's client, which stores values that all processes can read."""
    return distributed.global_state.client


def has_preemption_service() -> bool:
    """Returns whether JAX handles SIGTERM."""
    return distributed.global_state.preemption_sync_manager is not None


def begin_training() -> None:
    """Starts JAX's preemption service, which replaces the handler of SIGTERM.

    From then on, a SIGTERM to one process stops all of them at the same step.
    """
    global training
    if not has_preemption_service():
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()
    training = True


class Peers:
    """Watches the other processes: process 0 watches all of them, and they watch process 0.

    Time is counted in seconds in which this process itself was running.
    """

    def __init__(self):
        state = distributed.global_state
        self.index, self.count = state.process_id, state.num_processes
        self.time = 0
        watched = range(self.count) if self.index == 0 else [0]
        self.times = dict.fromkeys(watched, 0)  # of the newest heartbeat of each
        self.heartbeats: dict[int, str] = {}  # the newest of each

    def follow(self) -> None:
        """Sends heartbeats, and ends this process soon after another announced its end.

        After the first step, it may first end by itself, to finish the save in progress.
        """
        due = 0
        while not leaving.wait(POLL):
            if self.time >= due:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 does not respond
                    self.exchange_heartbeats()
                due = self.time + PERIOD
            try:
                process, code = client().key_value_try_get(ENDED).split()
            except jax.errors.JaxRuntimeError:  # there is no value
                continue
            if leaving.wait(GRACE if training else 0):
                return
            reason = f"process {process} of {self.count} has ended with exit code {code}"
            print(f"stopped: {reason}; its output tells the reason.", file=sys.stderr, flush=True)
            leave(int(code), reason)

    def exchange_heartbeats(self) -> None:
        """Sends a heartbeat to process 0, and records when those of watched processes arrived."""
        client().key_value_set(f"{HEARTBEATS}/{self.index}", str(self.time), allow_overwrite=True)
        self.times[0] = self.time  # it has answered
        if self.index == 0:
            for key, heartbeat in client().key_value_dir_get(HEARTBEATS):
                process = int(key.split("/")[-1])
                if self.heartbeats.get(process) != heartbeat:
                    self.heartbeats[process], self.times[process] = heartbeat, self.time

    def watch(self) -> None:
        """Ends this process when a watched one has sent no heartbeat for SILENCE seconds."""
        while not leaving.wait(1):
            self.time += 1
            for process, newest in list(self.times.items()):
                if self.time - newest > SILENCE:
                    since = time.strftime("%X", time.localtime(time.time() - self.time + newest))
                    fail(f"process {process} of {self.count} has not responded since {since}")


@contextlib.contextmanager
def recording(record: Callable[[int, str], None]) -> Iterator[None]:
    """A context in which `leave` calls a function with the exit code and the reason."""
    global record_end
    record_end = record
    try:
        yield
    finally:
        record_end = None


def fail(reason: str) -> NoReturn:
    """Prints and records why the run has failed, and ends this process and the others at once."""
    print(
        f"failed: {reason}. Run the same command again to continue from the newest checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    leave(1, reason)


def leave(code: int, reason: str = "") -> NoReturn:
    """Ends this process at once. The other processes end soon, with the same exit code.

    Args:
        code: the exit code.
        reason: why, as recorded in events.jsonl; "" if the end of the run is recorded already.
    """
    leaving.set()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    end = threading.Thread(target=record_and_announce, args=[code, reason], daemon=True)
    end.start()
    end.join((GRACE if training else 0) + 5)  # a disk or process 0 may not respond
    os._exit(code)


def record_and_announce(code: int, reason: str) -> None:
    """Records the end of the run, if there is a reason, and announces it to other processes."""
    if reason and record_end:
        with contextlib.suppress(OSError):
            record_end(code, reason)
    if jax.distributed.is_initialized():
        announce(code)


def announce(code: int) -> None:
    """Announces that this process ends. Process 0 waits until all others have announced it, too."""
    state = distributed.global_state
    for key, value in {
        ENDED: f"{state.process_id} {code}",
        f"{LEFT}/{state.process_id}": "",
    }.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            client().key_value_set(key, value)
    while state.process_id == 0 and len(client().key_value_dir_get(LEFT)) < state.num_processes:
        time.sleep(0.1)
