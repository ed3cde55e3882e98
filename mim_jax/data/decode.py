"""From the bytes of a file to an image, whatever kind of file it is. H, W, c: an array's axes.

Pillow reads files of 8 bits and all of one channel; `.npy` and the TIFFs that Pillow cannot read,
or only in part (13 channels, 16 bits in colour), become arrays. PNGs in 16-bit colour are read in
8 bits, as Pillow does; of animations the first frame.
"""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode
DTYPES = ("uint8", "uint16", "float32")  # what pixels may be; all else becomes one of these
LARGE = 2**26  # pixels: beyond, an image is halved (Pillow refuses them beyond 2.7 times that)

Image.init()
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF"]
FORMATS = [name for name in FORMATS if name in Image.OPEN]
one_large_image = threading.Lock()

# What readers say of a broken file stands in the reason for leaving it out.
for reader in ("PIL", "tifffile"):
    logging.getLogger(reader).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=reader)


class BadImageError(ValueError):
    """A file that is no image, or is of no use to the run: the message is the reason."""


class Pixels(NamedTuple):
    """An array in a file, not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Header(NamedTuple):
    """What a file says of its image before it is decoded."""

    width: int
    height: int
    mode: str  # Pillow's, as "RGB" or "CMYK", or type and channels, as "uint16 x 13"


def header(file: BinaryIO) -> Header:
    """Size and mode of the image in an open file, as it is stored. Raises BadImageError."""
    with reasons():
        image = opened(file)
        if isinstance(image, Image.Image):
            return Header(*image.size, image.mode)
        height, width, channels = axes_last(np.empty(image.shape, np.void)).shape
        return Header(width, height, f"{known(image.dtype)} x {channels}")


def decode(encoded: bytes, channels: int, dtype: str = "uint8") -> Image.Image | np.ndarray:
    """The image in a file, upright, with so many channels of a type.

    8 bits and 1, 3 or 4 channels are a Pillow image in mode L, RGB or RGBA, whatever mode the file
    has; what is transparent is laid on white, unless there are 4 channels. All else is an array
    (H, W, c) of that type. Integers keep their share of the type's range.
    Raises BadImageError where that cannot be.
    """
    with reasons():
        image = opened(io.BytesIO(encoded))
        if isinstance(image, Pixels):
            array = axes_last(image.read())
        else:
            large = image.width * image.height > LARGE
            with one_large_image if large else contextlib.nullcontext():
                image = upright(image)
                if type_of(image.mode) == "uint8" and channels in MODES:
                    image = in_mode(image, channels)
                    image = image.reduce(2) if image.width * image.height > LARGE else image
                    if dtype == "uint8":
                        return image
                image = image.convert("RGB") if image.mode == "P" else image
                array = axes_last(np.array(image))
        array = in_type(array, dtype)
        count = array.shape[2]
        if dtype == "uint8" and count in MODES and channels in MODES:
            return in_mode(Image.fromarray(array[..., 0] if count == 1 else array), channels)
        if count == 1 and channels == 3:
            return array.repeat(3, axis=2)
        if count != channels:
            raise BadImageError(f"it has {count} channels, data.channels is {channels}")
        return array


@contextlib.contextmanager
def reasons():
    """Makes a BadImageError of whatever a reader meets in a broken file."""
    try:
        yield
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(f"{error}" or type(error).__name__) from error


def opened(file: BinaryIO) -> Image.Image | Pixels:
    """The image in a file; its pixels are not yet read."""
    start = file.read(12)
    file.seek(0)
    if not start:
        raise BadImageError("the file is empty")
    if start[:6] == b"\x93NUMPY":
        return npy(file)
    is_tiff = start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        if is_tiff:
            return tiff(file)
        if start[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
            raise BadImageError("HEIC, which Pillow does not read: make it a JPEG") from None
        raise BadImageError("no image that can be read") from None
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (1,)))
        one_channel = image.mode in ("F", "I") or image.mode.startswith("I;16")
        if (bits > 8 and not one_channel) or (image.n_frames > 1 and len(image.getbands()) == 1):
            return tiff(file)
    return image


def npy(file: BinaryIO) -> Pixels:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    file.seek(0)
    return Pixels(shape, dtype, lambda: np.load(file, allow_pickle=False))


def tiff(file: BinaryIO) -> Pixels:
    """The first series of a TIFF; several grey pages are channels, of others the first counts."""
    try:
        import tifffile
    except ImportError:
        raise BadImageError("this kind of TIFF takes tifffile: pip install -e '.[tiff]'") from None
    file.seek(0)
    first = tifffile.TiffFile(file).series[0]
    if first.size > 4 * LARGE:
        raise BadImageError(f"its shape, {first.shape}, is too large")
    if len(first.shape) > 3:
        page = first.pages[0]
        return Pixels(page.shape, page.dtype, page.asarray)
    return Pixels(first.shape, first.dtype, first.asarray)


def axes_last(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, c) or (c, H, W) -> (H, W, c): there are fewer channels than rows."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3 or not array.size:
        raise BadImageError(f"its shape, {array.shape}, is not (height, width, channels)")
    return array if array.shape[2] <= array.shape[0] else array.transpose(1, 2, 0)


def known(dtype: np.dtype) -> str:
    """The type that an array of this type becomes."""
    if dtype.kind not in "buif":
        raise BadImageError(f"its values are {dtype}, not numbers")
    if dtype.name in DTYPES:
        return dtype.name
    return "uint8" if dtype.kind == "b" else "float32"


def upright(image: Image.Image) -> Image.Image:
    """The image read, and turned as its camera was held."""
    if image.width * image.height > LARGE:
        image.draft(None, (image.width // 2, image.height // 2))  # JPEG can do that as it reads
    image.load()
    with contextlib.suppress(Exception):  # EXIF may be any rubbish
        ImageOps.exif_transpose(image, in_place=True)
    return image


def type_of(mode: str) -> str:
    """The type of pixels of a header's mode."""
    if " x " in mode:
        return mode.split(" x ")[0]
    return {"I;16": "uint16", "I": "float32", "F": "float32"}.get(mode[:4], "uint8")


def channels_of(mode: str) -> int:
    """How many channels a header's mode has."""
    return int(mode.split(" x ")[1]) if " x " in mode else Image.getmodebands(mode)


def suits(mode: str, channels: int) -> bool:
    """Whether images of a header's mode can have so many channels."""
    count = channels_of(mode)
    eight_bits = type_of(mode) == "uint8" and channels in MODES
    pillows = " x " not in mode or count in MODES
    return count == channels or (count == 1 and channels == 3) or (eight_bits and pillows)


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """An 8-bit image in the mode of 1, 3 or 4 channels."""
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)  # which copies all the same


def in_type(array: np.ndarray, dtype: str) -> np.ndarray:
    """Pixels of any type in one of DTYPES."""
    have = known(array.dtype)
    array = array * np.uint8(255) if array.dtype.kind == "b" else array.astype(have, copy=False)
    if have == "float32" and not np.isfinite(array).all():
        raise BadImageError("it has values that are no numbers (NaN or infinite)")
    if have == dtype:
        return array
    if "float32" in (have, dtype):
        raise BadImageError(f"its values are {have} in a set of {dtype}")
    if dtype == "uint8":
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return array.astype(np.uint16) * 257
