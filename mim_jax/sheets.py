"""Sheets of images: PNG files with captioned columns."""

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from mim_jax.storage import in_bucket, open_path

MARGIN = 8
LINE = 18  # height of a line of the legend


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Converts images (b, H, W, c) in [0, 1] to (b, H, W, 3) uint8: the first three channels."""
    if images.shape[-1] < 3:
        images = images[..., :1].repeat(3, axis=-1)
    return (np.clip(images[..., :3], 0, 1) * 255).round().astype(np.uint8)


def stretched(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stretches each channel to [0, 1], clipping 1 % of its values at either end."""
    values = np.concatenate([images.reshape(-1, images.shape[-1]) for images in columns.values()])
    low, high = np.percentile(values, (1, 99), axis=0)
    scale = np.maximum(high - low, 1e-12)
    return {caption: (images - low) / scale for caption, images in columns.items()}


def lay_out(
    legend: Mapping[str, tuple[int, int, int]], font: Any, width: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """Returns the position of each name of a legend, and the height of all lines."""
    places, x, y = {}, MARGIN, 0
    for name in legend:
        needed = LINE + round(font.getlength(name)) + 2 * MARGIN
        if x > MARGIN and x + needed > width:
            x, y = MARGIN, y + LINE
        places[name] = (x, y)
        x += needed
    return places, (y + LINE + MARGIN) if legend else 0


def draw_sheet(
    path: str | epath.PathLike,
    columns: dict[str, np.ndarray],
    title: str,
    pairs: int = 2,
    stretch: bool = False,
    legend: Mapping[str, tuple[int, int, int]] | None = None,
) -> None:
    """Writes a PNG with a row for each image, `pairs` rows side by side. Enlarges small images.

    Args:
        path: the file to write.
        columns: {caption: images (b, H, W, c) in [0, 1]}.
        title: printed at the top.
        pairs: number of rows side by side.
        stretch: stretch the values, for sensors that use a small part of their range.
        legend: {name: color}, drawn at the bottom.
    """
    columns = {caption: np.asarray(images) for caption, images in columns.items()}
    columns = stretched(columns) if stretch else columns
    columns = {caption: to_rgb(images) for caption, images in columns.items()}
    count, height, width, _ = next(iter(columns.values())).shape
    zoom = max(1, 144 // max(height, width))
    height, width = height * zoom, width * zoom
    pairs = min(pairs, count)
    rows = -(-count // pairs)
    group = len(columns) * (width + MARGIN) + 2 * MARGIN  # one row of one pair
    title_font, font = (ImageFont.load_default(size) for size in (16, 12))
    width_of_all = pairs * group - MARGIN
    title = textwrap.wrap(title, width_of_all // 9)
    top = 54 + 20 * len(title)
    bottom = top + rows * (height + MARGIN)
    legend = legend or {}
    places, legend_height = lay_out(legend, font, width_of_all)
    size = (width_of_all, bottom + legend_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((MARGIN, 8), "\n".join(title), "black", title_font)
    for pair in range(pairs):
        for j, (caption, images) in enumerate(columns.items()):
            x = pair * group + MARGIN + j * (width + MARGIN)
            lines = "\n".join(textwrap.wrap(caption, width // 7))
            draw.multiline_text((x, top - 6), lines, "dimgray", font, anchor="ld", spacing=2)
            for row, image in enumerate(images[pair * rows : (pair + 1) * rows]):
                tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(tile, (x, top + row * (height + MARGIN)))
    for name, (x, y) in places.items():
        square = (x, bottom + y + 3, x + LINE - 6, bottom + y + LINE - 3)
        draw.rectangle(square, fill=legend[name], outline="dimgray")
        draw.text((x + LINE, bottom + y + LINE // 2), name, "black", font, anchor="lm")
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    path = open_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not in_bucket(path) and Path(path).is_symlink():
        path.unlink()  # a stranger's run must not change other files
    path.write_bytes(encoded.getvalue())
