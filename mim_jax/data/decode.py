"""Decodes image files, with the same result whichever library reads them.

Axes: h height, w width, c channels.

Pillow reads most files. `.npy` files, and TIFFs that Pillow does not interpret fully (see tiff.py),
are read as arrays. 16-bit color PNGs are read with 8 bits, as Pillow does; the first frame of an
animation is read. Transparent images are composited on white, unless they are
decoded with 4 channels.
"""

import contextlib
import importlib
import io
import logging
import math
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mim_jax.data.arrays import (
    LARGE,
    BadImageError,
    Pixels,
    decoded_type,
    in_type,
    named_axes,
    on_white,
    require_size,
)
from mim_jax.data.tiff import STARTS, open_tiff

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode
BOXES = 2**16  # bytes of a JPEG 2000 file that describe its channels
STRIP = 2**22  # pixels of a large image that are converted at once, to bound memory

Image.init()
for plugin in ("pillow_heif", "pillow_jxl"):  # used if they are installed
    with contextlib.suppress(ImportError):
        getattr(importlib.import_module(plugin), "register_heif_opener", lambda: None)()
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL"]
FORMATS = [name for name in FORMATS if name in Image.OPEN]
HEIC = "HEIC: convert it to JPEG or pip install pillow-heif"
JXL = "JPEG XL: convert it to PNG or pip install pillow-jxl-plugin"
OTHER_FORMATS = {  # (offset, bytes): reason
    **{(4, b"ftyp" + kind): HEIC for kind in (b"heic", b"heix", b"mif1", b"msf1")},
    **{(0, start): JXL for start in (b"\xff\x0a", b"\0\0\0\x0cJXL ")},
    (0, b"PAR1"): "a Parquet table: read its folder with data.name=hf:PATH",
    (128, b"DICM"): "DICOM; convert it to 16-bit PNG, TIFF or .npy",
    (344, b"n+1\0"): "NIfTI; convert its slices to TIFF or .npy",
}
one_large_image = threading.Lock()

# The exceptions of these libraries become the reasons of bad files; their warnings are noise.
for library in ("PIL", "tifffile"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=library)


class Header(NamedTuple):
    """Size and mode of a stored image.

    Attributes:
        width, height: 0 if the axes are unknown.
        mode: Pillow's mode, such as "RGB" or "CMYK"; or type and channels of an array, such as
            "uint16 x 13" or "uint16 x 3 + alpha"; or "uint16 array" if its axes are unknown.
    """

    width: int
    height: int
    mode: str


def header(file: BinaryIO, channels: int = 0, large: bool = False) -> Header:
    """Returns size and mode of the image in an open file. Raises BadImageError.

    Args:
        channels: data.channels, which decides the axes of an array whose file does not name them.
        large: allow TIFFs that are too large to be decoded whole.
    """
    with reasons():
        image = opened(file, large)
        if isinstance(image, Image.Image):
            return Header(*image.size, mode_of(image))
        dtype = decoded_type(image.dtype)
        if not channels and not image.axes and len(image.shape) == 3:
            return Header(0, 0, f"{dtype} array")
        axes = named_axes(image.shape, image.axes, channels)
        length = dict(zip(axes, image.shape, strict=True))
        count = length.get("C", 1) - image.alpha
        mode = f"{dtype} x {count}" + (" + alpha" if image.alpha else "")
        return Header(length["X"], length["Y"], mode)


