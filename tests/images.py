"""Small generated images, files and folders of them, for tests of data/."""

import io
import tarfile
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def pixels(seed=0, height=30, width=40, channels=3, dtype=np.uint8):
    """Returns random values over the whole range of 8 or 16 bits (h, w, c)."""
    high = 256 if dtype == np.uint8 else 65536
    return np.random.default_rng(seed).integers(0, high, (height, width, channels)).astype(dtype)


def encoded(image, form="PNG", **settings):
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def jpeg(seed=0, **size):
    return encoded(Image.fromarray(pixels(seed, **size)), "JPEG", quality=95)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tif(array, **settings):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **settings)
    return file.getvalue()


PIXEL = encoded(Image.new("RGB", (1, 1), "red"))


def plant(root: Path, files: dict[str, bytes]) -> Path:
    """Writes files below a folder and returns the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """Writes a tar file of files and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def open_tree(root: Path) -> Path:
    """Plants a tree with images of many kinds, files that are none, and a loop of links."""
    plant(root, GOOD | BAD | {name: content for name, (content, _) in NO_IMAGES.items()})
    plant(root, {".DS_Store": b"x", "one/._deep.jpg": b"x", "__MACOSX/a.jpg": b"x"})
    (root / "empty").mkdir()
    (root / "loop").symlink_to(root)
    return root


GOOD = {
    "one/two/three/deep.jpg": jpeg(1),
    "one/cmyk.jpg": encoded(Image.fromarray(pixels(2)).convert("CMYK"), "JPEG"),
    "one/palette.png": encoded(Image.fromarray(pixels(3)).convert("P")),
    "one/gray with alpha.png": encoded(Image.fromarray(pixels(4)).convert("LA")),
    "one/bit.png": encoded(Image.fromarray(pixels(5)).convert("1")),
    "one/sixteen bits.png": encoded(Image.fromarray(pixels(6, dtype=np.uint16)[..., 0])),
    "two/pixel.png": PIXEL,
    "two/thin.png": encoded(Image.new("RGB", (1, 500), "blue")),
    "two/no suffix": encoded(Image.fromarray(pixels(7)), "WEBP"),
    "two/a jpeg.png": jpeg(8),
    "two/ünïcode\n.tif": encoded(Image.fromarray(pixels(9)), "TIFF"),
    "array.npy": npy(pixels(10)),
}
BAD = {"truncated.jpg": jpeg(11)[:900]}  # its header is whole
NO_IMAGES = {  # name: (content, reason)
    "empty.jpg": (b"", "the file is empty"),
    "two/notes.txt": (b"a day at the sea", "not an image of a known format"),
    "two/head.jpg": (jpeg(12)[:50], ""),
    "words.npy": (npy(np.array([["a"]])), "not numbers"),
    "more.tar.gz": (b"\x1f\x8b", "compressed: unpack it"),
    "cut.tar": (b"\0" * 100, ""),
}
UNREAD = {name: reason for name, (_, reason) in NO_IMAGES.items()}
UNREAD["loop"] = "a link to a folder that is scanned already"
