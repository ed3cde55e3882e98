"""Computes mean and standard deviation of each channel of a data set, in the form configs take.

    python -m mim_jax.data.statistics folder:/scenes --channels=13

The unit is that of objective.mean and objective.std: integers are divided by their type's maximum,
floats are used as they are. Every image has the same weight, whatever its size. Exit codes: 0 done,
2 user error, reported in one sentence.
"""

import argparse
import sys

import numpy as np
from tqdm import tqdm

from mim_jax import UserError
from mim_jax.data.decode import BadImageError, decode, type_of
from mim_jax.data.manifest import in_threads
from mim_jax.data.sources import open_sources

PIXELS = 2**18  # used of an image; of a larger one, every second, third, ... pixel is used


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.data.statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="as data.name in a config, for example folder:PATH")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--split", default="train")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--limit", type=int, default=10_000, help="number of images, 0 for all")
    options = parser.parse_args(argv)
    try:
        mean, std = statistics(**vars(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not std.all():
        print("a channel is constant: its std is written as 1", file=sys.stderr)
    for name, values in dict(mean=mean, std=np.where(std == 0, 1, std)).items():
        print(f"--config.objective.{name}='{tuple(float(f'{x:.4g}') for x in values)}'")
    return 0


def statistics(
    name: str, *, channels: int = 3, split: str = "train", data_dir: str = "", limit: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean (c,) and standard deviation (c,), float64, of a split of a data set.

    limit: number of images, drawn at random; 0 for all.

    Raises UserError if none of the images can be used.
    """
    (source,) = open_sources(name, (split,), data_dir=data_dir)
    dtype, count = type_of(source.mode), len(source.examples)
    drawn = np.random.default_rng(0).permutation(count)[: limit or count]

    def moments(i: int) -> np.ndarray | str:
        """Returns the means of the pixels and of their squares (2, c), or why there are none."""
        try:
            image = np.asarray(decode(source.examples[i]["image"], channels, dtype))
        except BadImageError as error:
            return str(error)
        stride = int(np.ceil((image.shape[0] * image.shape[1] / PIXELS) ** 0.5))
        pixels = image[::stride, ::stride].reshape(-1, channels).astype(np.float64)
        if dtype != "float32":
            pixels /= np.iinfo(dtype).max
        return np.stack([pixels.mean(0), (pixels**2).mean(0)])

    computed = list(
        tqdm(in_threads(moments, drawn, at_once=8), total=len(drawn), unit=" images", delay=3)
    )
    good = [pair for pair in computed if not isinstance(pair, str)]
    if not good:
        raise UserError(f"none of {len(drawn):,} images can be used; the first: {computed[0]}.")
    if len(good) < len(computed):
        print(
            f"{len(computed) - len(good):,} of {len(computed):,} images cannot be used",
            file=sys.stderr,
        )
    mean, squares = np.mean(good, axis=0)
    return mean, np.sqrt(np.maximum(squares - mean**2, 0))


if __name__ == "__main__":
    sys.exit(main())
