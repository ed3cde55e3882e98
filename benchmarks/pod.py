r"""What a run would ask of a TPU slice that one does not have, by the TPU's own compiler.

    pip install -e '.[tpu]'
    python -m benchmarks.pod --config=configs/mae_large.py --topology=v5e:4x4 --config.fsdp=16

Compiles the run's step ahead of time, as it is, at full size, on any machine. Printed are, of one
chip: FLOPs and bytes of memory read or written, as the compiler counts them (of a part of the
batch, where it is taken in parts: a loop's body counts once); memory for the state, for all else,
and at its peak; what collectives gather and add up, also as a multiple of the parameters' bytes in
float32. These are exact, and the same every time; seconds are of the compilation. Data are not
needed: their shapes are the built-in emoji's, at the config's size. A step that does not fit ends
with the compiler's sentence. Compiling a ViT-L takes some ten minutes of a core.
"""

import argparse
import collections
import math
import os
import re
import sys
import time

import jax
from jax.experimental import topologies

from mim_jax import UserError, cli, recipe, schema
from mim_jax.start import Start

DATA = ("name=emoji", "split=train", "evaluation_split=validation", "data_dir=", "labels=")
GB = 1e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", default="v5e:4x4", help="as v5e:4x4, v5p:2x2x4, v6e:8x8")
    options, overrides = cli.parse(parser, argv)
    return cli.exit_code(lambda: report(options.config, overrides, options.topology), "")


def report(path: str, overrides: list[str], topology: str) -> int:
    """Compiles the step and prints what the compiler says of it."""
    devices = chips(topology)
    rest = ["init_from.tokenizer=random", "steps=10000"]
    config = schema.load(path, [*(f"data.{word}" for word in DATA), *rest, *overrides])
    run = recipe.build(config, devices)
    start = Start(run, config)
    print(f"{start.parameters:,} parameters\n{run.summary}", flush=True)

    begun = time.perf_counter()
    try:
        compiled = start.trace_step().lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the step does not compile: {str(error).splitlines()[0]}") from None
    print(f"compiled in {time.perf_counter() - begun:.0f} s")

    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    print(f"FLOPs: {costs['flops'] / 1e12:.2f} T")
    print(f"memory read and written: {costs['bytes accessed'] / GB:.1f} GB")
    for name, count in (
        ("state and batch", memory.argument_size_in_bytes),
        ("temporaries", memory.temp_size_in_bytes),
        ("peak", memory.peak_memory_in_bytes),
    ):
        print(f"memory, {name}: {count / GB:.2f} GB")
    parameters = 4 * start.parameters
    for kind, (count, size) in sorted(collectives(compiled.as_text()).items()):
        print(f"{kind}: {count}, {size / GB:.3f} GB, {size / parameters:.2f} x parameters")
    return 0


def chips(topology: str) -> list:
    """The devices of a slice that need not be there."""
    kind, _, shape = topology.partition(":")
    count = math.prod(int(side) for side in shape.split("x") if side.isdigit())
    name = {"v5e": "v5litepod"}.get(kind, kind)
    jax.config.update("jax_platforms", "cpu")  # no chip is looked for, nor kept from others
    os.environ |= dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ |= dict(TPU_ACCELERATOR_TYPE=f"{name}-{count}", TPU_WORKER_HOSTNAMES="localhost")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of many kinds, by what is amiss
        raise UserError(
            f"there is no compiler for --topology={topology}: pip install -e '.[tpu]', and say one "
            f"as v5e:4x4 ({str(error).splitlines()[0]})."
        ) from None


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind and type: (how many, bytes of the whole arrays)} in a compiled program.

    Whole are what an all-gather gives out and what a reduce-scatter takes in. Two things of TPUs:
    one gather that runs beside other work stands in several fusions, under the same chain_id; and
    an all-reduce of which a chip keeps its part stands in a computation all-reduce-scatter.
    """
    kinds = "all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-[a-z]+"
    found, seen, computation = collections.defaultdict(lambda: (0, 0)), set(), ""
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
        parts = 1
        if kind == "reduce-scatter":
            group = re.search(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])", line)
            parts = int(group[2] or group[1].count(",") + 1)
        if computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        for dtype, bits, sides in re.findall(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]", result):
            size = int(bits or 8) // 8 * math.prod(int(side) for side in sides.split(",") if side)
            count, total = found[f"{kind} {dtype}"]
            found[f"{kind} {dtype}"] = count + 1, total + parts * size
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
