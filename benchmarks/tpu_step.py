r"""How long a training step takes on a TPU v5e, as the TPU's own compiler predicts.

    pip install -e '.[tpu]'
    python -m benchmarks.tpu_step --config=configs/mae_base.py --images=64

Compiles the step for one chip (or a slice, --topology=v5e:4x4) on any machine. The compiler
schedules every operation and records how many cycles it expects it to take. Printed is the sum
over all operations, in loops as often as they run, at 1.5 GHz; by part of the network and kind of
work. Attention's Pallas kernels have no such estimate: they are compiled once more alone, and count
as the longer of their scheduled instructions and of their bytes at the memory's bandwidth.

MFU is by the FLOPs of matrix products and convolutions in the step as it is written, without
rematerialization, at 197 TFLOP/s. Predictions are for comparing programs: single matrix products
were predicted 14 % slower than by their FLOPs, large elementwise sums 3 times slower than by their
bytes. Collectives are not part of the sum, as they can run beside other work.
"""

import argparse
import collections
import glob
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.pod import collectives
from benchmarks.tpu_compiler import chips, trace
from mim_jax import UserError, cli, flops
from mim_jax.models import attention_tpu

CLOCK, PEAK, BANDWIDTH = 1.5e9, 197e12, 819e9  # of a v5e: Hz, FLOP/s, bytes/s
BITS = r"\b(pred|[a-z]+(\d+))\[([\d,]*)\](\{[^}]*\})?"
NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
KINDS = {  # of work, by the names of the operations that it comes from
    "attention": r"attention|bhmd|bhmn|softmax",
    "norm": r"norm",
    "GELU": r"gelu|erf",
    "MLP": r"fc1|fc2",
    "qkv and proj": r"qkv|proj",
    "optimizer": r"adam|update|optax",
}


