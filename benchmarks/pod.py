r"""Prints the memory, operations and communication of a run's step on a TPU slice.

    pip install -e '.[tpu]'
    python -m benchmarks.pod --config=configs/mae_large.py --topology=v5e:4x4 --config.fsdp=16

The TPU compiler compiles the step ahead of time, at full size, on any machine: no TPU and no data
are needed. For one chip the output contains:

- FLOPs and bytes read or written, as the compiler counts them: the body of a loop counts once;
- the memory of the state, of temporaries, and at its peak;
- the bytes moved by collectives, also as a multiple of the float32 parameters.

These figures are reproducible. If the step does not fit, the compiler's message is printed.
Compiling a ViT-L takes some minutes of one core. See benchmarks/tpu_step.py for predicted times.
"""

import argparse
import collections
import math
import re
import sys

from benchmarks.tpu_compiler import chips, trace
from mim_jax import cli

GB = 1e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--topology", default="v5e:4x4", help="for example v5e:4x4, v5p:2x2x4, v6e:8x8"
    )
    options, overrides = cli.parse(parser, argv)
    return cli.exit_code(lambda: report(options.config, overrides, options.topology), "")


def report(path: str, overrides: list[str], topology: str) -> int:
    """Compiles the step and prints the compiler's figures."""
    step = trace(path, overrides, chips(topology))
    print(f"{step.parameters:,} parameters\n{step.run.summary}", flush=True)
    compiled, seconds = step.compile()
    print(f"compiled in {seconds:.0f} s")

    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    print(f"FLOPs: {costs['flops'] / 1e12:.2f} T")
    print(f"memory read and written: {costs['bytes accessed'] / GB:.1f} GB")
    for name, count in (
        ("state and batch", memory.argument_size_in_bytes),
        ("temporaries", memory.temp_size_in_bytes),
        ("peak", memory.peak_memory_in_bytes),
    ):
        print(f"memory, {name}: {count / GB:.2f} GB")
    parameters = 4 * step.parameters
    for kind, (count, size) in sorted(collectives(compiled.as_text()).items()):
        print(f"{kind}: {count}, {size / GB:.3f} GB, {size / parameters:.2f} x parameters")
    return 0


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns {kind and type: (count, bytes of the whole arrays)} of a compiled program.

    Whole arrays are the results of an all-gather and the operands of a reduce-scatter. On TPUs, a
    gather that runs beside other work is in several fusions with the same chain_id, and an
    all-reduce of which a chip keeps its part is in a computation all-reduce-scatter.
    """
    kinds = "all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-[a-z]+"
    moved, seen, computation = collections.defaultdict(lambda: (0, 0)), set(), ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            computation = header[1]
        # What begins without waiting is counted where it is done.
        match = re.search(rf" = (.*?) ({kinds})(?:-done)?\(", line)
        chain = re.search(r'chain_id="(\d+)"', line)
        if not match or (chain and chain[0] in seen):
            continue
        seen |= {chain[0]} if chain else set()
        result, kind = match.groups()
        parts = group_size(line) if kind == "reduce-scatter" else 1
        if computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        for dtype, bits, sides in re.findall(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]", result):
            size = int(bits or 8) // 8 * math.prod(int(side) for side in sides.split(",") if side)
            count, total = moved[f"{kind} {dtype}"]
            moved[f"{kind} {dtype}"] = count + 1, total + parts * size
    return dict(moved)


def group_size(line: str) -> int:
    """Returns how many devices a collective combines, in each of the compiler's three notations."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", line):  # jax 0.12
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    group = re.search(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])", line)
    return int(group[2] or group[1].count(",") + 1)


if __name__ == "__main__":
    sys.exit(main())
