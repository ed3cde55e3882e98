"""Arrays of pixels in files: their axes, types and alpha channels.

Axes: h height, w width, c channels.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

DTYPES = ("uint8", "uint16", "float32")  # types of decoded pixels; all others become one of these
# Pixels of an image, or values of an array. Larger images are decoded one at a time, and 8-bit ones
# at half their size; Pillow refuses images of more than 2.7 times as many pixels.
LARGE = 2**26
LARGEST = 2**29  # bytes of the largest array that is read
BLOCK = 2**22  # values that are converted at once, to bound memory


class BadImageError(ValueError):
    """A file that is not an image or that the run cannot use; the message is the reason."""


class Pixels(NamedTuple):
    """An array in a file, not yet read.

    Attributes:
        axes: "YX", "YXC" or "CYX" in the order of `shape`, or "" if it is unknown which of three
            axes is that of the channels.
        finish: a function applied to the array (h, w, c) that `read` returns.
        rgb: whether the file declares the channels as red, green and blue (and alpha).
        alpha: whether the file declares the last channel as opacity.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: str
    read: Callable[[], np.ndarray]
    finish: Callable[[np.ndarray], np.ndarray] = lambda array: array  # (h, w, c) -> (h, w, c)
    rgb: bool = False
    alpha: bool = False

    def load(self, channels: int) -> np.ndarray:
        """Reads the array (h, w, c). `channels` identifies the axes if the file does not."""
        axes = named_axes(self.shape, self.axes, channels)
        array = self.read()
        if axes == "YX":
            return self.finish(array[..., None])
        return self.finish(array.transpose([axes.index(axis) for axis in "YXC"]))


def named_axes(shape: tuple[int, ...], axes: str, channels: int) -> str:
    """Returns the axes of an array: those in its file, or guessed by an axis of length `channels`.

    A gray image may also be used with 3 channels. Raises BadImageError if the axes are ambiguous.
    """
    if axes:
        return axes
    if 0 in shape or len(shape) not in (2, 3):
        raise BadImageError(f"its shape, {shape}, is not (height, width, channels)")
    if len(shape) == 2:
        return "YX"
    counts = (channels, 1) if channels == 3 else (channels,)
    for count in counts:
        fitting = [axis for axis, length in enumerate(shape) if length == count]
        if len(fitting) == 1:
            return ("CYX", "YCX", "YXC")[fitting[0]]
        if fitting:
            raise BadImageError(
                f"its shape, {shape}, has several axes of length data.channels = {channels}, and "
                "the file does not say which one holds the channels"
            )
    raise BadImageError(f"its shape, {shape}, has no axis of length data.channels = {channels}")


def require_size(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises BadImageError if an array of this shape and type takes more than LARGEST bytes."""
    if math.prod(shape) * np.dtype(dtype).itemsize > LARGEST:
        raise BadImageError(
            f"its shape, {shape}, of {dtype} is too large: cut it into tiles (mim-jax prepare "
            "folder:PATH --tile=SIDE)"
        )


def decoded_type(dtype: np.dtype) -> str:
    """Returns the type of DTYPES to which this type is converted."""
    if dtype.kind not in "buif":
        raise BadImageError(f"its values are {dtype}, not numbers")
    if dtype.name in DTYPES:
        return dtype.name
    return "uint8" if dtype.kind == "b" else "float32"


def in_type(array: np.ndarray, dtype: str) -> np.ndarray:
    """Converts pixels of any type to one of DTYPES.

    Integers are scaled by the ranges of the types. Raises BadImageError for values that are not
    finite, for floats in a set of integers, whose range is unknown, and for the reverse.
    """
    stored = decoded_type(array.dtype)
    array = array * np.uint8(255) if array.dtype.kind == "b" else array.astype(stored, copy=False)
    if stored == "float32" and not np.isfinite(array).all():
        raise BadImageError("some of its values are NaN or infinite")
    if stored == dtype:
        return array
    if "float32" in (stored, dtype):
        raise BadImageError(f"its values are {stored} in a set of {dtype}")
    converted = np.empty(array.shape, dtype)
    for block in blocks(array.shape):
        if dtype == "uint8":
            converted[block] = (array[block].astype(np.uint32) + 128) // 257
        else:
            converted[block] = array[block].astype(np.uint16) * 257
    return converted


def on_white(array: np.ndarray) -> np.ndarray:
    """Composites integer pixels (h, w, c + 1), the last channel alpha, on white -> (h, w, c)."""
    if array.dtype.kind != "u":
        raise BadImageError(f"it has an alpha channel of {array.dtype} values")
    white = float(np.iinfo(array.dtype).max)
    result = np.empty((*array.shape[:2], array.shape[2] - 1), array.dtype)
    for block in blocks(array.shape):
        opacity = array[block][..., -1:] / white
        result[block] = np.rint(white + (array[block][..., :-1] - white) * opacity)
    return result


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields slices of rows that cover an array, of at most about BLOCK values each."""
    rows = max(1, BLOCK // max(1, int(np.prod(shape[1:], dtype=np.int64))))
    return (slice(first, first + rows) for first in range(0, shape[0], rows))
