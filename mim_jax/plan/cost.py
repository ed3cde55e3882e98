"""The predicted cost of a training step: memory, time and communication per device.

For TPUs, everything is read from the compiled program: the cycles that the compiler expects each
operation to take, the schedules of the attention kernels, and the bytes of collectives. A kernel
takes its scheduled time, or the time to move its bytes at the memory's bandwidth if that is longer.
Collectives that overlap with other work take no time; others take their bytes divided by the
bandwidth of the links. Use the predictions to compare programs: they are 11 to 14 % slower than the
FLOPs of single matrix products suggest (42 % on a v6e), and 3 times slower than the bytes of large
elementwise sums.

For CPUs, no time is predicted. For GPUs, it is the FLOPs at the share of the peak that one measured
run reached.
"""

import collections
import os
import re
from typing import Any, NamedTuple

import jax

from mim_jax.plan import memory
from mim_jax.plan.compiled import (
    Collective,
    Instruction,
    bytes_in_memory,
    collectives_of,
    instructions,
    total,
    unknown_loops,
)
from mim_jax.plan.hardware import Chip
from mim_jax.plan.kernels import Kernel, cycles_of, kernel_of
from mim_jax.plan.step import Compiled, Step
from mim_jax.sharding import line_length

SHARE = 0.25  # of a GPU's peak: MAE with ViT-B/16 on an H100, see README.md
PARTS = {  # by the names of the operations that an instruction comes from; the first one counts
    "tokenizer": r"\btokenizer\b|(?:Dalle|Small)(?:Encoder|Decoder)",
    "encoder": r"\bencoder\b",
    "decoder": r"\bdecoder\b",
}
WORK = {  # the same
    "attention": r"attention|bhmd|bhmn|softmax",
    "norm": r"norm",
    "GELU": r"gelu|erf",
    "MLP": r"fc1|fc2",
    "qkv and proj": r"qkv|proj",
}


class Cost(NamedTuple):
    """The cost of a step on each device."""

    step: Step
    how: str  # "compiler" or "arithmetic"
    fits: bool
    peak: float  # bytes of memory
    memory: dict[str, float]  # bytes by kind
    flops: float  # as the compiler counts them, loops as often as they run
    computing: float | None  # seconds; None: not predicted
    waiting: float  # seconds of collectives that do not overlap with computing
    collectives: dict[str, dict[str, Any]]  # by kind: count, bytes, theory, seconds
    parts: dict[tuple[str, str], float]  # seconds by part of the network and kind of work
    kernels: float = 0.0  # seconds of attention's kernels
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The predicted time of a step."""
        return None if self.computing is None else self.computing + self.waiting

    @property
    def images_per_second(self) -> float | None:
        """Images per second of each device."""
        return self.step.images / self.seconds if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """The share of the peak that the model's operations take."""
        peak = self.step.target.chip.peak
        return self.step.model_flops / peak / self.seconds if self.seconds and peak else None

    @property
    def days(self) -> float | None:
        """The time of the run, without evaluations and checkpoints."""
        return self.seconds * self.step.run.steps / 86400 if self.seconds else None


def cost_of(step: Step) -> Cost:
    """Returns the cost of a step. Compiles it if there is a compiler for its target.

    Raises UserError if it does not compile for a reason other than memory.
    """
    return from_compiler(step, step.compile()) if step.target.compiled else by_arithmetic(step)


def from_compiler(step: Step, compiled: Compiled) -> Cost:
    """Reads the cost of a compiled step."""
    chip = step.target.chip
    kinds: dict[str, float] = step.state_bytes | dict(batch=step.batch_bytes)
    if not compiled.fits:
        return Cost(step, "compiler", False, compiled.peak, kinds, 0.0, None, 0.0, {}, {})
    if chip.kind == "cpu":
        fits = compiled.peak * step.run.mesh.size <= memory_of_machine()
    else:
        fits = compiled.peak <= chip.memory
    for kind in ("temporaries", "program"):
        kinds[kind] = compiled.memory[kind]
    moved = collectives_of(compiled.text)
    cost = Cost(
        step,
        how="compiler",
        fits=fits,
        peak=compiled.peak,
        memory=kinds,
        flops=compiled.flops * step.config.accumulate,
        computing=None,
        waiting=sum(seconds_of_collective(row, chip) for row in moved if not row.overlaps),
        collectives=summary(moved, step),
        parts={},
    )
    return with_times(cost, compiled.text) if chip.clock else cost


def with_times(cost: Cost, text: str) -> Cost:
    """Returns a cost with the predicted times of the operations of a program for a TPU."""
    chip, program = cost.step.target.chip, instructions(text)
    kernels = {kernel_of(row, program) for row in program.values() if row.is_kernel}
    cycles = cycles_of(kernels, cost.step.target.name, cost.step.config.compile_cache)
    parts: dict[tuple[str, str], float] = collections.defaultdict(float)
    in_kernels = 0.0
    for row in program.values():
        seconds = seconds_of(row, program, cycles, chip)
        parts[work_of(row)] += seconds
        in_kernels += seconds if row.is_kernel else 0.0
    loops = unknown_loops(text)
    note = f"{len(loops)} loops of unknown length count once: {', '.join(loops)}"
    return cost._replace(
        computing=sum(parts.values()),
        parts=dict(sorted(parts.items(), key=lambda entry: -entry[1])),
        kernels=in_kernels,
        notes=(note,) if loops else (),
    )


