"""Data sets of images with masks: finds the pairs of files and opens their splits.

A data set is a folder or a zip file. Images are in `images/<split>/` and masks in `masks/<split>/`
(or `annotations/`), with the same path except for the suffix; or an image and its mask are in the
same folder, with the same stem (`train/a.jpg`, `train/a.png`). See masks.py for the files of masks
and classes.py for the list of the classes.
"""

import hashlib
import os
import posixpath
import zlib
from collections import defaultdict
from collections.abc import Sequence
from itertools import repeat

import numpy as np

from mim_jax import UserError
from mim_jax.data import emoji_masks
from mim_jax.data.classes import Classes, read_classes
from mim_jax.data.decode import BadImageError, header
from mim_jax.data.folder import MASK_FOLDERS, select
from mim_jax.data.layout import layout
from mim_jax.data.manifest import printable
from mim_jax.data.masks import Pair, check_pairs, read_values
from mim_jax.data.sources import Source, open_sources
from mim_jax.data.tree import Tree

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".npy")


class Pairs:
    """Examples: examples[i] is {"image": encoded bytes, "mask": encoded bytes}."""

    def __init__(self, tree: Tree, pairs: Sequence[Pair]):
        self.tree, self.pairs = tree, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        image, mask = self.pairs[i]
        return {"image": self.tree.read(image), "mask": self.tree.read(mask)}

    def name(self, i: int) -> str:
        """Returns the name of image i."""
        return self.pairs[i].image


def open_masked(
    name: str, splits: Sequence[str], classes: str = "", channels: int = 0
) -> list[Source]:
    """Opens the splits of a data set with masks, and checks each of its files.

    Args:
        name: `folder:PATH` of a folder or zip file, or `emoji`, whose masks are derived from
            colors.
        classes: the CSV file of the classes; "" is `classes.csv` in the folder, or ADE20K's own
            list.
        channels: data.channels, which decides the axes of arrays whose files do not name them.

    Raises UserError, with the name of the file, for an image without a mask or a mask without an
    image, different sizes, a colored mask, a value without a class, or a file that is not an image.
    """
    if name == "emoji":
        return [emoji_masks.add_masks(source) for source in open_sources(name, splits)]
    if not name.removeprefix("folder:") or not name.startswith("folder:"):
        raise UserError(
            f"data.name = {name!r} has no masks: set folder:PATH with images and masks, or emoji."
        )
    tree = Tree(name.removeprefix("folder:"))
    known = read_classes(tree, classes)
    pairs = pairs_of(tree)
    rows = split_rows(pairs)
    chosen = [[pairs[row] for row in select(rows, split, tree.root)] for split in splits]
    sizes = check_pairs(tree, sorted({pair for pairs in chosen for pair in pairs}), known, channels)
    return [
        make_source(tree, pairs, split, known, sizes)
        for pairs, split in zip(chosen, splits, strict=True)
    ]


def make_source(
    tree: Tree, pairs: Sequence[Pair], split: str, classes: Classes, sizes: dict[Pair, tuple]
) -> Source:
    """Returns the source of a split; `sizes` has the height and width of each image."""
    examples = Pairs(tree, pairs)
    digest = hashlib.sha256(repr((classes.values, classes.ignored)).encode())
    for pair in pairs:
        stamps = [tree.stamps[name][0] for name in pair]  # bytes: times differ between copies
        digest.update(repr((pair, stamps)).encode())
    return Source(
        examples,
        num_labels=0,
        fingerprint=dict(
            name="masks", version=digest.hexdigest()[:16], split=split, examples=len(pairs)
        ),
        mode=mode_of(tree, pairs[0].image),
        name_of=lambda i: printable(examples.name(i)),
        unread=[(printable(name), reason) for name, reason in tree.unread],
        classes=classes,
        sizes=np.array([sizes[pair] for pair in pairs], np.int32),
    )


