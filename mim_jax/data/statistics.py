"""Computes the mean and standard deviation of each channel of a data set, for a config.

    mim-jax statistics folder:/scenes --channels=13

Results are in the unit of objective.mean and objective.std: integers are divided by their type's
maximum, floats are unchanged. Every image has the same weight, regardless of its size. Exit codes:
0 done, 2 user error, reported in one sentence.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mim_jax import UserError, cli
from mim_jax.data.decode import BadImageError, decode, type_of
from mim_jax.data.manifest import in_threads
from mim_jax.data.sources import Source, open_sources
from mim_jax.progress import track

FACTOR = 10  # largest deviation of normalized values from unit variance
PIXELS = 2**18  # most pixels used of an image; larger ones are subsampled


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("statistics", __doc__)
    parser.add_argument("name", help="as data.name in a config, for example folder:PATH")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--split", default="train")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--limit", type=int, default=10_000, help="number of images, 0 for all")
    options = parser.parse_args(argv)

    def command() -> int:
        mean, std = statistics(**vars(options))
        if not std.all():
            print("a channel is constant: its std is written as 1", file=sys.stderr)
        for name, values in dict(mean=mean, std=np.where(std == 0, 1, std)).items():
            print(f"--config.objective.{name}='{tuple(float(f'{x:.4g}') for x in values)}'")
        return 0

    return cli.exit_code(command, "")


class Values(NamedTuple):
    """Statistics of pixels per channel (c,), in the unit of objective.mean."""

    dtype: str  # as stored
    images: int
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    bad: list[tuple[int, str]]  # examples that cannot be decoded, and why

    def __str__(self) -> str:
        unit = np.iinfo(self.dtype).max if self.dtype != "float32" else 1
        low, high = float(self.low.min() * unit), float(self.high.max() * unit)
        return f"{self.dtype} values from {low:,.6g} to {high:,.6g} in {self.images:,} images"


def statistics(
    name: str, *, channels: int = 3, split: str = "train", data_dir: str = "", limit: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean (c,) and standard deviation (c,), float64, of a split of a data set.

    Args:
        limit: number of images, drawn at random; 0 for all.

    Raises UserError if none of the images can be used.
    """
    (source,) = open_sources(name, (split,), data_dir=data_dir)
    values = observe(source, channels, limit)
    if values.bad:
        total = values.images + len(values.bad)
        print(f"{len(values.bad):,} of {total:,} images cannot be used", file=sys.stderr)
    print(values, file=sys.stderr)
    return values.mean, values.std


def observe(source: Source, channels: int, limit: int = 0) -> Values:
    """Decodes images of a source and summarizes their pixels.

    Args:
        limit: number of images, drawn at random; 0 for all.

    Raises UserError if none of the images can be used.
    """
    dtype, count = type_of(source.mode), len(source.examples)
    drawn = np.random.default_rng(0).permutation(count)[: limit or count]
    unit = 1 if dtype == "float32" else np.iinfo(dtype).max

    def summarize(i: int) -> np.ndarray | str:
        """Returns lowest, highest, mean and mean square (4, c), or the reason of a failure."""
        try:
            image = np.asarray(decode(source.examples[i]["image"], channels, dtype))
        except BadImageError as error:
            return str(error)
        stride = int(np.ceil((image.shape[0] * image.shape[1] / PIXELS) ** 0.5))
        pixels = image[::stride, ::stride].reshape(-1, channels).astype(np.float64) / unit
        return np.stack([pixels.min(0), pixels.max(0), pixels.mean(0), (pixels**2).mean(0)])

    good, bad = [], []
    summaries = in_threads(summarize, drawn.tolist(), at_once=8)
    summaries = track(summaries, "reading values", len(drawn), unit="images")
    for i, summary in zip(drawn, summaries, strict=True):
        if isinstance(summary, str):
            bad.append((int(i), summary))
        else:
            good.append(summary)
    if not good:
        raise UserError(f"none of {len(drawn):,} images can be used; the first: {bad[0][1]}.")
    low, high, mean, squares = np.stack(good, axis=1)  # (images, c) each
    std = np.sqrt(np.maximum(squares.mean(0) - mean.mean(0) ** 2, 0))
    return Values(dtype, len(good), low.min(0), high.max(0), mean.mean(0), std, bad)


def range_problem(values: Values, mean: Sequence[float], std: Sequence[float]) -> str:
    """Returns an error message if mean and std do not fit the values of images, otherwise "".

    Normalized values should have about zero mean and unit variance. It is an error if the absolute
    mean or the deviation of any channel exceeds FACTOR, as for floats in 0 to 255, or if the
    deviation of all channels is less than 1 / FACTOR, as for 12 bits stored in 16.

    Args:
        mean, std: objective.mean and objective.std, one value per channel or one for all.
    """
    mean_, std_ = (np.asarray(x, np.float64) for x in (mean, std))
    width, offset = values.std / std_, np.abs(values.mean - mean_) / std_
    # With std = 1 images are not normalized; the deviation of values in [0, 1] is at most 0.5.
    least = values.std / (std_ if values.dtype == "float32" else np.minimum(std_, 0.5))
    narrow = 0 < least.max() < 1 / FACTOR  # constant images have no range to judge
    if width.max() <= FACTOR and offset.max() <= FACTOR and not narrow:
        return ""
    return (
        f"objective.mean = {tuple(mean)} and objective.std = {tuple(std)} do not fit the images, "
        f"which have {values}, mean {format_numbers(values.mean)} and std "
        f"{format_numbers(values.std)} in that unit: set both to the output of "
        "`mim-jax statistics`."
    )


def format_numbers(values: np.ndarray) -> str:
    """Formats a few numbers for a message."""
    return ", ".join(f"{x:.4g}" for x in values[:4]) + (", ..." if len(values) > 4 else "")


if __name__ == "__main__":
    cli.exit_with(main)
