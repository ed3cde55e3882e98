"""The classes of a data set with masks: names, colors, and their values in the masks.

They are listed in a CSV file, `classes.csv`, one per line: the value in the masks, the name, and
optionally a color. Pixels of a value without a name are ignored:

    0,sky,#808080
    1,building,#800000
    11,

ADE20K's release, "ADEChallengeData2016", is recognized by its `objectInfo150.txt`: values 1 to 150
are the classes, and 0 is ignored ("reduce zero label").
"""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageColor

from mim_jax import UserError
from mim_jax.data.decode import BadImageError
from mim_jax.data.tree import Tree

VALUES = 2**16  # number of possible values of a mask
UNKNOWN, IGNORED = -2, -1  # entries of a table of classes by value


class Classes(NamedTuple):
    """The classes of a data set: class i has the i-th name, color and value in the masks."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...] = ()  # values of ignored pixels

    @property
    def dtype(self) -> np.dtype:
        """The smallest type for labels 0 to k - 1 and for its largest value, the ignored label."""
        return np.dtype(np.uint8 if len(self.names) <= 255 else np.uint16)

    @property
    def ignore_label(self) -> int:
        """The label of ignored pixels."""
        return int(np.iinfo(self.dtype).max)

    @property
    def table(self) -> np.ndarray:
        """The class of each value (65536,), IGNORED or UNKNOWN."""
        table = np.full(VALUES, UNKNOWN, np.int32)
        table[list(self.ignored)] = IGNORED
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def labels(self, values: np.ndarray) -> np.ndarray:
        """Maps values (H, W) to labels (H, W). Raises BadImageError for a value without a class."""
        labels = self.table[values]
        if (labels == UNKNOWN).any():
            raise BadImageError(
                f"it has the value {values[labels == UNKNOWN][0]}, which is not a class"
            )
        return np.where(labels == IGNORED, self.ignore_label, labels).astype(self.dtype)


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Returns the colors of PASCAL VOC without black, which is for ignored pixels.

    The bits of i + 1, three at a time, are the highest bits of red, green and blue of color i.
    """
    colors = []
    for index in range(1, count + 1):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append((color[0], color[1], color[2]))
    return tuple(colors)


def read_classes(tree: Tree, path: str) -> Classes:
    """Reads the classes of a data set. Raises UserError if they are unknown or wrong."""
    ade20k, own = "objectInfo150.txt", "classes.csv"
    if path:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.classes = {path!r} cannot be read: {error}.") from error
        return parse_classes(text, path)
    for listed, parse in ((own, lambda text: parse_classes(text, own)), (ade20k, parse_ade20k)):
        if listed in tree.stamps:
            try:
                text = tree.read(listed).decode("utf-8-sig")
            except (BadImageError, UnicodeDecodeError) as error:
                raise UserError(f"{tree.root}/{listed} cannot be read: {error}.") from error
            return parse(text)
    raise UserError(
        f"{tree.root} has no {own}: write it, or set data.classes to another file, with a line "
        "VALUE,NAME or VALUE,NAME,#RRGGBB for each class."
    )


def parse_classes(text: str, source: str) -> Classes:
    """Parses lines VALUE,NAME,COLOR, in which name and color may be missing."""
    classes: dict[int, tuple[str, tuple[int, ...] | None]] = {}
    ignored = []
    try:
        lines = list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise UserError(f"{source} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line] + ["", "", ""]
        value, name, color = cells[:3]
        if not any(cells) or (number == 1 and not re.search(r"\d", value)):
            continue
        where = f"{source}, line {number}: {','.join(line)!r}"
        if not value.isdecimal() or int(value) >= VALUES or len(line) > 3:
            raise UserError(f"{where} must be VALUE,NAME or VALUE,NAME,#RRGGBB.")
        if int(value) in classes or int(value) in ignored:
            raise UserError(f"{where}: the value {value} occurs twice.")
        if not name:
            ignored.append(int(value))
            continue
        if any(name == known for known, _ in classes.values()):
            raise UserError(f"{where}: the name {name!r} occurs twice.")
        try:
            classes[int(value)] = name, ImageColor.getrgb(color)[:3] if color else None
        except ValueError:
            raise UserError(f"{where}: {color!r} is not a color of the form #RRGGBB.") from None
    if len(classes) < 2:
        raise UserError(f"{source} must name at least 2 classes.")
    names, colors = zip(*classes.values(), strict=True)
    colors = [own or drawn for own, drawn in zip(colors, palette(len(colors)), strict=True)]
    return Classes(names, tuple(colors), tuple(classes), tuple(ignored))


def parse_ade20k(text: str) -> Classes:
    """Parses ADE20K's objectInfo150.txt: a header, then index, ..., name, separated by tabs."""
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
    names = tuple(row[-1].strip().partition(",")[0] for row in rows)
    try:
        values = tuple(int(row[0]) for row in rows)
    except ValueError as error:
        raise UserError(
            f"objectInfo150.txt must start its lines with a number: {error}."
        ) from error
    if len(names) < 2:
        raise UserError("objectInfo150.txt must name at least 2 classes.")
    return Classes(names, palette(len(names)), values, ignored=(0,))