def seconds_of(
    row: Instruction, program: dict[str, Instruction], kernels: dict[Kernel, int], chip: Chip
) -> float:
    """Returns the predicted time of all runs of an operation."""
    if not row.is_kernel:
        return row.times * row.cycles / chip.clock
    operands = [program[name].shape for name in row.operands if name in program]
    moved = sum(map(bytes_in_memory, [row.shape, *operands]))
    scheduled = kernels[kernel_of(row, program)] / chip.clock
    return row.times * max(scheduled, moved / chip.bandwidth)


def work_of(row: Instruction) -> tuple[str, str]:
    """Returns the part of the network and the kind of work of an operation."""
    parts = (part for part, pattern in PARTS.items() if re.search(pattern, row.source))
    part = next(parts, "rest")
    if row.is_kernel:
        return part, "attention"
    if part == "rest" and row.source and "shard_map" not in row.source:  # after the gradient
        return part, "optimizer"
    kinds = (kind for kind, pattern in WORK.items() if re.search(pattern, row.source))
    return part, next(kinds, "other")


# --- Communication. ---


def seconds_of_collective(row: Collective, chip: Chip) -> float:
    """Returns the time of all runs of a collective, by the bandwidth of the links.

    Rings use the links in both directions.
    """
    if not chip.link:
        return 0.0
    share = (row.group - 1) / row.group
    rounds = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}.get(row.kind, 1.0)
    return row.times * rounds * share * row.bytes / (2 * chip.link * row.rings)


def summary(rows: list[Collective], step: Step) -> dict[str, dict[str, Any]]:
    """Returns the count, bytes and time of collectives by kind, and the minimum of bytes."""
    expected = theory(step)
    table: dict[str, dict[str, Any]] = {}
    for kind, (count, size) in sorted(total(rows, lambda row: row.kind).items()):
        of_kind = [row for row in rows if row.kind == kind]
        waiting = [row for row in of_kind if not row.overlaps]
        table[kind] = dict(
            count=count,
            bytes=size,
            theory_bytes=expected.get(kind, 0),
            bytes_by_dtype={k: x for k, (_, x) in total(of_kind, lambda row: row.dtype).items()},
            waiting_seconds=sum(seconds_of_collective(x, step.target.chip) for x in waiting),
        )
    return table


def theory(step: Step) -> dict[str, int]:
    """Returns the minimum of bytes that a step must move by collectives, by kind.

    Sharded parameters are gathered once, in the dtype in which they are used, and buffers in their
    own. Their gradients are reduce-scattered once, in float32, across the lines of a slice and then
    along them. Other gradients, and those of several copies of the state, are all-reduced.
    """
    mesh, parameters = step.run.mesh, step.start.parameters
    if mesh.size == 1:
        return {}
    shards, divided = mesh.shape["fsdp"], step.split_parameters
    line = line_length(mesh)
    expected = {"all-reduce": 4 * (parameters - divided)}
    if mesh.shape["data"] > 1:
        expected["all-reduce"] += 4 * divided // shards
    if divided:
        second = divided * line // shards if line < shards else 0
        parameters_read = divided * jax.numpy.dtype(step.run.dtype).itemsize
        expected["all-gather"] = parameters_read + step.split_buffer_bytes
        expected["reduce-scatter"] = 4 * (divided + second)
    return expected


# --- Arithmetic, for devices without a compiler. ---


def by_arithmetic(step: Step) -> Cost:
    """Returns the cost of a step by its FLOPs, its arrays and its parameters."""
    chip, devices = step.target.chip, step.run.mesh.size
    kinds = step.state_bytes
    gradient = memory.step_peak(step.traced.jaxpr)
    others = sum(size for name, size in kinds.items() if name not in ("parameters", "buffers"))
    peak = gradient + others
    known = sum(kinds.values()) + step.batch_bytes
    kinds |= dict(batch=step.batch_bytes, temporaries=max(peak - known, 0.0))
    fits, table, waiting = peak <= chip.memory, {}, 0.0
    for kind, size in theory(step).items():
        row = Collective(kind, "", size, devices, 1, False, 1)
        seconds = seconds_of_collective(row, chip)
        waiting += seconds
        table[kind] = dict(count=1, bytes=size, theory_bytes=size, waiting_seconds=seconds)
    return Cost(
        step,
        how="arithmetic",
        fits=fits,
        peak=peak,
        memory=kinds,
        flops=step.flops,
        computing=step.flops / (SHARE * chip.peak) if fits else None,
        waiting=waiting,
        collectives=table,
        parts={},
    )


def memory_of_machine() -> float:
    """Returns the bytes of this machine's memory, which its CPU devices share."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
