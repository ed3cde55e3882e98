"""Cuts large images, such as whole slides and orthophotos, into tiles, and packs the tiles.

Axes: h height, w width, c channels.

TIFFs are read by rows, so that only one row of tiles is in memory at a time; other formats are
decoded completely. All tiles have the same size: the last ones of a row or column overlap their
neighbors. An image that is smaller than a tile is kept unchanged.
"""

import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from mim_jax import UserError
from mim_jax.data.arrays import BadImageError, in_type, require_size
from mim_jax.data.decode import (
    LARGE,
    MODES,
    channels_of,
    decode,
    in_channels,
    reasons,
    type_of,
)
from mim_jax.data.folder import Examples, Folder
from mim_jax.data.manifest import in_threads, printable
from mim_jax.data.pack import claim, features_of, report, set_name, shards
from mim_jax.data.records import shard_path, write_info, write_shard
from mim_jax.data.tiff import (
    NO_ALPHA,
    RGB,
    STARTS,
    YCBCR,
    alpha_of,
    dtype_of,
    full_pages,
    has_rows,
    interpret,
    require_honest_part,
    stacked,
)
from mim_jax.progress import Bar


def pack_tiles(
    root: str,
    to: str,
    *,
    side: int,
    labels: str = "",
    channels: int = 0,
    shard_mb: float = 256,
    in_parallel: Callable | None = None,
) -> None:
    """Cuts the images of a folder into tiles and packs them into `to`, as `pack` does.

    Tiles of an image are in the split of the image and have its label. Images that cannot be read
    are reported and left out.

    Args:
        side: side of a tile in pixels.
        channels: number of channels of the tiles; 0: that of most images, without alpha.

    Other arguments are those of `pack`. Raises UserError if `to` is remote or holds other images,
    or if no image of a shard can be read.
    """
    if side < 1:
        raise UserError(f"--tile={side} must be at least 1.")
    folder, target = Folder(root, labels, large=True), Path(to).expanduser().resolve()
    splits = folder.distinct_splits()
    channels = channels or channels_of_tiles(folder.mode)
    dtype = type_of(folder.mode)
    is_image = dtype == "uint8" and channels in (1, 3)
    area = folder.manifest.rows["width"].astype(np.int64) * folder.manifest.rows["height"]
    sizes = {
        split: area[examples.rows] * channels * np.dtype(dtype).itemsize // 2
        for split, examples in splits.items()
    }
    counts_of = {split: shards(x, int(shard_mb * 1_000_000)) for split, x in sizes.items()}
    plan = dict(
        mode=MODES[channels] if is_image else f"{dtype} x {channels}",
        digests={split: f"{x.digest()}, tiles of {side}" for split, x in splits.items()},
        shards=counts_of,
    )
    claim(target, plan)
    name, features = set_name(target), features_of(is_image, folder.label_names)

    def write(shard: tuple[str, int]) -> int:
        split, number = shard
        counts = counts_of[split]
        path = shard_path(target, name, split, number, len(counts))
        first = sum(counts[:number])
        rows = range(first, first + counts[number])
        if not path.exists():
            examples = tiles_of(splits[split], rows, side, channels, dtype)
            write_shard(path, features, as_records(examples, is_image))
        return len(rows)

    todo = [(split, i) for split, counts in counts_of.items() for i in range(len(counts))]
    total = sum(len(examples) for examples in splits.values())
    with Bar(f"tiling {target}", total, unit="images") as bar:
        run = in_parallel or functools.partial(in_threads, threads=os.cpu_count())
        for count in run(write, todo, at_once=1):
            bar.update(count)
    lengths = {}
    for split, counts in counts_of.items():
        paths = [shard_path(target, name, split, i, len(counts)) for i in range(len(counts))]
        numbers = [ArrayRecordReader(str(path)).num_records() for path in paths]
        if 0 in numbers:
            raise UserError(f"no image of {paths[numbers.index(0)].name} can be read.")
        lengths[split] = numbers, sum(path.stat().st_size for path in paths)
    write_info(target, name, features, lengths, plan, f"Tiles of the images of {folder.root}.")
    report(target, folder, {split: sum(numbers) for split, (numbers, _) in lengths.items()})


def channels_of_tiles(mode: str) -> int:
    """Returns the number of channels of images of a mode, without alpha."""
    if " x " in mode or type_of(mode) != "uint8":
        return channels_of(mode)
    return 1 if mode in ("L", "1", "LA", "La") else 3


