"""Reads TIFF files by their tags, so that Pillow and tifffile give the same pixels.

Axes: h height, w width, c channels.

Pillow reads 8-bit files whose tags it interprets fully: gray, palette, RGB, CMYK, JPEG-compressed
YCbCr, and alpha that is declared as such. tifffile reads all others (more bits, other numbers of
channels, several gray pages). Files that neither library interprets fully are refused.

The image is the first page that is not marked as a reduced version or a mask. Further gray pages of
the same kind are channels; further color pages are ignored. A sample beyond gray or RGB is
alpha only if the ExtraSamples tag says so, otherwise it is a channel.
"""

import importlib.util
import io
import itertools
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image

from mim_jax.data.arrays import LARGE, LARGEST, BadImageError, Pixels, require_size

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PAGES = 1024  # files with more pages are refused

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR = 0, 1, 2, 3, 5, 6  # photometrics
JPEGS = (6, 7)  # compressions
PACK_BITS, LZMA, WEBP = 32773, 34925, 50001
DEFLATES = (8, 32946, 50013)
PREDICTED = (5, *DEFLATES, LZMA, 50000)  # compressions with a predictor: LZW, deflate, LZMA, Zstd
IMAGES = (7, 33003, 33004, 33005, 34712, 34933, 50001)  # JPEG, JPEG 2000, PNG, WebP
INFLATED = 2**20  # bytes that are inflated at once
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bits of a byte
HAS_IMAGECODECS = importlib.util.find_spec("imagecodecs") is not None
NO_ALPHA, PREMULTIPLIED, STRAIGHT = 0, 1, 2  # in ExtraSamples
GDAL_NODATA = 42113  # tag with the value of missing pixels
REDUCED, MASK = 1, 4  # bits of NewSubfileType
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def open_tiff(file: BinaryIO, large: bool = False) -> Image.Image | Pixels:
    """Opens the image of a TIFF without reading its pixels. Raises BadImageError.

    Args:
        large: allow images that are too large to be read whole, if `has_rows` is true.
    """
    file.seek(0)
    start = file.read(10)
    if start[8:10] == b"CR":
        raise BadImageError("a camera's raw file (CR2); convert it to TIFF or JPEG")
    file.seek(0)
    tiff = tifffile.TiffFile(file, _multifile=False)  # reads no other files
    pages = full_pages(tiff)
    page, shape, axes = pages[0], pages[0].shape, pages[0].axes
    require_one_meaning(page)
    read = page_reader(file, page)
    gray = page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and page.samplesperpixel == 1
    if gray and (stack := stacked(file, tiff, pages)):
        shape, axes, read = stack
    elif large and math.prod(shape) > LARGE and has_rows(page):
        shape, axes = squeezed(shape, axes)
        return Pixels(shape, dtype_of(page), axes, read, alpha=alpha_of(page) != NO_ALPHA)
    elif pillow_reads(page) and (image := pillow_image(file, page)):
        return image
    known = page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) and page.dtype is not None
    if not known or (page.bitspersample < 8 and page.samplesperpixel > 1):
        raise BadImageError(f"{describe(page)}; convert it to RGB or gray of 8 or more bits")
    require_size(shape, dtype_of(page))
    shape, axes = squeezed(shape, axes)
    return Pixels(
        shape,
        dtype_of(page),
        axes,
        lambda: read().reshape(shape),
        finish=lambda array: interpret(page, array),
        rgb=page.photometric == RGB,
        alpha=alpha_of(page) != NO_ALPHA,
    )


def require_one_meaning(page: tifffile.TiffPage) -> None:
    """Raises BadImageError for a page in which libraries see different pixels."""
    if page.predictor != 1 and page.compression not in PREDICTED:
        raise BadImageError(
            "a TIFF with a predictor, which its compression does not have; save it again without "
            "the predictor"
        )
    palette = page.colormap if page.photometric == PALETTE else None
    if palette is not None and 0 < palette.max() < 256:
        raise BadImageError("a TIFF with a palette of 8 instead of 16 bits; convert it to RGB")


