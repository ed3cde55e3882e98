"""Images with masks (the class of every pixel): pairs of files, checked before training.

A data set is a folder or a zip file. Images are in `images/<split>/` and masks in `masks/<split>/`
(or `annotations/`), with the same path except for the suffix; or an image and its mask are in the
same folder, with the same stem (`train/a.jpg`, `train/a.png`). A mask is a PNG of one channel with
1 to 16 bits, whose values are class numbers; for a palette image these are the indices.

The classes are listed in a CSV file, `classes.csv`, one per line: the value in the masks, the name,
and optionally a color. Pixels of a value without a name are ignored:

    0,sky,#808080
    1,building,#800000
    11,

ADE20K's release, "ADEChallengeData2016", is recognized by its `objectInfo150.txt`: values 1 to 150
are the classes, and 0 is ignored ("reduce zero label").
"""

import contextlib
import csv
import hashlib
import io
import math
import os
import posixpath
import threading
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from mim_jax import UserError
from mim_jax.data.arrays import LARGE, LARGEST
from mim_jax.data.decode import BadImageError, header
from mim_jax.data.folder import MASK_FOLDERS, select
from mim_jax.data.layout import layout
from mim_jax.data.sources import Source, open_sources

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".npy")
VALUES = 2**16  # number of possible values of a mask
UNKNOWN, IGNORED = -2, -1  # entries of a table of classes by value
ORIENTATION = 274  # the EXIF tag
THREADS = 16
one_large_mask = threading.Lock()


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