def mode_of(tree: Tree, name: str) -> str:
    """Returns the mode of an image that was checked."""
    with tree.open(name) as file:
        return header(file).mode


def pairs_of(tree: Tree) -> list[Pair]:
    """Returns the pairs of a tree, with names from its root."""
    names = list(tree.stamps)
    tops = {name.partition("/")[0] for name in names if "/" in name}
    folder = next((folder for folder in MASK_FOLDERS if folder in tops), "")
    if "images" in tops and folder:
        return pairs_in_folders(names, folder)
    groups = defaultdict(list)
    for name in names:
        if name.lower().endswith(IMAGE_ENDINGS):
            groups[posixpath.splitext(name)[0]].append(name)
    if not groups:
        raise UserError(f"{tree.root} has neither images/ and masks/ nor pairs of images.")
    return [pair_by_stem(tree, group) for group in groups.values()]


def pairs_in_folders(names: Sequence[str], folder: str) -> list[Pair]:
    """Returns the pairs of images/... and of the folder of masks."""

    def by_key(top: str) -> dict[str, str]:
        files: dict[str, str] = {}
        for name in names:
            if name.startswith(f"{top}/") and name.lower().endswith(IMAGE_ENDINGS):
                key = posixpath.splitext(name.removeprefix(f"{top}/"))[0]
                if files.setdefault(key, name) != name:
                    both = f"{printable(files[key])} and {printable(name)}"
                    raise UserError(f"{both} differ only in their suffix: keep one of them.")
        return files

    images, masks = by_key("images"), by_key(folder)
    for key in images.keys() - masks.keys():
        missing = f"{folder}/{printable(key)}.png is missing"
        raise UserError(f"{printable(images[key])} has no mask: {missing}.")
    for key in masks.keys() - images.keys():
        missing = f"images/{printable(key)} is missing"
        raise UserError(f"{printable(masks[key])} has no image: {missing}.")
    return [Pair(image, masks[key]) for key, image in sorted(images.items())]


def pair_by_stem(tree: Tree, names: Sequence[str]) -> Pair:
    """Returns the pair of files with a common stem: the PNG of one channel is the mask."""
    masks = [name for name in names if name.lower().endswith(".png")]
    if len(names) == 2 and len(masks) == 2:  # both are PNGs
        masks = [name for name in masks if problem_of_mask(tree, name) == ""]
    if len(names) != 2 or len(masks) != 1:
        listed = ", ".join(map(printable, names))
        raise UserError(
            f"{listed}: an image and its mask, a PNG of one channel, must share a stem, but "
            f"there are {len(names)} files, {len(masks)} of them masks."
        )
    (mask,) = masks
    return Pair(next(name for name in names if name != mask), mask)


def problem_of_mask(tree: Tree, name: str) -> str:
    """Returns the reason why a file cannot be a mask, "" if it can."""
    try:
        read_values(tree.read(name))
    except BadImageError as error:
        return str(error)
    return ""


def split_rows(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Returns {split: indices of its pairs}, in a random order that does not depend on other files.

    Folders are splits as in layout.py, and `test` stands in for a missing `validation`. Without
    such folders, `validation` is a twentieth of all pairs.
    """
    rows = defaultdict(list)
    folders = [posixpath.dirname(pair.image.removeprefix("images/")) for pair in pairs]
    unique = sorted(set(folders))
    splits = dict(zip(unique, layout(unique).splits or repeat("train"), strict=False))
    for row in sorted(range(len(pairs)), key=lambda row: zlib.crc32(os.fsencode(pairs[row].image))):
        rows[splits[folders[row]]].append(row)
    rows.pop("", None)
    if "validation" not in rows:
        train = rows.get("train", [])
        held_out = max(1, len(train) // 20) if "test" not in rows and len(train) > 1 else 0
        rows["validation"] = rows.get("test") or train[:held_out]
        rows["train"] = train[held_out:]
    return {split: np.array(rows[split], int) for split in sorted(rows)}
