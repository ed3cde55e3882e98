"""Masks, images of classes: reading them, and checking each against its image before training.

A mask is a PNG of one channel with 1 to 16 bits, whose values are class numbers; for a palette
image these are the indices.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from mim_jax import UserError
from mim_jax.data.arrays import LARGE
from mim_jax.data.classes import UNKNOWN, VALUES, Classes
from mim_jax.data.decode import BadImageError, header
from mim_jax.data.manifest import in_threads, printable
from mim_jax.data.tree import Tree

ORIENTATION = 274  # the EXIF tag
one_large_mask = threading.Lock()


class Pair(NamedTuple):
    """The names of an image and of its mask."""

    image: str
    mask: str


def read_values(encoded: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Returns the values of a mask (H, W) in uint16.

    Raises BadImageError if it is not a mask, is too large or does not have the `size` (W, H) of its
    image.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=["PNG"])
        bits, mode = encoded[24], image.mode  # byte 24 of a PNG is its bit depth
        if size and image.size != size:
            own, other = (f"{width} x {height}" for width, height in (image.size, size))
            raise BadImageError(f"it has {own} pixels, its image {other}")
        if math.prod(image.size) > LARGE:
            raise BadImageError(f"it has more than {LARGE:,} pixels: cut image and mask into tiles")
        with one_large_mask if math.prod(image.size) > LARGE // 16 else contextlib.nullcontext():
            values = np.asarray(image)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError("it is not a whole PNG") from None
    except Exception as error:
        raise BadImageError(f"it is not a whole PNG ({error or type(error).__name__})") from error
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        problem = "has an alpha channel" if mode == "LA" else "is in color"
        raise BadImageError(f"it {problem} ({mode}): a mask must have one channel of class numbers")
    if mode == "L" and bits < 8:  # Pillow scales these to 0 to 255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint16)


def check_pairs(
    tree: Tree, pairs: Sequence[Pair], classes: Classes, channels: int = 0
) -> dict[Pair, tuple[int, int]]:
    """Checks the files of all pairs, unless they were checked before -> height and width of each.

    `channels` identifies the axes of arrays whose files do not.
    Raises UserError with the name of the first file that is wrong, and the number of others.
    """
    stamps = [tree.stamps[name] for pair in pairs for name in pair]
    key = hashlib.sha256(repr((tree.root, pairs, stamps, classes, channels)).encode()).hexdigest()[
        :20
    ]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    kept = cache / "mim_jax" / "masks" / f"{key}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent or damaged
        sizes = np.load(kept)
        if sizes.shape == (len(pairs), 2):
            return dict(zip(pairs, map(tuple, sizes.tolist()), strict=True))
    check = functools.partial(check_pair, tree, classes=classes, channels=channels)
    results = list(in_threads(check, pairs, at_once=16))
    wrong = [result for result in results if isinstance(result, str)]
    if wrong:
        others = f" ({len(wrong) - 1:,} other files are wrong too)" if len(wrong) > 1 else ""
        raise UserError(f"{printable(wrong[0])}.{others}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.array(results, np.int32))
    except OSError:
        pass  # the next run checks them again
    return dict(zip(pairs, results, strict=True))


def check_pair(
    tree: Tree, pair: Pair, classes: Classes, channels: int = 0
) -> tuple[int, int] | str:
    """Returns height and width of an image and its mask, or the problem with them."""
    try:
        name = pair.image
        with tree.open(name) as file:
            width, height, _ = header(file, channels)
            file.seek(0)
            if orientation(file) != 1:
                return (
                    f"{name} has an EXIF orientation, so the orientation of its mask is unclear: "
                    "store its pixels upright"
                )
        name = pair.mask
        with tree.open(name) as file:
            if orientation(file) != 1:
                return f"{name} has an EXIF orientation: store its pixels upright"
            file.seek(0)
            values = read_values(file.read(), (width, height))
    except BadImageError as error:
        return f"{name}: {error}"
    present = np.zeros(VALUES, bool)
    present[values] = True
    unknown = np.flatnonzero(present & (classes.table == UNKNOWN))
    if len(unknown):
        listed = ", ".join(map(str, unknown[:5].tolist()))
        return f"{pair.mask} has values without a class: {listed}"
    return height, width


def orientation(file: BinaryIO) -> int:
    """Returns the EXIF orientation of an image, 1 if it has none.

    Raises BadImageError for a file that is truncated before it.
    """
    try:
        return Image.open(file).getexif().get(ORIENTATION, 1)
    except Image.UnidentifiedImageError:  # an array, as .npy
        return 1
    except Exception as error:
        raise BadImageError(str(error) or type(error).__name__) from error
