"""Prints the contents of a run, a file of weights or a Hugging Face folder.

    mim-jax inspect runs/mae_base
    mim-jax inspect mae_pretrain_vit_base.pth

Exit codes: 0 done, 2 user error.
"""

import json
import math
import signal
import sys

from mim_jax import cli, goodput, workdir
from mim_jax.checkpoint.trees import flat
from mim_jax.convert.files import license_note, load_weights, summarize
from mim_jax.convert.names import printable

HIDDEN = ("config", "parts", "trajectory")  # entries that are too long to print


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("inspect", __doc__)
    parser.add_argument(
        "source", help="a run, a .pth or .safetensors file, or a Hugging Face folder"
    )
    options = parser.parse_args(argv)
    return cli.exit_code(lambda: show(options.source), options.source)


def show(source: str) -> int:
    """Prints the network of a source, its parts and arrays, and its other entries."""
    params, network, entries = load_weights(source)
    print(summarize(params, network))
    if note := license_note(source):
        print(note)
    if note := time_note(source):
        print(note)
    for part, tree in params.items():
        arrays = flat(tree)
        count = sum(math.prod(x.shape) for x in arrays.values())
        print(f"\n{part}: {count:,} parameters in {len(arrays)} arrays")
        for path, x in arrays.items():
            print(f"  {path:44s} {x.dtype!s:8s} {' x '.join(map(str, x.shape))}")
    for name in network.left_out:
        print(f"left out: {printable(name)}")
    metadata = network.metadata | {k: v for k, v in entries.items() if k not in HIDDEN}
    print()
    for name, value in metadata.items():
        print(f"{printable(name)}: {printable(json.dumps(value), 1000)}")
    if "config" in entries:
        print(f"config: {json.dumps(entries['config'], indent=2)}")
    return 0


def time_note(source: str) -> str:
    """Returns what the time of a run was spent on, "" for other sources."""
    records = workdir.read_lines(workdir.open_path(source) / "metrics.jsonl")
    seconds = goodput.newest(records)
    if not (total := sum(seconds.values())):
        return ""
    return f"time: {total:,.0f} s of all processes: {goodput.describe(seconds)}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it quietly
    sys.exit(main())
