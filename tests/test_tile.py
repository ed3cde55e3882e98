"""Tests of data/tile.py: tiles hold the pixels of the image, read whole or by rows."""

import io
import tracemalloc

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tifffile
from PIL import Image

from mim_jax import data
from mim_jax.data import prepare, tile
from mim_jax.data.arrays import BadImageError
from mim_jax.data.decode import decode
from tests.images import encoded, npy, pixels, plant, tif


@pytest.fixture
def by_rows(monkeypatch):
    """Reads TIFFs of any size by rows."""
    monkeypatch.setattr(tile, "LARGE", 0)
    monkeypatch.setattr("mim_jax.data.tiff.LARGE", 0)


pytestmark = pytest.mark.usefixtures("cache")


def joined(parts, shape):
    """Puts tiles back -> the image; fails where overlapping tiles differ."""
    image, seen = np.zeros(shape, parts[0][2].dtype), np.zeros(shape, bool)
    for top, left, part in parts:
        place = np.s_[top : top + part.shape[0], left : left + part.shape[1]]
        np.testing.assert_array_equal(image[place][seen[place]], part[seen[place]])
        image[place], seen[place] = part, True
    assert seen.all()
    return image


KINDS = {
    "tiled": dict(tile=(32, 48)),
    "strips": dict(rowsperstrip=7),
    "one strip": {},
    "compressed": dict(tile=(16, 16), compression="zlib", predictor=True),
    "big endian": dict(rowsperstrip=5, byteorder=">"),
    "BigTIFF": dict(tile=(32, 32), bigtiff=True),
}


@pytest.mark.parametrize("dtype, channels", [("uint8", 3), ("uint16", 13), ("uint8", 1)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_tiles_read_by_rows(kind, dtype, channels, by_rows):
    image = pixels(0, 100, 130, channels, np.dtype(dtype).type)
    settings = dict(photometric="rgb" if channels == 3 else "minisblack", metadata=None)
    if channels > 1:
        settings |= dict(planarconfig="contig")
    content = tif(image if channels > 1 else image[..., 0], **settings, **kind)
    assert tile.large_page(io.BytesIO(content)) is not None
    parts = list(tile.tiles(io.BytesIO(content), 40, channels, dtype))
    assert {part.shape for *_, part in parts} == {(40, 40, channels)}
    assert [(top, left) for top, left, _ in parts[:5]] == [
        *((0, 0), (0, 40), (0, 80), (0, 90), (40, 0))
    ]
    np.testing.assert_array_equal(joined(parts, image.shape), image)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(pixels(0, 100, 130))),
        encoded(Image.fromarray(pixels(0, 100, 130)), "TIFF"),
        npy(pixels(0, 100, 130)),
    ],
    ids=["PNG", "TIFF", "npy"],
)
def test_tiles_of_other_files(content):
    parts = list(tile.tiles(io.BytesIO(content), 64, 3, "uint8"))
    np.testing.assert_array_equal(joined(parts, (100, 130, 3)), pixels(0, 100, 130))


@pytest.mark.parametrize("settings", [dict(photometric="miniswhite"), dict(extrasamples=[2])])
def test_tags_are_applied_to_rows(settings, by_rows):
    """As for whole images: white as zero, and alpha."""
    white_is_zero = "photometric" in settings
    image = pixels(0, 50, 60, 1 if white_is_zero else 4)
    settings = dict(photometric="rgb", metadata=None, rowsperstrip=4) | settings
    content = tif(image[..., 0] if white_is_zero else image, **settings)
    channels = 1 if white_is_zero else 3
    parts = list(tile.tiles(io.BytesIO(content), 20, channels, "uint8"))
    whole = np.asarray(decode(content, channels)).reshape(50, 60, channels)
    ours = joined(parts, whole.shape).astype(int)
    assert abs(ours - whole).max() <= 1  # of alpha, Pillow rounds in another way


def test_small_images_are_kept_whole():
    ((top, left, part),) = tile.tiles(io.BytesIO(npy(pixels(0, 20, 30))), 64, 3, "uint8")
    assert (top, left, part.shape) == (0, 0, (20, 30, 3))


