"""Predicted times of the Pallas attention kernels for TPUs, from their instruction schedules.

Compiled programs contain no estimate for kernels. The compiler dumps schedules only if that is
requested before it is loaded, so the kernels are compiled again, in a separate process.
"""

import glob
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax import UserError
from mim_jax.models import attention_tpu
from mim_jax.plan.cache import file_of, read, versions, write
from mim_jax.plan.compiled import ARRAYS, Instruction
from mim_jax.plan.hardware import target_of


class Kernel(NamedTuple):
    """The shapes and options of a compiled attention kernel."""

    backward: bool
    images: int
    tokens: int
    heads: int
    width: int  # of a head
    last: int
    biased: bool


def kernel_of(instruction: Instruction, program: dict[str, Instruction]) -> Kernel:
    """Returns the kernel of attention_tpu that an operation calls, identified by its shapes."""

    def shapes(text):
        return [tuple(map(int, sides.split(","))) for _, _, sides, _ in re.findall(ARRAYS, text)]

    results = shapes(instruction.shape)
    operands = [shapes(program[name].shape)[0] for name in instruction.operands]
    backward = len(operands) > 2  # qkv and the bias, or also the gradient, y and the sums
    (b, n, features), (_, heads, last) = operands[0], operands[3] if backward else results[1]
    biased = len(operands) in (2, 5)
    return Kernel(backward, b, n, heads, features // 3 // heads, last, biased)


def cycles_of(kernels: set[Kernel], target: str, cache: str) -> dict[Kernel, int]:
    """Returns the scheduled cycles of each kernel: those of a grid step, times its grid steps.

    Args:
        kernels: the kernels.
        target: the TPU slice, such as v5e:4x4.
        cache: folder in which results are cached, or "".

    Raises UserError if the compiler dumps no schedule.
    """
    code = Path(attention_tpu.__file__).read_bytes()
    files = {x: file_of(cache, [target, *versions(), str(x), code.hex()]) for x in kernels}
    kept = {kernel: read(file) for kernel, file in files.items()}
    cycles = {kernel: int(content) for kernel, content in kept.items() if content}
    for kernel, count in compiled(kernels - cycles.keys(), target).items():
        cycles[kernel] = count
        write(files[kernel], str(count).encode())
    return cycles


def compiled(kernels: set[Kernel], target: str) -> dict[Kernel, int]:
    """Compiles kernels and returns their cycles."""
    if not kernels:
        return {}
    ordered = sorted(kernels)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["dump_to=" + folder, "dump_llo_text=true", "dump_llo_static_gaps=true"]
        options = " ".join(f"--xla_jf_{flag}" for flag in flags)
        words = [",".join(str(int(x)) for x in kernel) for kernel in ordered]
        process = subprocess.run(
            [sys.executable, "-m", "mim_jax.plan.kernels", target, folder, *words],
            env=os.environ | dict(LIBTPU_INIT_ARGS=options),
            check=False,
            capture_output=True,
            text=True,
        )
    bundles = [int(word) for word in process.stdout.split() if word.isdecimal()]
    if process.returncode or len(bundles) != len(ordered):
        lines = process.stderr.strip().splitlines() or ["no schedule was dumped"]
        raise UserError(f"the time of the attention kernels is unknown: {lines[-1]}")
    return {
        kernel: count * steps_of(kernel) for kernel, count in zip(ordered, bundles, strict=True)
    }


def steps_of(kernel: Kernel) -> int:
    """Returns the number of steps of a kernel's grid."""
    qkv: Any = jax.ShapeDtypeStruct((kernel.images, kernel.tokens, 1), jnp.bfloat16)
    return kernel.images // attention_tpu.rows_of(qkv)


def main(argv: list[str]) -> int:
    """Compiles kernels and prints the bundles of a grid step of each, from its dumped schedule.

    Arguments are the target, the folder of the dump, and each kernel as numbers "1,64,50,...". The
    dump has one schedule per custom call; `TLP` is the program around them.
    """
    target, folder, *kernels = argv
    for words in kernels:
        before = set(glob.glob(f"{folder}/*"))
        backward, b, n, heads, width, last, biased = map(int, words.split(","))
        kernel = Kernel(bool(backward), b, n, heads, width, last, bool(biased))
        compile_kernel(kernel, target_of(target).devices[0])
        for path in set(glob.glob(f"{folder}/*-schedule-analysis_final_bundles.txt")) - before:
            schedule = Path(path).read_text()
            bundles = re.search(r"total scheduled bundles:\s+(\d+)", schedule)
            if "tpu_custom_call" in schedule and "-TLP-" not in path and bundles:
                print(bundles[1])
    return 0


def compile_kernel(kernel: Kernel, device) -> None:
    """Compiles a single kernel."""
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

    everywhere = NamedSharding(Mesh([device], "chip"), PartitionSpec())
    jax.jit(function, in_shardings=everywhere).lower(qkv, bias, y, sums).compile()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