def pillow_image(file: BinaryIO, page: tifffile.TiffPage) -> Image.Image | None:
    """Opens a page with Pillow; None if Pillow does not support its byte order."""
    file.seek(0)
    try:
        image = Image.open(file, formats=["TIFF"])
        image.seek(page.index)
    except Image.UnidentifiedImageError:
        return None
    return image


def dtype_of(page: tifffile.TiffPage) -> np.dtype:
    """Returns the type of a page's values. Raises BadImageError if NumPy has none for them."""
    if page.dtype is None:
        raise BadImageError(f"{describe(page)}; convert it to RGB or gray of 8 or more bits")
    return page.dtype


def page_reader(file: BinaryIO, page: tifffile.TiffPage) -> Callable[[], np.ndarray]:
    """Returns a function that reads a page as tifffile does.

    Without imagecodecs, Pillow decompresses pages of one channel; others need that package.
    """

    def read() -> np.ndarray:
        require_honest(file, [page])
        try:
            return page.asarray()
        except (ImportError, NotImplementedError, ValueError) as error:
            if isinstance(error, ValueError) and "imagecodecs" not in str(error):
                raise
            one = page.samplesperpixel == 1 and page.tags.valueof(274, 1) == 1
            kind = page.sampleformat, page.bitspersample
            image = pillow_image(file, page) if one else None
            if image and kind in ((1, 12), (1, 16), (2, 16), (2, 32), (3, 32)):
                return np.array(image).astype(page.dtype)
            reason = (
                f"compressed in a way that needs imagecodecs: pip install 'mim-jax[tiff]' ({error})"
            )
            raise BadImageError(reason) from error

    return read


def require_honest(file: BinaryIO, pages: Iterable[tifffile.TiffPage]) -> None:
    """Raises BadImageError if strips or tiles of pages hold more pixels than their tags say.

    Their decoders would use memory and time for all of them.
    """
    for page in pages:
        page = page.aspage()
        if page.compression == 1:
            continue
        parts = zip(page.dataoffsets, page.databytecounts, strict=False)
        for offset, size in itertools.islice(parts, math.prod(page.chunked)):  # the ones used
            file.seek(offset)
            require_honest_part(page, file.read(min(size, LARGEST)))


def require_honest_part(page: tifffile.TiffPage, content: bytes) -> None:
    """Raises BadImageError if a strip or tile holds more pixels than it should."""
    shape = page.chunks
    if page.compression in INFLATED_SIZES and not HAS_IMAGECODECS:  # which limits the bytes itself
        most, count = math.prod(shape) * dtype_of(page).itemsize, 0
        content = content.translate(REVERSED) if page.fillorder == 2 else content
        for size in INFLATED_SIZES[page.compression](content):
            count += size
            if count > most:
                break
        honest = count <= most
    elif page.compression in IMAGES:
        try:
            part = Image.open(io.BytesIO(content), formats=["JPEG", "JPEG2000", "PNG", "WEBP"])
        except Exception:  # the decoder knows the reason
            return
        honest = math.prod(part.size) <= math.prod(shape)
    else:
        honest = True
    if not honest:
        raise BadImageError("a strip or tile of it holds more pixels than its tags say")


def deflate_sizes(content: bytes) -> Iterator[int]:
    """Yields the sizes of the parts, of at most INFLATED bytes, to which deflated data inflates."""
    stream = zlib.decompressobj()
    while content:
        yield len(stream.decompress(content, INFLATED))
        content = stream.unconsumed_tail


def lzma_sizes(content: bytes) -> Iterator[int]:
    """Does the same as `deflate_sizes` for one or more streams of LZMA, with limited memory."""
    while content:
        stream = lzma.LZMADecompressor(memlimit=LARGEST)
        while not stream.eof and (content or not stream.needs_input):
            yield len(stream.decompress(content, INFLATED))
            content = b""
        content = stream.unused_data