def decode(
    encoded: bytes, channels: int, dtype: str = "uint8", *, halve: bool = True
) -> Image.Image | np.ndarray:
    """Decodes the image in a file, upright, with the given channels and type.

    With 8 bits and 1, 3 or 4 channels, the result is a Pillow image in mode L, RGB or RGBA, where
    RGBA may hold any four channels. All others are arrays (h, w, c). Integers keep their share of
    the type's range. Images of 8 bits with more than LARGE pixels are halved unless `halve` is
    false. Gray images can be used with 3 channels and images in color with 1.

    Raises BadImageError if the file cannot be read or has other channels or another type.
    """
    with reasons():
        image = opened(io.BytesIO(encoded))
        shape = image.shape if isinstance(image, Pixels) else image.size
        large = math.prod(shape) > LARGE
        with one_large_image if large else contextlib.nullcontext():
            if isinstance(image, Pixels):
                array = in_type(image.load(channels), dtype)
                return in_channels(array, channels, rgb=image.rgb, alpha=image.alpha)
            if type_of(mode_of(image)) != "uint8":  # only 8-bit images are halved
                require_size((image.height, image.width, channels), np.dtype(dtype))
            image = upright(image, halve)
            if type_of(mode_of(image)) != "uint8":
                return in_channels(in_type(to_array(image), dtype), channels)
            if image.mode == "LA" and channels == 2:
                return in_type(np.asarray(image), dtype)
            if channels not in MODES:
                count = len(image.getbands())
                raise BadImageError(f"it has {count} channels, data.channels is {channels}")
            image = in_strips(image, channels, halve) if large else in_mode(image, channels)
            if dtype == "uint8":
                return image
            array = np.asarray(image).reshape(image.height, image.width, channels)
            return in_type(array, dtype)


@contextlib.contextmanager
def reasons() -> Iterator[None]:
    """Turns any exception of a reader into a BadImageError."""
    try:
        yield
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(f"{error}" or type(error).__name__) from error


def opened(file: BinaryIO, large: bool = False) -> Image.Image | Pixels:
    """Opens the image in a file without reading its pixels; `large` as for `header`."""
    start = file.read(352)
    file.seek(0)
    if not start:
        raise BadImageError("the file is empty")
    if start[:6] == b"\x93NUMPY":
        return open_npy(file)
    if start[:4] in STARTS:
        return open_tiff(file, large)
    try:
        image = Image.open(file, formats=FORMATS)
        if image.format == "JPEG2000" and image.mode in ("LA", "RGBA"):
            return image if declares_alpha(file) else bands_of(image)
        if image.format == "PNG":
            scale_transparency(image, bits=start[24])
        return image
    except Image.UnidentifiedImageError:
        for (offset, signature), reason in OTHER_FORMATS.items():
            if start[offset:].startswith(signature):
                raise BadImageError(reason) from None
        raise BadImageError("not an image of a known format") from None


def scale_transparency(image: Image.Image, bits: int) -> None:
    """Scales the transparent value of a PNG as Pillow scales its pixels, but not this value.

    Raises BadImageError for 16-bit color, where pixels of 8 bits do not identify one color.
    """
    transparent = image.info.get("transparency")
    if image.mode == "L" and bits < 8 and transparent is not None:
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    if image.mode == "RGB" and bits == 16 and transparent is not None:
        raise BadImageError(
            "a 16-bit color PNG with a transparent color (tRNS); convert it to 8 bits or to alpha"
        )


def declares_alpha(file: BinaryIO) -> bool:
    """Returns whether a JPEG 2000 file defines a channel as opacity; Pillow takes the last one."""
    file.seek(0)
    start = file.read(BOXES)
    header_box = start[start.find(b"jp2h") :]
    size = int.from_bytes(start[start.find(b"jp2h") - 4 :][:4])
    at = header_box[:size].find(b"cdef")
    if b"jp2h" not in start or at < 0:
        return False
    count = int.from_bytes(header_box[at + 4 : at + 6])
    kinds = np.frombuffer(header_box[at + 6 : at + 6 + 6 * count], ">u2")[1::3]
    return bool(np.isin(kinds, (1, 2)).any())  # opacity, straight or premultiplied


def bands_of(image: Image.Image) -> Pixels:
    """Returns an 8-bit image of Pillow as an array, its last channel no alpha."""
    shape = (image.height, image.width, len(image.getbands()))
    require_size(shape, np.dtype(np.uint8))
    return Pixels(shape, np.dtype(np.uint8), "YXC", lambda: np.asarray(image))


def open_npy(file: BinaryIO) -> Pixels:
    """Opens a NumPy file without reading its values."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    require_size(shape, dtype)
    file.seek(0)
    axes = "YX" if len(shape) == 2 and all(shape) else ""
    return Pixels(shape, dtype, axes, lambda: np.load(file, allow_pickle=False))


def mode_of(image: Image.Image) -> str:
    """Returns the mode of an image. Pillow's I of PNG and PGM holds 16 bits, that of TIFF more."""
    return "I;16" if image.mode == "I" and image.format in ("PNG", "PPM") else image.mode