class Instruction(NamedTuple):
    """An operation of a compiled program."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    line: str
    times: int  # how often it runs

    @property
    def is_kernel(self) -> bool:
        return 'custom_call_target="tpu_custom_call"' in self.line

    @property
    def work(self) -> tuple[str, str]:
        """The part of the network and the kind of work."""
        match = re.search(r'op_name="([^"]*)"', self.line)
        source = match[1] if match else ""
        parts = ("encoder", "decoder", "tokenizer")
        part = next((part for part in parts if re.search(rf"\b{part}\b", source)), "rest")
        if re.search(r"DalleEncoder|SmallEncoder", source):
            part = "tokenizer"
        kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, source))
        return part, next(kinds, "other")


class Kernel(NamedTuple):
    """The shapes and options of a compiled attention kernel."""

    backward: bool
    images: int
    tokens: int
    heads: int
    width: int  # of a head
    last: int
    biased: bool


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a config file")
    parser.add_argument("--topology", default="v5e:1x1", help="as v5e:4x4")
    parser.add_argument("--images", type=int, default=64, help="per chip")
    parser.add_argument("--text", help="also write the compiled program to this file")
    for name, count in dict(kernels="*", dump=None).items():  # used by kernel_cycles
        parser.add_argument(f"--{name}", nargs=count, help=argparse.SUPPRESS)
    options, overrides = cli.parse(parser, argv)
    if options.kernels:
        kernels = [Kernel(*map(int, words.split(","))) for words in options.kernels]
        return print_bundles(kernels, options.dump)
    if not options.config:
        parser.error("--config is required")
    return cli.exit_code(lambda: report(options, overrides), "")


def report(options: argparse.Namespace, overrides: list[str]) -> int:
    """Compiles the step and prints its predicted time."""
    if not options.topology.startswith("v5e"):
        raise UserError(f"--topology={options.topology}: predictions are for v5e, as v5e:4x4.")
    one = options.topology == "v5e:1x1"  # the compiler has no slice of one chip
    devices = chips("v5e:2x2")[:1] if one else chips(options.topology)
    batch = options.images * len(devices)
    step = trace(options.config, [f"batch_size={batch}", "accumulate=1", *overrides], devices)
    print(f"{step.parameters:,} parameters\n{step.run.summary}", flush=True)
    compiled, seconds = step.compile()
    text = compiled.as_text()
    if options.text:
        Path(options.text).write_text(text)
    print(f"compiled in {seconds:.0f} s", flush=True)

    program = instructions(text)
    loops = [
        x for x in program.values() if x.opcode == "while" and "known_trip_count" not in x.line
    ]
    if loops:
        print(f"{len(loops)} loops of unknown length, counted once: {sources(loops)}")
    cycles = kernel_cycles({kernel_of(x, program) for x in program.values() if x.is_kernel})
    rows = collections.Counter()
    for instruction in program.values():
        rows[instruction.work] += seconds_of(instruction, program, cycles)
    total = sum(rows.values())
    for (part, kind), share in rows.most_common():
        if share > 0.001 * total:
            print(f"{part:10} {kind:13} {1e3 * share:7.2f} ms {share / total:6.1%}")
    kernels = sum(seconds_of(x, program, cycles) for x in program.values() if x.is_kernel)
    count = flops.of_step(step.traced.jaxpr)
    print(f"sum: {1e3 * total:.1f} ms a step, of which kernels {1e3 * kernels:.1f} ms")
    print(f"{options.images / total:.0f} images/s per chip")
    print(
        f"MFU: {count / PEAK / total:.1%} ({count / 1e12:.2f} TFLOP, {count / PEAK * 1e3:.1f} ms)"
    )
    print(f"peak memory: {compiled.memory_analysis().peak_memory_in_bytes / 1e9:.1f} GB")
    for kind, (number, size) in sorted(collectives(text).items()):
        print(f"{kind}: {number}, {size / 1e9:.3f} GB")
    return 0


def instructions(text: str) -> dict[str, Instruction]:
    """Returns by name the operations of a compiled program that run, with how often they do.

    Loops of unknown length are taken to run once, such as those that draw random numbers by
    rejection and blocks of masks; `report` prints them.
    """
    computations, entry, name = collections.defaultdict(list), "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", line):
            operands = re.findall(r"%[\w.-]+", match[4].split("), ")[0])
            row = Instruction(match[1], match[2], match[3], operands, line, 1)
            computations[name].append(row)

    def walk(name: str, times: int) -> Iterator[Instruction]:
        for row in computations[name]:
            yield row._replace(times=times)
            if row.opcode in ("while", "call", "conditional"):
                count = re.search(r"known_trip_count[^0-9]*(\d+)", row.line)
                calls = r"(?:body|to_apply|branch_computations|calls)=\{?(%[\w.-]+)"
                for inner in re.findall(calls, row.line):
                    yield from walk(inner, times * (int(count[1]) if count else 1))

    return {row.name: row for row in walk(entry, 1)}


def sources(rows: list[Instruction]) -> str:
    """Returns the names of the operations in Python that operations of a program come from."""
    names = (re.search(r'op_name="([^"]*)"', row.line) for row in rows)
    return ", ".join(sorted({match[1] if match else "unknown" for match in names}))


def seconds_of(instruction: Instruction, program: dict[str, Instruction], kernels: dict) -> float:
    """Returns the predicted time of an operation, as often as it runs."""
    if instruction.opcode in NOTHING:
        return 0.0
    if instruction.is_kernel:
        scheduled = kernels[kernel_of(instruction, program)] / CLOCK
        operands = [program[name].shape for name in instruction.operands if name in program]
        moved = sum(map(bytes_in_memory, [instruction.shape, *operands]))
        return instruction.times * max(scheduled, moved / BANDWIDTH)
    estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
    return instruction.times * int(estimate[1]) / CLOCK if estimate else 0.0


def bytes_in_memory(shape: str) -> int:
    """Returns the bytes of arrays that do not lie on the chip, in memory space S(1)."""
    return sum(
        max(int(bits or 8) // 8, 1) * math.prod(int(side) for side in sides.split(",") if side)
        for _, bits, sides, layout in re.findall(BITS, shape)
        if "S(1)" not in layout
    )


def kernel_of(instruction: Instruction, program: dict[str, Instruction]) -> Kernel:
    """Returns which kernel of attention_tpu an operation is, by its shapes."""

    def shapes(text):
        return [tuple(map(int, sides.split(","))) for _, _, sides, _ in re.findall(BITS, text)]

    results = shapes(instruction.shape)
    operands = [shapes(program[name].shape)[0] for name in instruction.operands]
    backward = len(operands) > 2  # qkv and the bias, or also the gradient, y and the sums
    (b, n, features), (_, heads, last) = operands[0], operands[3] if backward else results[1]
    biased = len(operands) in (2, 5)
    return Kernel(backward, b, n, heads, features // 3 // heads, last, biased)


def kernel_cycles(kernels: set[Kernel]) -> dict[Kernel, int]:
    """Returns how many cycles each kernel is scheduled for: those of a grid step times its steps.

    The compiler dumps its schedules only if it is told so before it is loaded: hence the process.
    """
    ordered = sorted(kernels)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["dump_to=" + folder, "dump_llo_text=true", "dump_llo_static_gaps=true"]
        arguments = " ".join(f"--xla_jf_{flag}" for flag in flags)
        words = [",".join(str(int(x)) for x in kernel) for kernel in ordered]
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.tpu_step", f"--dump={folder}", "--kernels", *words],
            env=os.environ | dict(LIBTPU_INIT_ARGS=arguments),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    bundles = map(int, process.stdout.split())
    return {
        kernel: count * steps_of(kernel) for kernel, count in zip(ordered, bundles, strict=True)
    }


def steps_of(kernel: Kernel) -> int:
    """Returns how many steps the grid of a kernel has."""
    qkv = jax.ShapeDtypeStruct((kernel.images, kernel.tokens, 1), jnp.bfloat16)
    return kernel.images // attention_tpu.rows_of(qkv)


def print_bundles(kernels: list[Kernel], folder: str) -> int:
    """Compiles each kernel alone, and prints the bundles of a grid step from the dumped schedule.

    Schedules of single operations are of one custom call; `TLP` is the program around them.
    """
    for kernel in kernels:
        before = set(glob.glob(f"{folder}/*"))
        compile_kernel(kernel)
        for path in set(glob.glob(f"{folder}/*-schedule-analysis_final_bundles.txt")) - before:
            schedule = Path(path).read_text()
            if "tpu_custom_call" in schedule and "-TLP-" not in path:
                print(re.search(r"total scheduled bundles:\s+(\d+)", schedule)[1])
    return 0


def compile_kernel(kernel: Kernel) -> None:
    """Compiles a kernel alone."""
    backward, b, n, heads, width, last, biased = kernel
    qkv = jax.ShapeDtypeStruct((b, n, 3 * heads * width), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((b, last, heads * width), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((b, heads, last), jnp.float32)
    bias = jax.ShapeDtypeStruct((heads, n, n), jnp.float32) if biased else None

    def function(qkv, bias, y, sums):
        if backward:
            saved = qkv, bias, y, sums
            return attention_tpu.attention_backward(heads, last, False, saved, y)
        return attention_tpu.attention_forward(qkv, bias, heads, last, False)[0]

    mesh = Mesh(chips("v5e:2x2")[:1], "chip")
    everywhere = NamedSharding(mesh, PartitionSpec())
    jax.jit(function, in_shardings=everywhere).lower(qkv, bias, y, sums).compile()


if __name__ == "__main__":
    sys.exit(main())