def pack_bits_sizes(content: bytes) -> Iterator[int]:
    """Yields the lengths of the literal and repeated bytes of PackBits (TIFF 6.0, section 9)."""
    at = 0
    while at < len(content):
        code = content[at]
        if code < 128:
            yield min(code + 1, len(content) - at - 1)
            at += code + 2
        elif code > 128 and at + 1 < len(content):
            yield 257 - code
            at += 2
        else:
            at += 1


INFLATED_SIZES: dict[int, Callable[[bytes], Iterator[int]]] = {
    **dict.fromkeys(DEFLATES, deflate_sizes),
    LZMA: lzma_sizes,
    PACK_BITS: pack_bits_sizes,
}


def has_rows(page: tifffile.TiffPage) -> bool:
    """Returns whether a page can be read by rows, with the same pixels as if read whole."""
    kind, samples = page.photometric, page.samplesperpixel
    known = kind in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
    known |= kind == YCBCR and samples == 3 and page.compression in JPEGS
    upright = page.tags.valueof(274, 1) == 1
    whole = page.bitspersample >= 8 and page.dtype is not None and page.imagedepth == 1
    return known and upright and whole and (samples == 1 or page.planarconfig == 1)


def full_pages(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Returns the pages of a TIFF that are not thumbnails, overviews or masks.

    Raises BadImageError if there are none, or more than PAGES pages.
    """
    try:
        tiff.pages[PAGES]
    except IndexError:
        pass
    else:
        raise BadImageError(f"it has more than {PAGES:,} pages")
    pages = [page.aspage() for page in tiff.pages]
    full = [page for page in pages if not page.subfiletype & (REDUCED | MASK)]
    if not full:
        raise BadImageError("it holds no full image, only a thumbnail (a camera's raw file?)")
    return full


def stacked(
    file: BinaryIO, tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage]
) -> tuple[tuple[int, ...], str, Callable[[], np.ndarray]] | None:
    """Returns shape, axes and reader of several gray images like the first page; None if it is one.

    They are separate pages, or are stored in one page as by ImageJ and tifffile.
    """
    first = pages[0]
    if tiff.is_ome or tiff.is_imagej or tiff.is_shaped:  # their metadata name the axes
        for series in tiff.series:
            if series.keyframe.index == first.index:
                if any(page is not None and page.parent is not tiff for page in series.pages):
                    raise BadImageError("its channels are in several files")
                size = math.prod(first.shape)
                if math.prod(series.shape) <= size:
                    return None

                def read(series=series) -> np.ndarray:
                    require_honest(file, [page for page in series.pages if page is not None])
                    return series.asarray()

                return series.shape, series.axes, read
    kind = ("shape", "dtype", "photometric", "samplesperpixel")
    pages = [p for p in pages if all(getattr(p, key) == getattr(first, key) for key in kind)]
    if len(pages) == 1:
        return None
    shape = (len(pages), *first.shape)

    def read_all() -> np.ndarray:
        require_honest(file, pages)
        return np.stack([page.asarray() for page in pages])

    return shape, f"I{first.axes}", read_all


def squeezed(shape: tuple[int, ...], axes: str) -> tuple[tuple[int, ...], str]:
    """Returns shape and axes ("YX", "YXC", "CYX", or "" for unknown) without axes of length 1.

    Args:
        axes: tifffile's names of the axes, where Q is an unknown axis.
    """
    kept = [(n, axis) for n, axis in zip(shape, axes, strict=True) if n > 1 or axis in "YX"]
    shape, names = tuple(n for n, _ in kept), "".join(axis for _, axis in kept)
    if len(shape) > 3 or not {"Y", "X"} <= set(names):
        raise BadImageError(f"its axes are {names}, of lengths {shape}, not one image's")
    unknown = len(shape) == 3 and "Q" in names
    return shape, "" if unknown else "".join(a if a in "YX" else "C" for a in names)


def pillow_reads(page: tifffile.TiffPage) -> bool:
    """Returns whether Pillow gives the pixels that the tags of a page define."""
    kind, samples, extra = page.photometric, page.samplesperpixel, tuple(page.extrasamples)
    bits, signed = page.bitspersample, page.sampleformat != 1
    if signed or bits not in (1, 2, 4, 8) or (bits < 8 and samples > 1):
        return False
    if page.compression == WEBP:  # its wheels are built without it
        return False
    if kind in (WHITE_IS_ZERO, BLACK_IS_ZERO, PALETTE) and samples == 1:
        return True
    if kind == RGB:
        premultiplied = extra == (PREMULTIPLIED,) and page.planarconfig == 1
        return samples == 3 or (samples == 4 and (premultiplied or extra == (STRAIGHT,)))
    if kind in (BLACK_IS_ZERO, PALETTE) and samples == 2:
        return extra == (STRAIGHT,)
    if kind == SEPARATED:
        ink_set = page.tags.valueof(332, 1)
        return samples == 4 and ink_set == 1
    return kind == YCBCR and samples == 3 and page.compression in JPEGS


def alpha_of(page: tifffile.TiffPage) -> int:
    """Returns the kind of alpha that a page in gray or RGB declares."""
    colors = 3 if page.photometric == RGB else 1
    extra = tuple(page.extrasamples)
    is_alpha = page.samplesperpixel == colors + 1 and extra in ((PREMULTIPLIED,), (STRAIGHT,))
    return int(extra[0]) if is_alpha else NO_ALPHA


def interpret(page: tifffile.TiffPage, array: np.ndarray) -> np.ndarray:
    """Applies the tags of a page that tifffile does not apply to its pixels (h, w, c).

    These are bits per sample, white as zero, premultiplied alpha and orientation.
    """
    missing = missing_value(page)
    if missing and array.dtype.kind in "if" and (array == missing).any():
        raise BadImageError(f"some of its values are {missing:g}, declared as missing (nodata)")
    bits = page.bitspersample
    unsigned = array.dtype.kind == "u" and array.dtype.itemsize <= 2
    if unsigned and bits < 8 * array.dtype.itemsize:
        top, largest = np.iinfo(array.dtype).max, 2**bits - 1
        array = ((array.astype(np.uint32) * top + largest // 2) // largest).astype(array.dtype)
    if page.photometric == WHITE_IS_ZERO:
        if page.samplesperpixel > 1 or not (unsigned or array.dtype.kind == "b"):
            raise BadImageError(f"{describe(page)}; convert it to black as zero")
        array = ~array  # of unsigned integers, the largest value minus these
    if alpha_of(page) == PREMULTIPLIED:
        array = straight(array)
    orientation = page.tags.valueof(274, 1)
    return ORIENTATIONS.get(orientation, ORIENTATIONS[1])(array)


def missing_value(page: tifffile.TiffPage) -> float:
    """Returns the value of missing pixels in the tag of GDAL, 0 if there is none."""
    try:
        return float(page.tags.valueof(GDAL_NODATA, "0"))
    except (ValueError, TypeError):
        return 0.0


def straight(array: np.ndarray) -> np.ndarray:
    """Divides integer colors by their alpha, the last channel."""
    if array.dtype.kind != "u":
        raise BadImageError(f"it has a premultiplied alpha channel of {array.dtype} values")
    white = np.iinfo(array.dtype).max
    colors, alpha = array[..., :-1].astype(np.float64), array[..., -1:]
    colors = np.rint(colors * white / np.maximum(alpha, 1)).clip(0, white)
    return np.concatenate([colors.astype(array.dtype), alpha], axis=-1)


def describe(page: tifffile.TiffPage) -> str:
    """Returns the kind of a page, for messages."""
    name = getattr(page.photometric, "name", str(page.photometric))
    samples = f"{page.samplesperpixel} samples of {page.bitspersample} bits"
    return f"a TIFF of photometric interpretation {name} with {samples}"
