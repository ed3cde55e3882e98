"""Data sets without images, described by their sizes, to plan a run without its data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mim_jax import UserError
from mim_jax.data.classes import Classes
from mim_jax.data.decode import MODES
from mim_jax.data.sources import Source

PREFIX = "sizes:"
# Images of the training split, and classes of images or pixels, by a part of data.name.
KNOWN = {
    "imagenet2012": (1_281_167, 1000),
    "imagenet21k": (14_197_122, 21_841),
    "imagenet22k": (14_197_122, 21_841),
    "cifar100": (50_000, 100),
    "cifar10": (50_000, 10),
    "ADEChallengeData2016": (20_210, 150),
    "camvid": (367, 11),
}


class Absent(Sequence):
    """Examples that are counted, but cannot be read."""

    def __init__(self, count: int):
        self.length = count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any):
        raise UserError(f"data.name starts with {PREFIX}, which only `mim-jax plan` supports.")


def name_of(images: int, classes: int) -> str:
    """Returns the data.name of a data set with these sizes."""
    return f"{PREFIX}{images}/{classes}"


def known_sizes(name: str) -> tuple[int, int]:
    """Returns the number of images and classes of a well-known data set, otherwise (0, 0)."""
    return next((sizes for part, sizes in KNOWN.items() if part in name), (0, 0))


def open_described(
    name: str, splits: Sequence[str], channels: int, segmented: bool
) -> list[Source]:
    """Opens "sizes:IMAGES/CLASSES": sources without images, all splits of the same size.

    With `segmented`, the classes are those of pixels. Raises UserError if the sizes are not
    numbers.
    """
    images, _, classes = name.removeprefix(PREFIX).partition("/")
    if not images.isdecimal() or not classes.isdecimal() or int(images) < 1:
        raise UserError(f"data.name = {name!r} must be {PREFIX}IMAGES/CLASSES.")
    count, number = int(images), int(classes)
    source = Source(
        Absent(count),
        num_labels=0 if segmented else number,
        fingerprint=dict(name=name, version="", split="", examples=count),
        mode=MODES.get(channels, f"uint8 x {channels}"),
        name_of=lambda i: f"example {i}",
    )
    if segmented:
        names = tuple(f"class {i}" for i in range(number))
        colors = tuple((i % 256, i // 256 % 256, 0) for i in range(number))
        sizes = np.full((1, 2), 512)
        source = source._replace(classes=Classes(names, colors, tuple(range(number))), sizes=sizes)
    return [source._replace(fingerprint=source.fingerprint | dict(split=x)) for x in splits]
