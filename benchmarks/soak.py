"""Kills runs at random moments, continues them, and compares them with undisturbed runs.

    python -m benchmarks.soak --kills=100 --minutes=35

Every objective is trained with a smoke config on the CPU. A process is killed by SIGKILL, or
stopped by SIGTERM, SIGHUP or SIGINT: during its start, a save, an evaluation, or at any other
moment. The next one continues on other devices: 1 to 4 in one process or two, with other numbers of
parts, copies and worker processes. Two objectives train at a time. Losses and evaluations of all
steps are compared with those of an undisturbed run on one device. With --bucket, run directories
are in a bucket, which tests/bucket_server.py emulates. Exit codes: 0 if nothing was lost or
different, 1 otherwise.
"""

import argparse
import collections
import contextlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from mim_jax import workdir

CONFIGS = {  # objective: its arguments
    "mae": ["--config=mae_base", "--config.ema=0.9", "--config.probe.images=48"],
    "beit": ["--config=beit_base"],
    "dvae": ["--config=dvae"],
    "classify": [
        *("--config=mae_base_finetune", "--config.objective.mixup_group=2", "--config.ema=0.99"),
        "--config.init_from.encoder=random",
    ],
    "segment": [
        *("--config=ade20k_mae_base", "--config.objective.batch_norm=2"),
        "--config.init_from.encoder=random",
    ],
}
STEPS, EVALUATE, SAVE, BATCH = 40, 7, 5, 24
MESHES = 5  # number of different meshes of an objective, because each is compiled
COMMON = [
    *("--smoke", f"--config.steps={STEPS}", f"--config.batch_size={BATCH}"),
    *("--config.log.every_steps=1", f"--config.evaluate.every_steps={EVALUATE}"),
    *("--config.evaluate.limit=60", f"--config.probe.every_steps={EVALUATE}"),
    *(f"--config.save.every_steps={SAVE}", "--config.pictures.every_steps=20"),
    "--config.pictures.count=2",
]
SIGNALS = {signal.SIGKILL: 6, signal.SIGTERM: 3, signal.SIGHUP: 1, signal.SIGINT: 1}  # weights
MOMENTS = ("start", "save", "evaluation", "any")
TOLERANCE = 1e-4  # of losses and evaluations, relative; meshes differ in rounding
PATIENCE = 300  # seconds after which a process without a signal counts as stuck
STOPPING = 90  # seconds that a process may take to save and stop
OTHERS = 20  # seconds after the end of one process, after which a launcher would end the others