class Tree:
    """The files of a folder or of a zip file, by name: paths with slashes from the root.

    A common top folder, as in most zip files, is not part of the names.
    """

    def __init__(self, root: str):
        self.root = os.path.realpath(os.path.expanduser(root))
        if not os.path.exists(self.root):
            raise UserError(f"there is no data set {root}: set data.name to an existing folder.")
        self.zipped = os.path.isfile(self.root)
        if self.zipped and not zipfile.is_zipfile(self.root):
            raise UserError(f"{root} is neither a folder nor a zip file.")
        stamps = self.in_zip() if self.zipped else self.in_folder()
        tops = {name.partition("/")[0] for name in stamps}
        only = tops.pop() + "/" if len(tops) == 1 else ""
        self.prefix = only if all(name.startswith(only) for name in stamps) else ""
        self.stamps = {name[len(self.prefix) :]: stamp for name, stamp in sorted(stamps.items())}

    def in_folder(self) -> dict[str, tuple]:
        """Returns {name: (bytes, time of change)} of files that are not hidden."""
        stamps = {}
        for folder, folders, files in os.walk(self.root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
            for file in files:
                if not file.startswith("."):
                    status = os.stat(os.path.join(folder, file))
                    name = os.path.relpath(os.path.join(folder, file), self.root)
                    stamps[name.replace(os.sep, "/")] = (status.st_size, status.st_mtime_ns)
        return stamps

    def in_zip(self) -> dict[str, tuple]:
        """Returns {name: (bytes, checksum)} of files that are not hidden."""
        members = (member for member in self.zip.infolist() if not member.is_dir())
        hidden = (".", "__MACOSX")
        return {
            member.filename: (member.file_size, member.CRC)
            for member in members
            if not any(part.startswith(hidden) for part in member.filename.split("/"))
        }

    @cached_property
    def zip(self) -> zipfile.ZipFile:
        """The open zip file, one for each process."""
        return zipfile.ZipFile(self.root)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "zip"}

    def open(self, name: str) -> BinaryIO:
        """Opens a file. Raises BadImageError if it cannot be opened or is too large."""
        if (size := self.stamps[name][0]) > LARGEST:
            raise BadImageError(f"it has {size:,} bytes, more than {LARGEST:,}")
        try:
            if self.zipped:
                return io.BytesIO(self.unzip(name))
            return open(os.path.join(self.root, self.prefix + name), "rb")
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise BadImageError(f"cannot be read: {error}") from error

    def unzip(self, name: str) -> bytes:
        """Returns the bytes of a file in the zip file, and never unpacks more than its size.

        That holds for `ZipFile.open` with deflate, but not for `ZipFile.read` or other methods.
        """
        member = self.zip.getinfo(self.prefix + name)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadImageError("it is not compressed by deflate: pack the zip file again")
        with self.zip.open(member) as file:
            return file.read(member.file_size)

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file. Raises BadImageError if it cannot be read."""
        with self.open(name) as file:
            return file.read()


class Pair(NamedTuple):
    """The names of an image and of its mask."""

    image: str
    mask: str


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


def open_masked(name: str, splits: Sequence[str], classes: str = "") -> list[Source]:
    """Opens the splits of a data set with masks, and checks each of its files.

    Args:
        name: `folder:PATH` of a folder or zip file, or `emoji`, whose masks are derived from
            colors.
        classes: the CSV file of the classes; "" is `classes.csv` in the folder, or ADE20K's own
            list.

    Raises UserError, with the name of the file, for an image without a mask or a mask without an
    image, different sizes, a colored mask, a value without a class, or a file that is not an image.
    """
    if name == "emoji":
        return [of_emoji(source) for source in open_sources(name, splits)]
    if not name.removeprefix("folder:") or not name.startswith("folder:"):
        raise UserError(
            f"data.name = {name!r} has no masks: set folder:PATH with images and masks, or emoji."
        )
    tree = Tree(name.removeprefix("folder:"))
    known = read_classes(tree, classes)
    pairs = pairs_of(tree)
    rows = split_rows(pairs)
    chosen = [[pairs[row] for row in select(rows, split, tree.root)] for split in splits]
    sizes = checked(tree, sorted({pair for pairs in chosen for pair in pairs}), known)
    return [
        of_pairs(tree, pairs, split, known, sizes)
        for pairs, split in zip(chosen, splits, strict=True)
    ]


def of_pairs(
    tree: Tree, pairs: Sequence[Pair], split: str, classes: Classes, sizes: dict[Pair, tuple]
) -> Source:
    """Returns the source of some pairs; `sizes` has height and width of each."""
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
        name_of=examples.name,
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
        return {
            posixpath.splitext(name.removeprefix(f"{top}/"))[0]: name
            for name in names
            if name.startswith(f"{top}/") and name.lower().endswith(IMAGE_ENDINGS)
        }

    images, masks = by_key("images"), by_key(folder)
    for key in images.keys() - masks.keys():
        raise UserError(f"{images[key]} has no mask: {folder}/{key}.png is missing.")
    for key in masks.keys() - images.keys():
        raise UserError(f"{masks[key]} has no image: images/{key} is missing.")
    return [Pair(image, masks[key]) for key, image in sorted(images.items())]


def pair_by_stem(tree: Tree, names: Sequence[str]) -> Pair:
    """Returns the pair of files with a common stem: the PNG of one channel is the mask."""
    masks = [name for name in names if name.lower().endswith(".png")]
    if len(names) == 2 and len(masks) == 2:  # both are PNGs
        masks = [name for name in masks if problem_of_mask(tree, name) == ""]
    if len(names) != 2 or len(masks) != 1:
        listed = ", ".join(names)
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
    such folders, `validation` is a twentieth of all.
    """
    rows = defaultdict(list)
    folders = [posixpath.dirname(pair.image.removeprefix("images/")) for pair in pairs]
    unique = sorted(set(folders))
    splits = dict(zip(unique, layout(unique).splits or repeat("train"), strict=False))
    for row in sorted(range(len(pairs)), key=lambda row: zlib.crc32(pairs[row].image.encode())):
        rows[splits[folders[row]]].append(row)
    rows.pop("", None)
    if "validation" not in rows:
        train = rows.get("train", [])
        held_out = max(1, len(train) // 20) if "test" not in rows and len(train) > 1 else 0
        rows["validation"] = rows.get("test") or train[:held_out]
        rows["train"] = train[held_out:]
    return {split: np.array(rows[split], int) for split in sorted(rows)}


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
    classes, ignored = {}, []
    for number, line in enumerate(csv.reader(io.StringIO(text)), 1):
        cells = [cell.strip() for cell in line] + ["", "", ""]
        value, name, color = cells[:3]
        if not any(cells) or (number == 1 and not value.isdecimal()):
            continue
        where = f"{source}, line {number}: {','.join(line)!r}"
        if not value.isdecimal() or int(value) >= VALUES or len(line) > 3:
            raise UserError(f"{where} must be VALUE,NAME or VALUE,NAME,#RRGGBB.")
        if int(value) in classes or int(value) in ignored:
            raise UserError(f"{where}: the value {value} occurs twice.")
        if not name:
            ignored.append(int(value))
            continue
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
    values = tuple(int(row[0]) for row in rows)
    return Classes(names, palette(len(names)), values, ignored=(0,))


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
    except Exception as error:
        raise BadImageError(f"it is not a whole PNG ({error or type(error).__name__})") from error
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise BadImageError(
            f"it is in color ({mode}): a mask must have one channel of class numbers"
        )
    if mode == "L" and bits < 8:  # Pillow scales these to 0 to 255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint16)


def checked(tree: Tree, pairs: Sequence[Pair], classes: Classes) -> dict[Pair, tuple[int, int]]:
    """Checks the files of all pairs, unless they were checked before -> height and width of each.

    Raises UserError with the name of the first file that is wrong, and the number of others.
    """
    stamps = [tree.stamps[name] for pair in pairs for name in pair]
    key = hashlib.sha256(repr((tree.root, pairs, stamps, classes)).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    kept = cache / "mim_jax" / "masks" / f"{key}.npy"
    if kept.is_file():
        sizes = np.load(kept)
        if sizes.shape == (len(pairs), 2):
            return dict(zip(pairs, map(tuple, sizes.tolist()), strict=True))
    results = list(in_threads(lambda pair: check_pair(tree, pair, classes), pairs))
    wrong = [result for result in results if isinstance(result, str)]
    if wrong:
        others = f" ({len(wrong) - 1:,} other files are wrong too)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}.{others}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.array(results, np.int32))
    except OSError:
        pass  # the next run checks again
    return dict(zip(pairs, results, strict=True))


def in_threads(function: Callable, items: Sequence) -> Iterator:
    """Yields function(item) for each item, computed in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(function, items, chunksize=16)


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


def check_pair(tree: Tree, pair: Pair, classes: Classes) -> tuple[int, int] | str:
    """Returns height and width of an image and its mask, or the problem with them."""
    try:
        name = pair.image
        with tree.open(name) as file:
            width, height, _ = header(file)
            file.seek(0)
            if orientation(file) != 1:
                return (
                    f"{name} has an EXIF orientation, so the orientation of its mask is unclear: "
                    "store its pixels upright"
                )
        name = pair.mask
        with tree.open(name) as file:
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


EMOJI = Classes(
    names=("background", "gray", "red", "yellow", "green", "blue"),
    colors=(
        (230, 230, 230),
        (90, 90, 90),
        (220, 60, 50),
        (240, 200, 60),
        (80, 170, 80),
        (60, 110, 210),
    ),
    values=(0, 1, 2, 3, 4, 5),
    ignored=(255,),
)


def of_emoji(source: Source) -> Source:
    """Returns the built-in emoji with masks derived from their colors."""
    count = len(source.examples)
    return source._replace(
        examples=EmojiMasks(source.examples),
        num_labels=0,
        fingerprint=source.fingerprint | {"name": "emoji with masks"},
        classes=EMOJI,
        sizes=np.full((count, 2), 64, np.int32),
    )


class EmojiMasks:
    """Examples of the emoji, with masks: by hue, or gray, or white as the background."""

    def __init__(self, examples: Sequence[dict]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict:
        encoded = self.examples[i]["image"]
        hue, saturation, value = np.moveaxis(
            np.asarray(Image.open(io.BytesIO(encoded)).convert("HSV")), -1, 0
        )
        ends = np.array([20, 50, 130, 215])  # of the hues red, yellow, green and blue, out of 256
        values = 2 + np.searchsorted(ends, hue, side="right") % 4
        values[saturation < 50] = 1
        values[(saturation < 12) & (value > 230)] = 255  # between white and the other colors
        values[(saturation == 0) & (value == 255)] = 0
        mask = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(mask, "PNG")
        return {"image": encoded, "mask": mask.getvalue()}
