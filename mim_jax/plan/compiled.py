"""Reads the text of a compiled program: its instructions, their predicted time, its collectives."""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ARRAYS = r"\b(pred|[a-z]+(\d+))\[([\d,]*)\](\{[^}]*\})?"
COMPUTATION = r"(ENTRY )?(%[\w.-]+) \(.*\{$"
CALLS = r"(?:body|to_apply|branch_computations|calls)=\{?(%[\w.-]+)"
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-[a-z]+"
NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


class Instruction(NamedTuple):
    """An operation of a compiled program."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    line: str
    times: int  # number of runs per step

    @property
    def is_kernel(self) -> bool:
        """Returns whether the instruction calls a Pallas kernel."""
        return 'custom_call_target="tpu_custom_call"' in self.line

    @property
    def source(self) -> str:
        """The operations in Python that it comes from, such as jit(f)/encoder/block_0/mul."""
        match = re.search(r'op_name="([^"]*)"', self.line)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """The TPU cycles that the compiler estimates for one run."""
        if self.opcode in NOTHING:
            return 0
        estimate = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(estimate[1]) if estimate else 0


class Collective(NamedTuple):
    """A collective of a compiled program.

    `bytes` is the size of the unsharded arrays that it moves: the results of an all-gather, the
    operands of a reduce-scatter.
    """

    kind: str
    dtype: str
    bytes: int
    group: int  # devices that it combines
    times: int  # number of runs per step
    overlaps: bool  # whether other work can run meanwhile
    rings: int  # number of axes of a slice that it uses at the same time


def instructions(text: str) -> dict[str, Instruction]:
    """Returns {name: instruction} of the operations of a compiled program that run.

    Loops of unknown length count once, such as those that draw random numbers by rejection. Of a
    conditional, only the first branch counts: `lax.cond` takes it unless its condition holds, which
    is rare in this library. Operations inside a fusion are not listed.
    """
    computations, entry = read(text)

    def walk(name: str, times: int) -> Iterator[Instruction]:
        for row in computations[name]:
            yield row._replace(times=times)
            if row.opcode in ("while", "call", "conditional"):
                for inner in re.findall(CALLS, row.line):
                    yield from walk(inner, times * (trip_count(row, computations) or 1))

    return {row.name: row for row in walk(entry, 1)}


def read(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = collections.defaultdict(list)
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(COMPUTATION, line):
            name = header[2]
            entry = name if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", line):
            operands = re.findall(r"%[\w.-]+", match[4].split("), ")[0])
            row = Instruction(match[1], match[2], match[3], operands, line, 1)
            computations[name].append(row)
    return computations, entry


def trip_count(row: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Returns the number of iterations of a loop, 1 for other operations, 0 if it is unknown.

    If the TPU compiler does not record it, it is read in the condition of the loop: the counter of
    a `scan`, which starts at 0, is less than a constant.
    """
    if row.opcode != "while":
        return 1
    if count := re.search(r"known_trip_count[^0-9]*(\d+)", row.line):
        return int(count[1])
    condition = re.search(r"condition=(%[\w.-]+)", row.line)
    rows = {x.name: x for x in computations.get(condition[1] if condition else "", [])}
    root = next((x for x in rows.values() if "ROOT " in x.line), row)
    opcodes = [rows[name].opcode for name in root.operands if name in rows]
    if "direction=LT" in root.line and opcodes == ["get-tuple-element", "constant"]:
        limit = re.search(r"constant\((\d+)\)", rows[root.operands[1]].line)
        return int(limit[1]) if limit else 0
    return 0


def unknown_loops(text: str) -> list[str]:
    """Returns the sources of the loops whose length is unknown."""
    computations, _ = read(text)
    loops = [row for row in instructions(text).values() if row.opcode == "while"]
    return sorted({row.source for row in loops if not trip_count(row, computations)})


def bytes_in_memory(shape: str) -> int:
    """Returns the bytes of arrays in HBM, that is, not in the on-chip memory space S(1)."""
    return sum(
        size_of(bits, sides)
        for _, bits, sides, layout in re.findall(ARRAYS, shape)
        if "S(1)" not in layout
    )


def size_of(bits: str, sides: str) -> int:
    """Returns the bytes of an array, given the bits of its type and its shape "8,128"."""
    count = math.prod(int(side) for side in sides.split(",") if side)
    return max(int(bits or 8) // 8, 1) * count


def collectives_of(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program.

    On TPUs, a gather that overlaps with other work is in several fusions with the same chain_id,
    and an all-reduce of which each chip keeps only a part may be in a computation named
    all-reduce-scatter.
    """
    times, rows = repetitions(text), []
    seen: set[str] = set()
    computation = ""
    for line in text.splitlines():
        if header := re.match(COMPUTATION, line):
            computation = header[2]
        # An asynchronous collective is counted at its -done instruction.
        match = re.search(rf" = (.*?) ({COLLECTIVES})(-done)?\(", line)
        chain = re.search(r'chain_id="(\d+)"', line)
        if not match or (chain and chain[0] in seen):
            continue
        seen |= {chain[0]} if chain else set()
        result, kind, done = match.groups()
        group = group_size(line)
        parts = group if kind == "reduce-scatter" else 1
        if computation.startswith("%all-reduce-scatter"):
            kind = "reduce-scatter"
        colors = re.search(r"Strategy\w+\{colors:(\d+)", line)
        for dtype, bits, sides, _ in re.findall(ARRAYS, result):
            row = Collective(
                kind,
                dtype,
                parts * size_of(bits, sides),
                group,
                times.get(computation, 1),
                overlaps=bool(done or chain),
                rings=int(colors[1]) if colors else 1,
            )
            rows.append(row)
    return rows


def repetitions(text: str) -> dict[str, int]:
    """Returns {name: number of runs} of the computations that the entry computation reaches."""
    computations, entry = read(text)
    times: collections.Counter[str] = collections.Counter()

    def walk(name: str, count: int) -> None:
        times[name] += count
        for row in computations[name]:
            for inner in re.findall(CALLS, row.line):
                if inner in computations:
                    walk(inner, count * (trip_count(row, computations) or 1))

    walk(entry, 1)
    return dict(times)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns {kind and type: (count, bytes of the unsharded arrays)} of a compiled program."""
    return total(collectives_of(text), lambda row: f"{row.kind} {row.dtype}")


def total(rows: Iterable[Collective], name_of) -> dict[str, tuple[int, int]]:
    """Returns {name: (count, bytes)} of collectives, including all repetitions."""
    moved: dict[str, tuple[int, int]] = {}
    for row in rows:
        count, size = moved.get(name_of(row), (0, 0))
        moved[name_of(row)] = count + row.times, size + row.times * row.bytes
    return moved


def group_size(line: str) -> int:
    """Returns the number of devices that a collective combines, 1 if it names no groups.

    The compiler has three notations for groups.
    """
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", line):  # jax 0.12
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    group = re.search(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])", line)
    if not group:
        return 1
    return int(group[2] or group[1].count(",") + 1)
