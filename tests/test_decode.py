"""Tests of data/decode.py, tiff.py and arrays.py: pixels against numpy, Pillow and tifffile."""

import io
import lzma
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from tifffile import _imagecodecs

from mim_jax.data import tiff
from mim_jax.data.arrays import BadImageError
from mim_jax.data.decode import decode, header, suits
from tests.images import encoded, jpeg, npy, pixels, tif

# --- Modes, orientation, size. ---

MODES = {
    "cmyk.jpg": encoded(Image.fromarray(pixels(2)).convert("CMYK"), "JPEG"),
    "16 bits.png": encoded(Image.fromarray(pixels(6, dtype=np.uint16)[..., 0])),
    "array.npy": npy(pixels(10)),
}


def test_modes():
    rgb = Image.open(io.BytesIO(MODES["cmyk.jpg"])).convert("RGB")
    np.testing.assert_array_equal(decode(MODES["cmyk.jpg"], 3), rgb)
    np.testing.assert_array_equal(decode(MODES["array.npy"], 3), pixels(10))
    deep = pixels(6, dtype=np.uint16)[..., 0]
    np.testing.assert_array_equal(decode(MODES["16 bits.png"], 1), np.round(deep / 257))
    np.testing.assert_array_equal(decode(MODES["16 bits.png"], 1, "uint16")[..., 0], deep)
    clear = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert decode(clear, 3).getpixel((0, 0)) == (255, 255, 255)
    assert decode(clear, 4).getpixel((0, 0)) == (255, 0, 0, 0)
    palette = Image.new("P", (2, 2))
    palette.putpalette([9, 8, 7])
    assert decode(encoded(palette), 3).getpixel((0, 0)) == (9, 8, 7)
    assert decode(encoded(palette, transparency=0), 3).getpixel((0, 0)) == (255, 255, 255)