def tiles_of(
    examples: Examples, rows: range, side: int, channels: int, dtype: str
) -> Iterator[dict]:
    """Yields the tiles of some examples as examples; images that cannot be read are reported."""
    for i in rows:
        name = examples.name(i)
        label = {} if examples.labels is None else {"label": examples.labels[i]}
        try:
            with examples.manifest.open(examples.rows[i], name) as file:
                for top, left, tile in tiles(file, side, channels, dtype):
                    yield {"image": tile, "file_name": f"{name}#{top},{left}"} | label
        except BadImageError as error:
            print(f"{printable(name)} is left out, completely or in part: {error}")


def as_records(examples: Iterator[dict], is_image: bool) -> Iterator[dict]:
    """Yields examples in the form that TFDS encodes: arrays as PNG or .npy files."""
    for example in examples:
        file, tile = io.BytesIO(), example["image"]
        if is_image:
            Image.fromarray(tile if tile.shape[2] > 1 else tile[..., 0]).save(file, "PNG")
            file.seek(0)  # TFDS reads it
        else:
            np.save(file, tile)
        image = file if is_image else file.getvalue()
        yield example | {"image": image, "file_name": os.fsencode(example["file_name"])}


def starts(length: int, side: int) -> list[int]:
    """Returns the starts of tiles along an axis: every `side` pixels, the last one at the end."""
    return [*range(0, length - side, side), max(0, length - side)]


def tiles(
    file: BinaryIO, side: int, channels: int, dtype: str
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields top, left and pixels (h, w, c) of each tile of an image. Raises BadImageError."""
    with reasons():
        page = large_page(file)
        if page is None:
            file.seek(0)
            image = np.asarray(decode(file.read(), channels, dtype, halve=False))
            image = image[..., None] if image.ndim == 2 else image
            height = len(image)
        else:
            height = page.imagelength
            require_size((min(side, height), page.imagewidth, page.samplesperpixel), dtype_of(page))
    for top in starts(height, side):
        bottom = min(top + side, height)
        with reasons():
            if page is None:
                band = image[top:bottom]
            else:
                band = interpret(page, read_rows(file, page, top, bottom))
                alpha, rgb = alpha_of(page) != NO_ALPHA, page.photometric in (RGB, YCBCR)
                band = np.asarray(in_channels(in_type(band, dtype), channels, rgb=rgb, alpha=alpha))
                band = band[..., None] if band.ndim == 2 else band
        for left in starts(band.shape[1], side):
            yield top, left, np.ascontiguousarray(band[:, left : left + side])


def large_page(file: BinaryIO) -> tifffile.TiffPage | None:
    """Returns the page of a large TIFF that can be read by rows, None if it must be read whole."""
    if file.read(4) not in STARTS:
        return None
    file.seek(0)
    tiff = tifffile.TiffFile(file, _multifile=False)
    pages = full_pages(tiff)
    page = pages[0]
    small = math.prod(page.shape) <= LARGE
    if small or not has_rows(page) or stacked(file, tiff, pages):
        return None
    return page


def read_rows(file: BinaryIO, page: tifffile.TiffPage, top: int, bottom: int) -> np.ndarray:
    """Reads the rows top to bottom - 1 of a page (h, w, c), and only parts that contain them."""
    width, samples = page.imagewidth, page.samplesperpixel
    if page.is_tiled:
        length, across = page.tilelength, -(-width // page.tilewidth)
        require_size((length, page.tilewidth, samples), dtype_of(page))
    else:
        length, across = min(page.rowsperstrip, page.imagelength), 1
        require_size((length, width, samples), dtype_of(page))
    rows = np.zeros((bottom - top, width, samples), page.dtype)
    for i in range(top // length * across, -(-bottom // length) * across):
        file.seek(page.dataoffsets[i])
        content = file.read(page.databytecounts[i])
        if page.compression != 1:
            require_honest_part(page, content)
        part, (_, _, y, x, _), _ = page.decode(content, i, jpegtables=page.jpegtables)
        if part is None:  # a part without data is empty
            continue
        part = part[0]  # remove the depth axis
        first, last = max(top, y), min(bottom, y + len(part), page.imagelength)
        right = min(x + part.shape[1], width)
        rows[first - top : last - top, x:right] = part[first - y : last - y, : right - x]
    return rows