def type_of(mode: str) -> str:
    """Returns the type of pixels of a header's mode."""
    if " " in mode:
        return mode.split()[0]
    return {"I;16": "uint16", "I": "float32", "F": "float32"}.get(mode[:4], "uint8")


def channels_of(mode: str) -> int:
    """Returns the number of channels of a header's mode, without alpha of arrays."""
    return int(mode.split()[2]) if " x " in mode else Image.getmodebands(mode)


def suits(mode: str, channels: int) -> bool:
    """Returns whether images of a header's mode may be decoded with this number of channels."""
    if mode.endswith(" array"):
        return True
    if " x " in mode or type_of(mode) != "uint8":
        count = channels_of(mode)
        with_alpha = "alpha" in mode and channels == count + 1
        return channels == count or with_alpha or {count, channels} == {1, 3}
    if channels == 2:
        return mode == "LA"
    return channels in (1, 3) or (channels == 4 and mode in ("RGBA", "LA", "PA", "P"))


def upright(image: Image.Image, halve: bool) -> Image.Image:
    """Reads an image and turns it as its EXIF orientation says; a large one may be halved."""
    if halve and image.width * image.height > LARGE:
        image.draft(None, (image.width // 2, image.height // 2))  # JPEG halves while it reads
    image.load()
    with contextlib.suppress(Exception):  # EXIF data may be invalid
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_array(image: Image.Image) -> np.ndarray:
    """Returns a read image of one channel with more than 8 bits as an array (h, w, 1)."""
    array = np.asarray(image)
    if type_of(mode_of(image)) == "uint16":
        array = array.astype(np.uint16, copy=False)
        if isinstance(transparent := image.info.get("transparency"), int):
            array = np.where(array == transparent, np.uint16(65535), array)  # white
    return array[..., None]


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Converts an 8-bit image to the mode of 1, 3 or 4 channels; 4 need an alpha channel."""
    if channels == 4 and not image.has_transparency_data:
        count = len(image.getbands()) if image.mode != "P" else 3
        raise BadImageError(f"it has {count} channels and no alpha, data.channels is 4")
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)  # convert always copies


def in_strips(image: Image.Image, channels: int, halve: bool) -> Image.Image:
    """Does the same as `in_mode` for a large image, with less memory.

    With `halve` the result has half its size, if it is still large.
    """
    width, height = image.size
    factor = 2 if halve else 1
    if width * height <= LARGE:
        return in_mode(image, channels)
    result = Image.new(MODES[channels], (-(-width // factor), -(-height // factor)))
    rows = max(2, STRIP // width // 2 * 2)
    for top in range(0, height, rows):
        strip = in_mode(image.crop((0, top, width, min(top + rows, height))), channels)
        bands = [band.reduce(factor) for band in strip.split()]  # each on its own, unlike RGBA
        result.paste(Image.merge(MODES[channels], bands), (0, top // factor))
    return result


def in_channels(
    array: np.ndarray, channels: int, *, rgb: bool = False, alpha: bool = False
) -> Image.Image | np.ndarray:
    """Converts an array (h, w, c) to a number of channels; 8 bits to a Pillow image if possible.

    Args:
        rgb, alpha: see `Pixels`.
    """
    if alpha and array.shape[2] != channels:
        array = on_white(array)
    count = array.shape[2]
    if count == 1 and channels == 3:
        require_size((*array.shape[:2], 3), array.dtype)
        array = array.repeat(3, axis=2)
    elif rgb and array.dtype == np.uint8 and channels == 1:
        return Image.fromarray(np.ascontiguousarray(array)).convert("L")
    elif count != channels:
        raise BadImageError(f"it has {count} channels, data.channels is {channels}")
    if array.dtype == np.uint8 and channels in MODES:
        return Image.fromarray(np.ascontiguousarray(array[..., 0] if channels == 1 else array))
    return array