def png(bits, color, row, *chunks):
    """A PNG of one row of bytes, with more chunks (kind, content) before its pixels."""
    kinds = {0: 1, 2: 3, 3: 1}  # color type: samples of a pixel
    size = struct.pack(">IIBBBBB", len(row) * 8 // bits // kinds[color], 1, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", size), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4)
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_value_of_a_png_has_the_bits_of_its_pixels(bits):
    row = bytes([0b11100100])
    values = np.unpackbits(np.frombuffer(row, np.uint8)).reshape(-1, bits)
    values = values @ (1 << np.arange(bits)[::-1])
    for transparent in sorted(set(values.tolist())):
        content = png(bits, 0, row, (b"tRNS", transparent.to_bytes(2)))
        expected = np.where(values == transparent, 255, values * 255 // (2**bits - 1))
        np.testing.assert_array_equal(np.asarray(decode(content, 1))[0], expected)
        np.testing.assert_array_equal(
            np.asarray(decode(content, 4))[0, :, 3], np.where(values == transparent, 0, 255)
        )


def test_a_transparent_color_of_16_bits_is_refused():
    colors = np.array([[1000, 2000, 3000], [1001, 2000, 3000]], ">u2").tobytes()
    content = png(16, 2, colors, (b"tRNS", colors[:6]))
    with pytest.raises(BadImageError, match="transparent color"):
        decode(content, 3)
    assert decode(png(16, 2, colors), 3).getpixel((0, 0)) == (3, 7, 11)


ORIENTED = {  # the eight transpositions of EXIF 2.32, written for arrays
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_orientation(orientation):
    array = pixels(height=8, width=12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(Image.fromarray(array), exif=exif.tobytes())
    np.testing.assert_array_equal(decode(stored, 3), ORIENTED[orientation](array))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_orientation_of_tiffs(orientation, dtype):
    """Pillow reads the one, tifffile the other."""
    array = pixels(height=8, width=12, dtype=dtype)
    extra = [(274, "H", 1, orientation, True)]
    stored = tif(array, photometric="rgb", extratags=extra)
    turned = ORIENTED[orientation](array)
    np.testing.assert_array_equal(decode(stored, 3, np.dtype(dtype).name), turned)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_invalid_exif_data():
    invalid = encoded(
        Image.fromarray(pixels()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"
    )
    assert decode(invalid, 3).size == (40, 30)


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr("mim_jax.data.decode.LARGE", 50_000)
    monkeypatch.setattr("mim_jax.data.decode.STRIP", 4_000)


SMOOTH = Image.fromarray(pixels(0, height=6, width=8)).resize((401, 301))


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "LA", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_halved(small_limits, monkeypatch, mode, channels):
    content = encoded(SMOOTH.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    halved = np.asarray(decode(content, channels), float)
    in_strips = np.asarray(decode(content, channels, halve=False), float)
    monkeypatch.setattr("mim_jax.data.decode.LARGE", 10**9)
    whole = np.asarray(decode(content, channels), float)
    np.testing.assert_array_equal(in_strips, whole)
    assert halved.shape[:2] == (151, 201)
    means = whole[:300, :400].reshape(150, 2, 200, 2, -1).mean((1, 3))
    assert abs(halved.reshape(151, 201, -1)[:150, :200] - means).max() <= 1


def test_large_jpegs_are_halved_and_bombs_are_refused(small_limits, monkeypatch):
    large = encoded(SMOOTH, "JPEG", quality=95)
    assert decode(large, 3).size == (201, 151)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(BadImageError, match="decompression bomb"):
        decode(large, 3)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"words", "not an image of a known format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC: convert it to JPEG or pip install pillow-heif"),
        (bytes(128) + b"DICM" + bytes(400), "DICOM; convert it"),
        (b"PAR1" + bytes(20), "a Parquet table"),
        (jpeg()[:900], "image file is truncated"),
        (encoded(Image.fromarray(pixels()))[:900], "image file is truncated"),
        (npy(pixels(channels=13)), r"\(30, 40, 13\), has no axis of length data.channels = 3"),
        (npy(np.full((4, 4), np.nan)), "NaN or infinite"),
        (npy(np.ones((4, 4))), "its values are float32 in a set of uint8"),
        (npy(np.ones((4, 4, 4, 4))), r"its shape, \(4, 4, 4, 4\), is not"),
        (npy(np.ones((0, 4, 3))), r"its shape, \(0, 4, 3\), is not"),
        (npy(pixels())[:300], "array|read|EOF|reshape"),
        (npy(np.array([["a"]])), "not numbers"),
        (tif(pixels(), photometric="rgb")[:3000], "truncated|read"),
    ],
)
def test_reasons_of_bad_files(content, reason):
    with pytest.raises(BadImageError, match=reason):
        decode(content, 3)


def test_headers_of_arrays_do_not_allocate():
    claimed = io.BytesIO()
    shape = dict(descr="<f8", fortran_order=False, shape=(10**6, 10**6, 3))
    np.lib.format.write_array_header_1_0(claimed, shape)
    for read in (
        lambda: header(io.BytesIO(claimed.getvalue())),
        lambda: decode(claimed.getvalue(), 3),
    ):
        with pytest.raises(BadImageError, match="is too large"):
            read()


def blank_png(side, bits, color_type):
    """A PNG of zeros, compressed to about a thousandth."""
    channels = {0: 1, 2: 3}[color_type]
    compress = zlib.compressobj(9)
    row = bytes(1 + side * channels * bits // 8)
    pixels = b"".join(compress.compress(row) for _ in range(side)) + compress.flush()
    shape = struct.pack(">IIBBBBB", side, side, bits, color_type, 0, 0, 0)
    chunks = ((b"IHDR", shape), (b"IDAT", pixels), (b"IEND", b""))
    checked = (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def test_large_arrays_are_refused_before_they_are_decoded(monkeypatch):
    """Of 16 bits; images of 8 bits are halved instead."""
    monkeypatch.setattr("mim_jax.data.arrays.LARGEST", 2**20)
    content = blank_png(600, 16, 0)
    assert header(io.BytesIO(content)) == (600, 600, "I;16")
    assert decode(content, 1, "uint16").shape == (600, 600, 1)
    for read in (
        lambda: decode(content, 3, "uint16"),
        lambda: decode(blank_png(800, 16, 0), 1, "uint16"),
        lambda: decode(npy(np.zeros((600, 600), np.uint16)), 3, "uint16"),
    ):
        with pytest.raises(BadImageError, match="too large: cut it into tiles"):
            read()


def test_more_pages_than_any_image_has():
    stack = io.BytesIO()
    with tifffile.TiffWriter(stack) as file:
        for _ in range(tiff.PAGES + 1):
            file.write(np.zeros((4, 4), np.uint8), metadata=None)
    with pytest.raises(BadImageError, match="more than 1,024 pages"):
        header(io.BytesIO(stack.getvalue()))


# --- Channels and their axis. ---


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_thirteen_channels_as_tiff_and_npy(dtype, first):
    array = pixels(channels=13, dtype=dtype)
    stored = array.transpose(2, 0, 1) if first else array
    plan = "separate" if first else "contig"
    files = [
        npy(stored),
        tif(stored),
        tif(stored, compression="zlib"),
        tif(stored, planarconfig=plan, photometric="minisblack"),
        tif(stored, metadata={"axes": "CYX" if first else "YXC"}, photometric="minisblack"),
    ]
    for content in files:
        assert header(io.BytesIO(content), 13) == (40, 30, f"{np.dtype(dtype)} x 13")
        np.testing.assert_array_equal(decode(content, 13, np.dtype(dtype).name), array)
    assert header(io.BytesIO(files[0])) == (0, 0, f"{np.dtype(dtype)} array")
    assert header(io.BytesIO(files[3])) == (40, 30, f"{np.dtype(dtype)} x 13")


@pytest.mark.parametrize(
    "shape, channels",
    [((36, 36, 239), 239), ((224, 32, 32), 224), ((58, 48, 48), 58), ((200, 64, 32), 200)],
)
def test_the_channel_axis_is_found_by_its_length(shape, channels):
    array = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
    expected = array if shape[2] == channels else array.transpose(1, 2, 0)
    for content in (npy(array), npy(np.asfortranarray(array)), tif(array)):
        np.testing.assert_array_equal(decode(content, channels, "uint16"), expected)
        with pytest.raises(BadImageError, match=r"has no axis of length data.channels = 13"):
            decode(content, 13, "uint16")


def test_the_channel_axis_that_a_file_declares_is_used():
    """Of (24, 24, 24) no length tells the axis."""
    array = np.random.default_rng(0).integers(0, 65536, (24, 24, 24)).astype(np.uint16)
    for content in (npy(array), tif(array)):
        with pytest.raises(BadImageError, match=r"\(24, 24, 24\), has several axes of length"):
            decode(content, 24, "uint16")
    named = tif(array, metadata={"axes": "CYX"}, photometric="minisblack")
    np.testing.assert_array_equal(decode(named, 24, "uint16"), array.transpose(1, 2, 0))
    samples = tif(array, planarconfig="contig", photometric="minisblack")
    np.testing.assert_array_equal(decode(samples, 24, "uint16"), array)
    imagej = tif(array, imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(decode(imagej, 24, "uint16"), array.transpose(1, 2, 0))
    ome = tif(array, ome=True, metadata={"axes": "CYX"}, photometric="minisblack")
    np.testing.assert_array_equal(decode(ome, 24, "uint16"), array.transpose(1, 2, 0))


def test_axes_that_no_image_has_are_refused():
    array = np.zeros((3, 5, 16, 16), np.uint16)
    for content in (
        tif(array, metadata={"axes": "TCYX"}, photometric="minisblack"),
        tif(array, imagej=True, metadata={"axes": "TCYX"}),
    ):
        with pytest.raises(BadImageError, match="its axes are TCYX"):
            decode(content, 5, "uint16")


def test_grey_arrays_have_three_channels_if_needed():
    gray = pixels(channels=1)
    for content in (npy(gray), npy(gray[..., 0]), npy(gray.transpose(2, 0, 1)), tif(gray[..., 0])):
        np.testing.assert_array_equal(decode(content, 3), gray.repeat(3, 2))
        np.testing.assert_array_equal(decode(content, 1), gray[..., 0])


FOUR = pixels(channels=4)
FOUR[..., 3] = 0  # as alpha it would hide all
FOUR_BANDS = {
    "npy": npy(FOUR),
    "npy, channels first": npy(FOUR.transpose(2, 0, 1)),
    "unspecified": tif(FOUR, photometric="rgb", extrasamples=["unspecified"]),
    "gray": tif(FOUR, photometric="minisblack", planarconfig="contig"),
    "planar": tif(
        FOUR.transpose(2, 0, 1),
        photometric="rgb",
        planarconfig="separate",
        extrasamples=["unspecified"],
    ),
    "pages": tif(FOUR.transpose(2, 0, 1), photometric="minisblack"),
    "compressed": tif(FOUR, photometric="rgb", extrasamples=["unspecified"], compression="zlib"),
}


@pytest.mark.parametrize("content", FOUR_BANDS.values(), ids=FOUR_BANDS)
def test_a_fourth_band_is_data_unless_the_file_declares_alpha(content):
    np.testing.assert_array_equal(decode(content, 4), FOUR)
    assert suits(header(io.BytesIO(content)).mode, 4)
    with pytest.raises(BadImageError):
        decode(content, 3)


def test_a_declared_alpha_is_composited_on_white_with_any_number_of_bits():
    """By either library, straight and premultiplied, and in gray."""
    rgba = pixels(channels=4).astype(int)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    multiplied = rgba.copy()
    multiplied[..., :3] = np.round(rgba[..., :3] * alpha)
    for scale, dtype in ((1, np.uint8), (257, np.uint16)):
        for array, kind in ((rgba, "unassalpha"), (multiplied, "assocalpha")):
            content = tif((array * scale).astype(dtype), photometric="rgb", extrasamples=[kind])
            assert abs(np.asarray(decode(content, 3), float) - expected).max() <= 2
            assert decode(content, 4).mode == "RGBA"
            assert suits(header(io.BytesIO(content)).mode, 3)
            assert suits(header(io.BytesIO(content)).mode, 4)
        gray = (rgba[..., [0, 3]] * scale).astype(dtype)
        content = tif(
            gray, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]
        )
        assert abs(np.asarray(decode(content, 1), float) - expected[..., 0]).max() <= 1
    with pytest.raises(BadImageError, match=r"has 3 channels and no alpha, data.channels is 4"):
        decode(encoded(Image.fromarray(pixels())), 4)


def test_alpha_of_jpeg_2000():
    """Pillow takes the last of two or four channels for alpha, whatever the file defines."""
    for mode, channels in (("RGBA", 4), ("LA", 2)):
        array = FOUR[..., :channels].copy()
        image = Image.fromarray(array, mode)
        declared = encoded(image, "JPEG2000")
        np.testing.assert_array_equal(
            decode(declared, 3),
            np.full((30, 40, 3), 255) if mode == "RGBA" else decode(encoded(image), 3),
        )
        unspecified = bytearray(declared)
        at = declared.index(b"cdef") + 6 * channels + 2  # type of the last channel
        unspecified[at : at + 2] = b"\xff\xff"
        for content in (bytes(unspecified), encoded(image, "JPEG2000", no_jp2=True)):
            np.testing.assert_array_equal(decode(content, channels), array)
            assert header(io.BytesIO(content)) == (40, 30, f"uint8 x {channels}")
            with pytest.raises(BadImageError, match=f"it has {channels} channels"):
                decode(content, 3)


# --- TIFF: one meaning for both readers. ---


BASE = Image.fromarray(pixels(1, 6, 8).repeat(8, 0).repeat(8, 1))
INDEXED = BASE.quantize(16)
COLORS = np.zeros((3, 256), np.uint16)
COLORS[:, :16] = np.array(INDEXED.getpalette()[:48]).reshape(16, 3).T * 257


def several(*pages):
    """A TIFF of several pages (array, settings), each an image of its own."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for array, settings in pages:
            writer.write(array, **settings)
    return file.getvalue()


def test_palettes_with_thumbnails():
    indices = np.asarray(INDEXED)
    palette = dict(photometric="palette", colormap=COLORS)
    thumbnail = (indices[::4, ::4].copy(), dict(photometric="minisblack", subfiletype=1))
    expected = np.asarray(INDEXED.convert("RGB"))
    for content in (
        several((indices, palette)),
        several((indices, palette), thumbnail),
        several(thumbnail, (indices, palette)),
        several((indices, palette), (indices, palette)),  # further pages in color do not count
    ):
        np.testing.assert_array_equal(decode(content, 3), expected)
        assert header(io.BytesIO(content)) == (64, 48, "P")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_thumbnails_and_masks_are_not_the_image(dtype):
    image, small = pixels(1, channels=1, dtype=dtype)[..., 0], pixels(2, 10, 10, 1, dtype)[..., 0]
    mask = (np.ones(image.shape, bool), dict(subfiletype=4, photometric="mask"))
    thumbnail, full = (small, dict(subfiletype=1)), (image, {})
    for content in (
        several(thumbnail, full),
        several(full, thumbnail),
        several(full, mask),
        several(full, thumbnail, mask),
    ):
        decoded = np.asarray(decode(content, 1, np.dtype(dtype).name))
        np.testing.assert_array_equal(decoded.reshape(image.shape), image)
    with pytest.raises(BadImageError, match="it holds no full image, only a thumbnail"):
        decode(several(thumbnail), 1)


def test_white_as_zero():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        gray = pixels(channels=1, dtype=dtype)[..., 0]
        content = tif(gray, photometric="miniswhite")
        decoded = np.asarray(decode(content, 1, np.dtype(dtype).name)).reshape(gray.shape)
        np.testing.assert_array_equal(decoded, top - gray)
    bits = pixels(channels=1)[..., 0] > 127
    np.testing.assert_array_equal(decode(tif(bits, photometric="miniswhite"), 1), ~bits * 255)
    with pytest.raises(BadImageError, match="convert it to black as zero"):
        decode(tif(np.zeros((9, 9), np.float32), photometric="miniswhite"), 1, "float32")


def test_photometric_interpretations_that_are_refused():
    cmyk = np.asarray(BASE.convert("CMYK"))
    np.testing.assert_array_equal(
        decode(tif(cmyk, photometric="separated"), 3), Image.fromarray(cmyk, "CMYK").convert("RGB")
    )
    rgb = np.asarray(BASE)
    for array, photometric in (
        (cmyk.astype(np.uint16) * 257, "separated"),
        (rgb, "cielab"),
        (rgb.astype(np.uint16), "cielab"),
        (rgb, "ycbcr"),
        (rgb[..., 0].copy(), "cfa"),
        (pixels(channels=5), "separated"),
    ):
        content = tif(array, photometric=photometric)
        with pytest.raises(BadImageError):
            decode(content, 3)


def test_tiffs_that_libraries_read_differently_are_refused():
    gray = pixels(channels=1)[..., 0]
    pytest.importorskip("imagecodecs")
    content = tif(gray, compression="packbits", predictor=True)
    assert (np.asarray(Image.open(io.BytesIO(content))) != gray).any()
    with pytest.raises(BadImageError, match="predictor"):
        decode(content, 1)
    content = tif(gray, photometric="palette", colormap=COLORS >> 8)
    with pytest.raises(BadImageError, match="palette of 8 instead of 16 bits"):
        decode(content, 3)


def test_missing_pixels_of_numbers_are_refused():
    values = pixels(channels=1)[..., 0].astype(np.float32)
    values[0, 0] = np.finfo(np.float32).min
    for dtype, nodata in ((np.float32, "-3.4028235e+38"), (np.int16, "-32768")):
        stored = np.maximum(values, float(nodata)).astype(dtype)
        tag = [(42113, "s", 0, nodata, True)]
        with pytest.raises(BadImageError, match="declared as missing"):
            decode(tif(stored, extratags=tag), 1, "float32")
        whole = stored[1:]
        np.testing.assert_array_equal(
            decode(tif(whole, extratags=tag), 1, "float32")[..., 0], whole
        )


def test_separate_planes_of_premultiplied_colors():
    colors = np.array([[[40, 80, 100, 100], [0, 0, 0, 0]]], np.uint8)
    content = tif(
        colors.transpose(2, 0, 1),
        photometric="rgb",
        planarconfig="separate",
        extrasamples=["assocalpha"],
    )
    np.testing.assert_array_equal(decode(content, 4), [[[102, 204, 255, 100], [0, 0, 0, 0]]])


def twelve_bits(values):
    """A gray TIFF of 12 bits per sample, two samples in three bytes."""
    height, width = values.shape
    a, b = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    tags = {
        256: width,
        257: height,
        258: 12,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: height,
        279: len(packed),
    }
    packed += bytes(len(packed) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    return start + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_the_number_of_bits_that_a_file_declares_is_the_whole_range():
    """12 bits as TIFF and as PGM are the same share of the range."""
    values = np.arange(4096).reshape(64, 64)
    expected = np.round(values * (65535 / 4095))
    maps = b"P5 64 64 4095\n" + values.astype(">u2").tobytes()
    for content in (twelve_bits(values), maps):
        assert header(io.BytesIO(content))[2] in ("uint16 x 1", "I;16")
        assert abs(decode(content, 1, "uint16")[..., 0] - expected).max() <= 1


def test_pgm_of_16_bits():
    values = pixels(channels=1, dtype=np.uint16)[..., 0]
    content = b"P5 40 30 65535\n" + values.astype(">u2").tobytes()
    assert header(io.BytesIO(content)) == (40, 30, "I;16")
    np.testing.assert_array_equal(decode(content, 1, "uint16")[..., 0], values)
    np.testing.assert_array_equal(decode(content, 1), np.round(values / 257))
    png = encoded(Image.fromarray(values))
    np.testing.assert_array_equal(decode(png, 1, "uint16"), decode(content, 1, "uint16"))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32, np.float32, np.float64])
def test_numbers_of_other_types_become_float32(dtype, byteorder):
    info = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None
    values = np.linspace(*((info.min, info.max) if info else (-3, 3)), 1200).astype(dtype)
    values = values.reshape(30, 40)
    for content in (
        tif(values, byteorder=byteorder),
        npy(values.astype(values.dtype.newbyteorder(byteorder))),
    ):
        decoded = decode(content, 1, "float32")[..., 0]
        np.testing.assert_array_equal(decoded, values.astype(np.float32))


@pytest.mark.parametrize(
    "settings",
    [
        dict(photometric="rgb"),
        dict(photometric="rgb", compression="zlib", predictor=True),
        dict(photometric="rgb", tile=(16, 16)),
        dict(photometric="rgb", planarconfig="separate"),
        dict(photometric="rgb", planarconfig="separate", tile=(16, 16)),
        dict(photometric="rgb", planarconfig="separate", compression="zlib"),
        dict(photometric="rgb", rowsperstrip=7, byteorder=">"),
        dict(photometric="rgb", bigtiff=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_layouts(settings, dtype):
    array = pixels(dtype=dtype)
    planar = settings.get("planarconfig") == "separate"
    content = tif(array.transpose(2, 0, 1) if planar else array, **settings)
    np.testing.assert_array_equal(decode(content, 3, np.dtype(dtype).name), array)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "palette", "rgb"])
def test_both_libraries_give_the_same_pixels(photometric, monkeypatch):
    """Pillow reads these; made to, tifffile does too."""
    colormap = dict(colormap=COLORS) if photometric == "palette" else {}
    array = np.asarray(INDEXED if photometric != "rgb" else BASE)
    content = tif(array, photometric=photometric, **colormap)
    by_pillow = np.asarray(decode(content, 3))
    monkeypatch.setattr(tiff, "pillow_reads", lambda page: False)
    if photometric == "palette":
        with pytest.raises(BadImageError, match="photometric interpretation PALETTE"):
            decode(content, 3)
    else:
        np.testing.assert_array_equal(decode(content, 3), by_pillow)


def pages(count, circular=False):
    """A TIFF of many tiny pages."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    size, parts = 2 + len(entries) + 4, [struct.pack("<2sHI", b"II", 42, 72), bytes(64)]
    for i in range(count):
        last = 72 if circular else 0
        following = 72 + size * (i + 1) if i + 1 < count else last
        parts += [struct.pack("<H", len(tags)), entries, struct.pack("<I", following)]
    return b"".join(parts)


def test_pages_are_bounded():
    assert header(io.BytesIO(pages(1000))) == (8, 8, "uint8 x 1000")
    for content in (pages(64_000), pages(3, circular=True)):
        with pytest.raises(BadImageError):
            header(io.BytesIO(content))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("compression", ["zlib", "pixtiff", "lzma", "packbits", "jpeg"])
def test_parts_of_tiffs_hold_what_the_tags_say(compression, tiled, monkeypatch):
    """A strip or tile of a few bytes may inflate to gigabytes: no more than its size is read."""
    if compression in ("packbits", "jpeg"):  # tifffile alone does not write them
        pytest.importorskip("imagecodecs")
    monkeypatch.setattr(tiff, "HAS_IMAGECODECS", False)  # which limits deflate, but not JPEG
    monkeypatch.setattr(tiff, "pillow_reads", lambda page: False)
    array = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    settings = dict(photometric="minisblack", compression=compression)
    settings |= dict(tile=(32, 32)) if tiled else dict(rowsperstrip=32)
    honest = tif(array, **settings)
    assert decode(honest, 1).size == (64, 64)

    large = tif(np.zeros((640, 640), np.uint8), photometric="minisblack", compression=compression)
    file = io.BytesIO(large)
    page = tifffile.TiffFile(file).pages[0]
    file.seek(page.dataoffsets[0])
    bomb = file.read(page.databytecounts[0])
    page = tifffile.TiffFile(io.BytesIO(honest)).pages[0]
    content = bytearray(honest) + bomb
    for tag, values in ((273, len(honest)), (324, len(honest)), (279, len(bomb)), (325, len(bomb))):
        if tag in page.tags:  # the first part is the bomb
            entry = page.tags[tag]
            code = {3: "<H", 4: "<I"}[entry.dtype]
            struct.pack_into(code, content, entry.valueoffset, values)
    with pytest.raises(BadImageError, match="holds more pixels than its tags say"):
        decode(bytes(content), 1)


def test_inflated_sizes():
    """As decoders without limits give them, also for several streams and for parts of them."""
    rng = np.random.default_rng(0)
    for content in (rng.bytes(5000), b"\x80" * 9, b"\x81a" * 300, b"\x7fabc", b"\xff", b""):
        expected = len(_imagecodecs.packbits_decode(content))
        assert sum(tiff.pack_bits_sizes(content)) == expected
    plain = bytes(3 * tiff.INFLATED) + rng.bytes(100_000)
    streams = lzma.compress(plain) + lzma.compress(b"a", lzma.FORMAT_ALONE) + lzma.compress(plain)
    sizes = list(tiff.lzma_sizes(streams))
    assert sum(sizes) == len(lzma.decompress(streams)) == 2 * len(plain) + 1
    assert max(sizes) == tiff.INFLATED
    assert 0 < sum(tiff.lzma_sizes(streams[:200])) < len(plain)
    assert sum(tiff.deflate_sizes(zlib.compress(plain))) == len(plain)


def test_a_dictionary_of_lzma_is_bounded():
    """Its size is stored in the first bytes: here 1.5 GiB for an empty stream."""
    content = bytearray(lzma.compress(b"a", lzma.FORMAT_ALONE))
    struct.pack_into("<I", content, 1, 3 * 2**29)
    with pytest.raises(lzma.LZMAError, match="limit"):
        list(tiff.lzma_sizes(bytes(content)))


def test_bits_in_reversed_order(monkeypatch):
    """FillOrder 2: the bits of every compressed byte are reversed."""
    monkeypatch.setattr(tiff, "HAS_IMAGECODECS", False)
    monkeypatch.setattr(tiff, "pillow_reads", lambda page: False)
    array = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    packed = np.frombuffer(zlib.compress(array.tobytes()), np.uint8)
    stored = np.packbits(np.unpackbits(packed.reshape(-1, 1), axis=1)[:, ::-1], axis=1).tobytes()
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 266: 2, 273: 150, 277: 1, 278: 64}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries.append(struct.pack("<HHII", 279, 4, 1, len(stored)))
    start = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries)
    np.testing.assert_array_equal(decode(start.ljust(150, b"\0") + stored, 1), array)


def test_compressions_that_tifffile_alone_does_not_read():
    """Pillow decompresses one channel; more of them take imagecodecs."""
    rng = np.random.default_rng(0)
    for array, dtype in (
        (rng.integers(0, 65536, (30, 40)).astype(np.uint16), "uint16"),
        (rng.normal(size=(30, 40)).astype(np.float32), "float32"),
        (rng.integers(-(2**31), 2**31, (30, 40)).astype(np.int32), "float32"),
    ):
        content = encoded(Image.fromarray(array), "TIFF", compression="tiff_lzw")
        np.testing.assert_array_equal(decode(content, 1, dtype)[..., 0], array.astype(dtype))


def test_a_raw_file_of_a_camera_is_refused():
    with pytest.raises(BadImageError, match="raw file"):
        decode(b"II*\0\x10\0\0\0CR\2\0" + bytes(300), 3)
