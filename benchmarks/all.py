"""Prints the results of the other benchmarks in one dated table, with versions and ranges.

    pip install -e '.[torch,tpu]'
    python -m benchmarks.all [--only step_mae input ...] [--smoke] > table.md

step_mae, step_beit, step_finetune: images per second of a training step of ViT-B/16 and the ratio
    to PyTorch's, see benchmarks/gpu.py; in float32 on a CPU.
input: images per second of CPU time and the ratio to PyTorch's pipeline, see benchmarks/input.py.
tpu: time of a step of mae_base on a TPU v5e with 64 images, as `mim-jax plan` predicts it.
first_step: seconds from the command to the first step of configs/mae_emoji.py, with an empty
    compilation cache and with a filled one.
install: size and time of an installation in a fresh environment. It downloads packages.
objective: lines of code of each objective, without docstrings and comments.

Times are wall-clock times unless stated, so nothing else should run. If a part fails, its row has
the reason.
"""

import argparse
import ast
import datetime
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
import venv
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "mim_jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "grain",
    "torch",
    "transformers",
    "pillow",
)
Row = tuple[str, str, str]  # what, figure, lowest and highest


def spread(values: Sequence[float], digits: int = 2) -> tuple[str, str]:
    """Returns the median, and the lowest and the highest value, as texts."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f}", f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def run(*command: str, **environment: str) -> str:
    """Returns the output of a command. Raises RuntimeError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return done.stdout


def step_time(name: str, smoke: bool) -> list[Row]:
    """Times a training step next to PyTorch's."""
    import torch

    from benchmarks import gpu

    torch.set_num_threads(os.cpu_count() or 1)
    objective, size = gpu.ROWS[f"{name}_base"]
    shape = gpu.SMOKE if smoke else gpu.SIZES[size]
    count, rounds = (2, 2) if smoke else (16, 5)
    batch = gpu.make_batch(count)
    ours, _ = gpu.ours(objective, shape, batch)
    theirs = gpu.theirs(objective, shape, batch, compiled=False)
    ours(2)
    theirs(2)
    rates, ratios = [], []
    for _ in range(rounds):
        seconds = [gpu.seconds(lambda: step(1)) for step in (ours, theirs)]  # noqa: B023
        rates.append(count / seconds[0])
        ratios.append(seconds[1] / seconds[0])
    title = f"{name}, ViT-B/16, batch {count}"
    return [
        (f"{title}: images/s", *spread(rates)),
        (f"{title}: times PyTorch, eager", *spread(ratios)),
    ]


def input_pipeline(smoke: bool) -> list[Row]:
    """Times the input pipeline next to PyTorch's."""
    options = ["--images=64", "--rounds=1"] if smoke else []
    output = run("-m", "benchmarks.input", *options)
    rate = re.search(r"^ours: (.*) images per CPU second", output, re.M)
    ratio = re.search(r"^ours / theirs: ([\d.]+) \((.*?)\)", output, re.M)
    assert rate
    assert ratio
    return [
        ("input: images per CPU second", rate[1], ""),
        ("input: times PyTorch's DataLoader with PIL", ratio[1], ratio[2]),
    ]


def predicted(smoke: bool) -> list[Row]:
    """Predicts the step time on a TPU."""
    config = "mae_emoji" if smoke else "mae_base"
    options = [f"--config={config}", "--target=v5e:1x1", "--config.batch_size=64"]
    output = run("-m", "mim_jax", "plan", *options, "--json")
    cost = json.loads(output.splitlines()[-1])
    milliseconds = 1e3 * cost["predicted_step_seconds"]
    title = f"{config} on a TPU v5e, 64 images, predicted: ms a step"
    return [(title, f"{milliseconds:.1f}", "")]


def first_step(smoke: bool) -> list[Row]:
    """Times the start of a small run, twice with the same compilation cache."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(2):
            command = ["-m", "mim_jax", "train", "--config=mae_emoji", "--config.steps=1"]
            command += [f"--workdir={folder}/{i}", "--config.optimizer.warmup_steps=0"]
            command += ["--smoke"] * smoke
            start = time.perf_counter()
            run(*command, JAX_COMPILATION_CACHE_DIR=f"{folder}/cache")
            times.append(time.perf_counter() - start)
    return [
        ("a run of one step, nothing compiled before: s", f"{times[0]:.1f}", ""),
        ("the same again: s", f"{times[1]:.1f}", ""),
    ]


def install(smoke: bool) -> list[Row]:
    """Installs the package in a fresh environment. Returns size and time."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        before, start = size_of(Path(folder)), time.perf_counter()
        command = [f"{folder}/bin/python", "-m", "pip", "install", "--no-cache-dir", "--quiet"]
        subprocess.run([*command, str(ROOT)], check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - start
        size = (size_of(Path(folder)) - before) / 1e6
    return [
        ("installation: MB", f"{size:.0f}", ""),
        ("installation with downloads: s", f"{seconds:.0f}", ""),
    ]


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def code_lines(text: str) -> int:
    """Counts the lines of Python that hold code: no docstrings, comments or blank lines."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*blank, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def objective_lines(smoke: bool) -> list[Row]:
    """Counts the code of the built-in objectives."""
    files = sorted((ROOT / "mim_jax/objectives").glob("[a-z]*.py"))
    return [
        (f"lines of code of the objective {file.stem}", str(code_lines(file.read_text())), "")
        for file in files
    ]


PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "step_mae": lambda smoke: step_time("mae", smoke),
    "step_beit": lambda smoke: step_time("beit", smoke),
    "step_finetune": lambda smoke: step_time("finetune", smoke),
    "input": input_pipeline,
    "tpu": predicted,
    "first_step": first_step,
    "install": install,
    "objective": objective_lines,
}


def installed(name: str) -> str:
    """Returns the version of a package, "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def header() -> str:
    """Returns the date, the versions and the machine."""
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES if installed(name))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{datetime.date.today()}; {versions}; {machine}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, few rounds")
    flags = parser.parse_args(arguments)
    print(f"{header()}\n\n| part | what | figure | lowest to highest |\n|---|---|---|---|")
    for part in flags.only:
        try:
            rows = PARTS[part](flags.smoke)
        except (ImportError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            rows = [("not measured", str(error).replace("\n", " ").replace("|", "/"), "")]
        for what, figure, range_ in rows:
            print(f"| {part} | {what} | {figure} | {range_} |", flush=True)


if __name__ == "__main__":
    main()
