"""Converts weights between mim_jax and other libraries, and checks the result.

    mim-jax convert runs/mae_base mae_hf --to=hf --check
    mim-jax convert mae_pretrain_vit_base.pth runs/released --to=mim_jax
    mim-jax train --config=... --config.init_from.encoder=runs/released

Exit codes: 0 done, 1 the outputs differ, 2 user error, reported in one sentence.
"""

import argparse
import shlex
import sys

from mim_jax import cli
from mim_jax.convert.check import TOLERANCE, differences
from mim_jax.convert.files import license_note, load_weights, save_weights, summarize
from mim_jax.convert.fit import FAMILIES, encoder_only, resized
from mim_jax.convert.hugging_face import EPS
from mim_jax.convert.names import printable, shortened
from mim_jax.convert.network import Network


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("convert", __doc__)
    parser.add_argument(
        "source", help="a run, a .pth or .safetensors file, or a Hugging Face folder"
    )
    parser.add_argument(
        "destination", help="a .pth or .safetensors file; for hf and mim_jax a folder"
    )
    parser.add_argument("--to", required=True, choices=("mim_jax", *FAMILIES))
    parser.add_argument(
        "--check", action="store_true", help="compare PyTorch's model and ours on the same images"
    )
    parser.add_argument(
        "--encoder-only", action="store_true", help="leave out the decoder and the head"
    )
    parser.add_argument("--entry", default="", help="entry of the file, if it has several networks")
    parser.add_argument(
        "--image-size", type=size, default=None, help="384 or 256,384; positions are interpolated"
    )
    parser.add_argument("--heads", type=int, default=0, help="if the source does not record them")
    parser.add_argument("--decoder-heads", type=int, default=0, help="the same for MAE's decoder")
    options = parser.parse_args(argv)
    return cli.exit_code(lambda: convert(options), options.destination)


def size(text: str) -> tuple[int, int]:
    """Returns (384, 384) for "384" and (256, 384) for "256,384"."""
    height, _, width = text.partition(",")
    sides = int(height), int(width or height)
    if min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return sides


def convert(options: argparse.Namespace) -> int:
    """Converts and checks. Returns the exit code."""
    given = dict(heads=options.heads, decoder_heads=options.decoder_heads, size=options.image_size)
    given["encoder_only"] = options.encoder_only
    params, network, _ = load_weights(options.source, entry=options.entry, **given)
    print(f"{printable(options.source)}: {summarize(params, network)}")
    if network.left_out:
        names = shortened(list(network.left_out), 3)
        print(f"left out: {len(network.left_out)} arrays, {names}")
    if options.encoder_only:
        params, network = encoder_only(params, network)
    if options.image_size and network.kind != "dvae":
        if network.grid is None:  # no array depends on the grid
            (height, width), (p, q) = options.image_size, network.encoder.patch
            network = network._replace(grid=(height // p, width // q))
        elif options.image_size != network.size:
            params, network = resized(params, network, options.image_size)
            print("resized to {} x {}: positions are interpolated".format(*network.size))
    if note := license_note(options.source):
        print(note)
    if (eps := network.metadata.get("layer_norm_eps", EPS)) != EPS:
        print(
            f"warning: its config has layer_norm_eps = {eps:g}; MAE, BEiT and mim_jax use {EPS:g}"
        )
    written = save_weights(options.destination, params, network, options.to)
    print(f"{printable(options.destination)}: {written}")
    if options.to == "mim_jax":
        part = "tokenizer" if network.kind == "dvae" else "encoder"
        print(f"to start from it: --config.init_from.{part}={shlex.quote(options.destination)}")
    return check(params, network, options.to) if options.check else 0


def check(params: dict, network: Network, to: str) -> int:
    """Compares the network with PyTorch's, and prints the differences. Returns the exit code."""
    if to == "mim_jax":
        to = network.layout if network.layout != "mim_jax" else "timm"
        to = "hf" if to.startswith("hf_") else to  # a different model without its decoder
    title, largest = differences(params, network, to)
    print(f"mim_jax and {title} in float64, largest difference / largest value:")
    for name, value in largest.items():
        print(f"  {name:12s} {value:.1e}")
    if all(value <= TOLERANCE for value in largest.values()):  # False for NaN
        return 0
    print(f"failed: more than {TOLERANCE:g}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    cli.exit_with(main)