class Life:
    """The processes of a run from one start to its end."""

    def __init__(self, arguments: list[str], mesh: dict[str, int], cache: Path):
        options = [f"--config.{key}={mesh[key]}" for key in ("accumulate", "fsdp", "data.workers")]
        command = [sys.executable, "-m", "mim_jax", "train", *COMMON, *arguments, *options]
        port, count = free_port(), mesh["processes"]
        flags = f"--xla_force_host_platform_device_count={mesh['devices'] // count} "
        environment = os.environ | {
            "XLA_FLAGS": flags + "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if count > 1:
            environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
        self.mesh, self.lines = mesh, list[str]()  # lines of the first process
        self.moment = self.signal = ""  # of the interruption
        self.began = time.monotonic()
        self.processes = []
        for i in range(count):
            one = [f"--distributed=localhost:{port},{count},{i}"] if count > 1 else []
            self.processes.append(
                subprocess.Popen(
                    [*command, *one],
                    env=environment,
                    stdout=subprocess.DEVNULL if i else subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Collects the lines of the first process."""
        for line in self.processes[0].stdout or ():
            self.lines.append(line.rstrip())

    @property
    def ended(self) -> bool:
        """Returns whether at least one process has ended."""
        return any(process.poll() is not None for process in self.processes)

    @property
    def step(self) -> int:
        """The last step that was printed."""
        return next(filter(None, map(step_of, reversed(self.lines))), 0)

    def wait(self, until, seconds: float = PATIENCE) -> bool:
        """Waits until a condition holds or a process ends. Returns whether it holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.ended:
            if until():
                return True
            time.sleep(0.01)
        return False

    def finish(self) -> list[int | None]:
        """Returns the exit codes of all processes; None: it had to be killed."""
        end = time.monotonic() + STOPPING
        while time.monotonic() < end and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
            if self.ended:
                end = min(end, time.monotonic() + OTHERS)
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # workers, too
            except ProcessLookupError:
                continue
            process.wait()
        self.reader.join()
        return codes


def step_of(line: str) -> int:
    """Returns the step of a line about a training step, 0 for other lines."""
    words = line.replace("/", " ").split()
    is_step = len(words) > 3 and words[0] == "step" and words[3] == "loss"
    return int(words[1]) if is_step else 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def random_mesh(rng: random.Random) -> dict[str, int]:
    """Returns a random number of devices, processes, parts of a batch, copies and workers."""
    devices = rng.randint(1, 4)
    parts = [n for n in (1, 2, 3) if BATCH % (2 * devices * n) == 0]
    copies = [n for n in (1, 2, 4) if devices % n == 0]
    return {
        "devices": devices,
        "processes": rng.choice([1, 1, 2]) if devices % 2 == 0 else 1,
        "accumulate": rng.choice(parts),
        "fsdp": rng.choice(copies),
        "data.workers": rng.choice([0, 0, 1, 2]),
    }


def interrupt(life: Life, folder: epath.Path, startup: float, rng: random.Random) -> None:
    """Sends a random signal at a random moment, unless the run ends before."""
    moment = rng.choice(MOMENTS)
    if moment == "start":
        life.wait(lambda: False, rng.uniform(0, startup))
    elif moment == "save":
        life.wait(lambda: bool(life.step) and is_saving(folder / "checkpoints"))
        time.sleep(rng.uniform(0, 0.1))
    elif moment == "evaluation":  # the line of a step is printed during the next
        life.wait(lambda: life.step % EVALUATE == EVALUATE - 1)
        time.sleep(rng.uniform(0, 0.5))
    else:
        life.wait(lambda: life.step)
        time.sleep(rng.uniform(0, 4))
    if life.ended:
        return
    number = rng.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    victim = rng.choice(life.processes)
    victim.send_signal(number)
    if number == signal.SIGKILL:  # a launcher ends the others when one is lost
        for process in life.processes:
            process.kill()
    life.moment, life.signal = moment, number.name


def is_saving(checkpoints: epath.Path) -> bool:
    """Returns whether a checkpoint is not complete."""
    return any(not (step / "commit_success.txt").exists() for step in checkpoints.glob("[0-9]*"))


def values_of(folder: epath.Path) -> dict[tuple[int, str], list[float]]:
    """Returns {(step, name): recorded values} of the losses and evaluations of a run."""
    values = collections.defaultdict(list)
    for record in workdir.read_lines(folder / "metrics.jsonl"):
        for name, value in record.items():
            if name == "loss" or name.startswith("evaluate/"):
                values[record["step"], name].append(value)
    return values


class Soak:
    """Runs of all objectives, their kills, and the comparison with undisturbed runs."""

    def __init__(self, runs: epath.Path, cache: Path, seed: int):
        self.runs, self.cache, self.rng = runs, cache, random.Random(seed)
        self.recording = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.largest = 0.0
        self.problems: list[str] = []
        self.startup = dict.fromkeys(CONFIGS, 15.0)  # seconds to the first step
        self.expected: dict[str, dict[tuple[int, str], list[float]]] = {}
        self.meshes = {name: [random_mesh(self.rng) for _ in range(MESHES)] for name in CONFIGS}

    def reference(self, name: str) -> None:
        """Trains without disturbance on one device, unless the folder has that run."""
        folder = self.runs / f"{name}_reference"
        self.expected[name] = values_of(folder)
        if (STEPS, "loss") in self.expected[name]:
            return
        mesh = {"devices": 1, "processes": 1, "accumulate": 1, "fsdp": 1, "data.workers": 0}
        life = Life([*CONFIGS[name], f"--workdir={folder}"], mesh, self.cache)
        life.wait(lambda: life.step)
        self.startup[name] = time.monotonic() - life.began
        life.wait(lambda: False, 4 * PATIENCE)
        if life.finish() != [0]:
            sys.exit(f"{name} failed without a signal:\n" + "\n".join(life.lines[-20:]))
        self.expected[name] = values_of(folder)
        seconds = time.monotonic() - life.began
        print(f"{name}: {len(self.expected[name])} values, undisturbed {seconds:.0f} s", flush=True)

    def live(self, name: str) -> None:
        """Starts or continues a run of an objective, and interrupts it."""
        folder, mesh = self.runs / name, self.rng.choice(self.meshes[name])
        before = max((step for step, _ in values_of(folder)), default=0)
        life = Life([*CONFIGS[name], f"--workdir={folder}"], mesh, self.cache)
        interrupt(life, folder, self.startup[name], self.rng)
        codes = life.finish()
        with self.recording:
            self.record(name, life, codes, before)
        if set(codes) == {0}:
            folder.rmtree()

    def record(self, name: str, life: Life, codes: list[int | None], before: int) -> None:
        """Counts what happened in a life, and checks its exit codes and a complete run's values.

        Args:
            before: the last step that was recorded before.
        """
        text = " ".join(f"{key}={value}" for key, value in life.mesh.items())
        seconds = f"{time.monotonic() - life.began:.0f} s"
        end = f"{life.moment or 'ended'} {life.signal} {codes}"
        print(f"{name}: {end} at {life.step} after {seconds}; {text}", flush=True)
        self.counts["kills"] += bool(life.signal)
        self.counts[f"kills by {life.signal}"] += bool(life.signal)
        self.counts[f"kills during {life.moment}"] += bool(life.signal)
        for line in life.lines:
            if line.startswith("continuing after step"):
                first = int(line.split()[3].replace(",", ""))
                self.counts["resumes"] += 1
                self.counts["repeated steps"] += max(0, min(before, life.step) - first)
        allowed: set[int | None] = {0}
        if life.signal:
            allowed |= {128 + n for n in SIGNALS} | {1, -int(signal.Signals[life.signal])}
        if life.signal == "SIGKILL":  # JAX may abort the processes that are left
            allowed |= {None, -signal.SIGABRT}
        if not set(codes) <= allowed:
            self.problem(f"{name}: exit codes {codes}", life.lines)
        traceback = "Traceback (most recent call last):" in life.lines
        if traceback and "KeyboardInterrupt" not in life.lines:  # Python's own, of an import
            self.problem(f"{name}: a traceback", life.lines)
        if set(codes) == {0}:
            self.compare(name, complete=True)

    def problem(self, text: str, lines: list[str]) -> None:
        self.problems.append(text)
        print(f"PROBLEM: {text}", *lines[-30:], sep="\n    ", flush=True)

    def compare(self, name: str, complete: bool) -> None:
        """Compares the recorded values of a run with those of the undisturbed run."""
        values = values_of(self.runs / name)
        last = STEPS if complete else max((step for step, _ in values), default=0) - 1
        self.counts["complete runs"] += complete
        for key, (expected,) in self.expected[name].items():
            if key[0] > last:
                continue
            if len(values[key]) != 1:
                self.counts["missing or repeated lines"] += 1
                self.problem(f"{name}: {key} was recorded {len(values[key])} times", [])
                continue
            difference = abs(values[key][0] - expected) / max(abs(expected), 1e-6)
            self.counts["compared values"] += 1
            self.largest = max(self.largest, difference)
            if not difference <= TOLERANCE or not math.isfinite(difference):
                self.counts["mismatches"] += 1
                self.problem(f"{name}: {key} is {values[key][0]}, expected {expected}", [])

    def live_until(self, names: list[str], kills: int, end: float, at_once: int) -> None:
        """Starts and interrupts runs, several at a time, until a number of kills or a time."""
        idle = list(names)

        def work() -> None:
            while self.counts["kills"] < kills and time.monotonic() < end:
                with self.recording:
                    name = idle.pop(self.rng.randrange(len(idle)))
                self.live(name)
                with self.recording:
                    idle.append(name)

        with ThreadPoolExecutor(at_once) as pool:
            for worker in [pool.submit(work) for _ in range(min(at_once, len(names)))]:
                worker.result()

    def summary(self) -> dict[str, Any]:
        """Returns the counts."""
        wanted = (
            "kills",
            "resumes",
            "repeated steps",
            "complete runs",
            "missing or repeated lines",
        )
        counts = {key: self.counts[key] for key in (*wanted, "compared values", "mismatches")}
        counts["largest relative difference"] = f"{self.largest:.1e}"
        counts["other problems"] = (
            len(self.problems)
            - self.counts["missing or repeated lines"]
            - self.counts["mismatches"]
        )
        return counts | {k: n for k, n in sorted(self.counts.items()) if k.startswith("kills ")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60, help="the limit, with references")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objectives", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument(
        "--at-once", type=int, default=2, help="number of runs that train at a time"
    )
    parser.add_argument("--work", type=Path, help="a folder; default: a temporary one")
    parser.add_argument("--bucket", action="store_true", help="put the runs into a bucket")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = str(work)
        if options.bucket:
            from benchmarks import bucket  # late: it needs PyTorch

            stack.enter_context(bucket.emulator())
            runs = "gs://runs/soak"
        end = time.monotonic() + 60 * options.minutes
        soak = Soak(workdir.open_path(runs), work / "cache", options.seed)
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(soak.reference, options.objectives))
        soak.live_until(options.objectives, options.kills, end, options.at_once)
        for name in options.objectives:
            soak.compare(name, complete=False)
    for key, value in soak.summary().items():
        print(f"{key}: {value}")
    return int(bool(soak.problems))


if __name__ == "__main__":
    sys.exit(main())
