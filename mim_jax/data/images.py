"""Batches of single images: files, Pillow images and arrays."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mim_jax import UserError
from mim_jax.data.arrays import BadImageError
from mim_jax.data.decode import decode, header, type_of
from mim_jax.data.fields import fields_of
from mim_jax.data.transforms import EvaluationView
from mim_jax.storage import open_path

Images = Sequence[str | Path | Image.Image | np.ndarray]  # files, or arrays (H, W, c)


def batch_of(images: Images, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a batch of images: their short side is resized, then the center is cropped.

    `data` is the block `data` of a config, with the size and the number of channels.
    """
    for image in images:
        if not isinstance(image, str | os.PathLike | Image.Image | np.ndarray):
            raise UserError(
                "an image must be a file, a Pillow image or a NumPy array (H, W, c), not "
                f"{type(image).__name__}."
            )
    channels = data.get("channels", 3)
    fields = fields_of(
        size=data["size"],
        tokenizer_size=data.get("tokenizer_size", 0),
        channels=channels,
        dtype=dtype_of(images[0]),
        interpolation=data.get("evaluation_interpolation", "bicubic"),
        labeled=False,
    )
    view = EvaluationView.configured(fields, dict(crop_fraction=1.0))
    rows = [decoded(image, channels, fields[0].dtype) for image in images]
    batch = {
        field.name: np.stack([view.central(image, field) for image in rows])
        for field in view.fields
    }
    return batch | dict(
        index=np.arange(len(rows), dtype=np.int32), valid=np.ones(len(rows), np.float32)
    )


def dtype_of(image: str | Path | Image.Image | np.ndarray) -> str:
    """Returns the type of an image's values. Raises UserError for files that cannot be read."""
    if isinstance(image, np.ndarray):
        return image.dtype.name
    if isinstance(image, Image.Image):
        return "uint8"
    try:
        with open_path(image).open("rb") as file:
            return type_of(header(file).mode)
    except (OSError, BadImageError) as error:
        raise unreadable(image, error) from None


def decoded(
    image: str | Path | Image.Image | np.ndarray, channels: int, dtype: str
) -> Image.Image | np.ndarray:
    """Returns an image with its channels and type. Raises UserError if they differ."""
    if isinstance(image, Image.Image):
        return image.convert("L" if channels == 1 else "RGB")
    if isinstance(image, np.ndarray):
        return image
    try:
        return decode(open_path(image).read_bytes(), channels, dtype)
    except (OSError, BadImageError) as error:
        raise unreadable(image, error) from None


def unreadable(image: str | Path, error: OSError | BadImageError) -> UserError:
    """Returns the error for a file that is not an image, or cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot read the image {image}: {reason}.")