def test_damaged_parts_are_refused(by_rows):
    content = tif(pixels(0, 100, 130), photometric="rgb", compression="zlib", rowsperstrip=10)
    damaged = bytearray(content)
    damaged[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    with pytest.raises(BadImageError):
        list(tile.tiles(io.BytesIO(bytes(damaged)), 50, 3, "uint8"))


def test_a_large_tiff_is_read_in_little_memory(tmp_path):
    """150 million values, of which one line of tiles is read at a time."""
    path = tmp_path / "set" / "large.tif"
    path.parent.mkdir()
    with tifffile.TiffWriter(path) as file:
        settings = dict(tile=(256, 256), compression="zlib", photometric="rgb", dtype=np.uint8)
        blank = (np.full((256, 256, 3), i % 251, np.uint8) for i in range(28 * 28))
        file.write(blank, shape=(7168, 7168, 3), **settings)
    with path.open("rb") as file:
        tracemalloc.start()
        count = sum(1 for _ in tile.tiles(file, 256, 3, "uint8"))
        assert tracemalloc.get_traced_memory()[1] < 3e7
        tracemalloc.stop()
    assert count == 28 * 28


def test_the_command(tmp_path, capsys):
    root, packed = tmp_path / "set", tmp_path / "packed"
    files = {
        f"{split}/{name}/{i}.png": encoded(Image.fromarray(pixels(i, 70, 100)))
        for split, numbers in (("train", (0, 1, 2)), ("val", (3,)))
        for i in numbers
        for name in ("cat", "dog")
    }
    files["train/cat/bad.png"] = files["train/cat/0.png"][:5000]
    plant(root, files)
    arguments = [f"folder:{root}", f"--to={packed}", "--tile=50", "--labels=folder"]
    assert prepare.main([*arguments, "--shard_mb=0.02"]) == 0
    printed = capsys.readouterr().out
    assert "24 in train, 8 in validation" in printed
    assert "train/cat/bad.png is left out" in printed
    dataset = data.make(name=f"tfds:{packed}", size=50, crop_fraction=1.0)
    assert (dataset.examples, dataset.class_names) == (24, ("cat", "dog"))
    assert dataset.fingerprint["version"].endswith("tiles of 50")
    (batch,) = dataset.evaluation_batches(8)
    assert sorted(batch["label"].tolist()) == [0] * 4 + [1] * 4
    parts = {}
    for i in range(8):
        name, _, place = dataset.evaluation.name_of(i).partition("#")
        parts.setdefault(name, []).append((*map(int, place.split(",")), batch["image"][i]))
    for tiles in parts.values():
        np.testing.assert_array_equal(joined(tiles, (70, 100, 3)), pixels(3, 70, 100))
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    assert prepare.main([*arguments, "--shard_mb=0.02"]) == 0  # nothing is left to do
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    assert prepare.main([*arguments[:2], "--tile=40"]) == 2
    assert "holds other images or shards" in capsys.readouterr().err


def test_a_single_image(tmp_path, capsys):
    plant(tmp_path / "set", {"map.png": encoded(Image.fromarray(pixels(0, 64, 64)))})
    assert prepare.main([f"folder:{tmp_path}/set", f"--to={tmp_path}/packed", "--tile=16"]) == 0
    assert "16 in train" in capsys.readouterr().out
    settings = dict(split="train[2:]", evaluation_split="train[:2]")
    assert data.make(name=f"tfds:{tmp_path}/packed", size=16, **settings).examples == 14


def test_tiles_of_many_bands(tmp_path):
    image = pixels(0, 60, 60, 5, np.uint16)
    content = tif(image, photometric="minisblack", planarconfig="contig")
    plant(tmp_path / "set", {f"{i}.tif": content for i in range(4)})
    arguments = [f"folder:{tmp_path / 'set'}", f"--to={tmp_path / 'packed'}", "--tile=30"]
    assert prepare.main(arguments) == 0
    name = f"tfds:{tmp_path / 'packed'}"
    dataset = data.make(name=name, size=30, channels=5, crop_fraction=1.0)
    (batch,) = dataset.evaluation_batches(4)
    assert batch["image"].dtype == np.uint16
    places = [dataset.evaluation.name_of(i).partition("#")[2].split(",") for i in range(4)]
    parts = [(*map(int, place), x) for place, x in zip(places, batch["image"], strict=True)]
    np.testing.assert_array_equal(joined(parts, image.shape), image)
    assert len(tfds.builder_from_directory(tmp_path / "packed").as_data_source("train")) == 12
