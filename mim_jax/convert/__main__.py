"""Converts weights: others' to ours, ours to others', with a proof.

    python -m mim_jax.convert runs/mae_base mae_hf --to=hf --check
    python -m mim_jax.convert mae_pretrain_vit_base.pth runs/released --to=mim_jax
    python -m mim_jax.main --config=... --config.init_from.encoder=runs/released

Exit codes: 0 done, 1 not the same numbers, 2 a mistake in what was asked for, in one sentence.
"""

import argparse
import sys

from mim_jax.cli import exit_code
from mim_jax.convert.check import TOLERANCE, differences
from mim_jax.convert.files import licence, load, save, story
from mim_jax.convert.fit import FAMILIES, encoder_only, resized


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.convert", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("source", help="a run, a .pth or .safetensors, a folder of Hugging Face")
    parser.add_argument("destination", help="a .pth or .safetensors; of hf and mim_jax, a folder")
    parser.add_argument("--to", required=True, choices=("mim_jax", *FAMILIES))
    parser.add_argument(
        "--check", action="store_true", help="run PyTorch's model and ours on the same images"
    )
    parser.add_argument("--encoder-only", action="store_true", help="leave decoder and head out")
    parser.add_argument(
        "--image-size", type=size, default=None, help="384 or 256,384: interpolates positions"
    )
    parser.add_argument("--heads", type=int, default=0, help="where they are not recorded")
    parser.add_argument("--decoder-heads", type=int, default=0, help="the same of MAE's decoder")
    options = parser.parse_args(argv)
    return exit_code(lambda: convert(options), options.destination)


def size(text: str) -> tuple[int, int]:
    """ "384" -> (384, 384); "256,384" -> (256, 384)."""
    height, _, width = text.partition(",")
    return int(height), int(width or height)


def convert(options: argparse.Namespace) -> int:
    """What the command does. -> its exit code."""
    known = dict(heads=options.heads, decoder_heads=options.decoder_heads, size=options.image_size)
    params, about, _ = load(options.source, **known)
    print(f"{options.source}: {story(params, about)}")
    if about.left_out:
        more = ", ..." if len(about.left_out) > 3 else ""
        print(f"left out: {len(about.left_out)} arrays, {', '.join(about.left_out[:3])}{more}")
    if options.encoder_only:
        params, about = encoder_only(params, about)
    if options.image_size and about.kind != "dvae":
        if about.grid is None:  # said now: nothing is known to be of another size
            grid = [side // p for side, p in zip(options.image_size, about.patch, strict=True)]
            about = about._replace(grid=tuple(grid))
        elif options.image_size != about.size:
            params, about = resized(params, about, options.image_size)
            print("for images of {} x {}: positions are interpolated".format(*about.size))
    if note := licence(options.source):
        print(note)
    if (eps := about.facts.get("layer_norm_eps", 1e-6)) != 1e-6:
        print(f"its config says layer_norm_eps = {eps:g}; MAE's, BEiT's and our code have 1e-06")
    print(f"{options.destination}: {save(options.destination, params, about, options.to)}")
    if not options.check:
        return 0
    to = options.to
    if to == "mim_jax":
        to = about.layout if about.layout != "mim_jax" else "timm"
    title, far = differences(params, about, to)
    print(f"ours and {title}, in float64: max|difference| by max|value|")
    for name, value in far.items():
        print(f"  {name:12s} {value:.1e}")
    if all(value <= TOLERANCE for value in far.values()):  # a NaN is not
        return 0
    print(f"failed: more than {TOLERANCE:g}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
