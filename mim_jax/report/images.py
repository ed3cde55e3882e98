"""Images inside a report: sheets of pictures, tables of images, and single ones."""

import base64
import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from mim_jax import workdir
from mim_jax.runs import RecordedRun
from mim_jax.sheets import to_rgb

MAX_BYTES = 2**27  # of a sheet of pictures
MAX_PIXELS = 2**26


class Picture(NamedTuple):
    """An image inside the page."""

    source: str  # a data URI
    width: int
    height: int
    text: str = ""


def embedded(image: Image.Image, text: str = "", lossless: bool = False) -> Picture:
    """Returns an image as part of the page."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=80, lossless=lossless, method=4)
    source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, *image.size, text)


def sheets(run: RecordedRun, frames: int) -> list[Picture]:
    """Returns sheets of pictures over time, evenly spread, with the last one."""
    paths = sorted((run.path / "pictures").glob("step_*.png"))
    paths = [path for path in paths if path.stem[5:].isdecimal() and workdir.is_file(path)]
    if not paths or not frames:
        return []
    places = np.linspace(0, len(paths) - 1, min(frames, len(paths))).round().astype(int)
    drawn = []
    for path in (paths[i] for i in dict.fromkeys(places.tolist())):
        try:
            drawn.append(sheet(path))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # it is being written, damaged or too large
    return drawn


def sheet(path: epath.Path) -> Picture:
    """Reads a sheet of pictures. Raises ValueError if it is too large, and Pillow's errors."""
    if path.stat().length > MAX_BYTES:
        raise ValueError
    image = Image.open(io.BytesIO(path.read_bytes()))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError
    image.thumbnail((1100, 1400))
    return embedded(image, f"step {int(path.stem[5:]):,}")


class Grid(NamedTuple):
    """A table of images."""

    captions: list[str]
    rows: list[list[Picture]]


def grid_of(columns: Mapping[str, np.ndarray], most: int = 14) -> Grid:
    """Returns columns of images as a table, of which at most `most` columns are shown."""
    captions = list(columns)[:most]
    side = min(176, max(112, 1080 // len(captions)))
    rows: list[list[Picture]] = []
    for images in zip(*(to_rgb(np.asarray(columns[name])) for name in captions), strict=True):
        rows.append([])
        for caption, image in zip(captions, images, strict=True):
            rows[-1].append(tile(image, caption, side))
    return Grid(captions, rows)


def tile(image: np.ndarray, text: str, side: int) -> Picture:
    """Returns an image (H, W, 3) at most `side` pixels wide; small ones are enlarged."""
    zoom = max(1, side // max(image.shape[:2]))
    enlarged = Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1))
    enlarged.thumbnail((side, side))
    return embedded(enlarged, text)
