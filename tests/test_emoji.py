"""Tests of data/emoji.py and of the built-in data set."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import mim_jax.data
from mim_jax.data import emoji

BUILTIN = Path(mim_jax.data.__file__).with_name("builtin")
SHIPPED = BUILTIN / "emoji/1.0.0"


def read(folder):
    builder = tfds.builder_from_directory(folder)
    decoders = {"image": tfds.decode.SkipDecoding()}
    splits = {s: list(builder.as_data_source(s, decoders=decoders)) for s in builder.info.splits}
    return builder.info.features["label"].names, splits


@pytest.fixture(scope="module")
def shipped():
    return read(SHIPPED)


def test_shipped_counts_and_labels(shipped):
    """The counts of Emoji 16.0; they may change only with the version of the set."""
    names, splits = shipped
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 1340,
        "validation": 566,
    }
    assert len(names) == 9
    assert "Smileys & Emotion" in names
    assert "Component" not in names
    for rows in splits.values():
        assert {int(row["label"]) for row in rows} == set(range(9))


def test_shipped_splits_are_disjoint_and_follow_the_rule(shipped):
    _, splits = shipped
    codes = {split: {row["code"].decode() for row in rows} for split, rows in splits.items()}
    assert {split: len(members) for split, members in codes.items()} == {
        "train": 1340,
        "validation": 566,
    }
    assert not codes["train"] & codes["validation"]
    assert all(emoji.split_of(code) == split for split in codes for code in codes[split])
    names = {row["code"]: row["name"] for rows in splits.values() for row in rows}
    assert names[b"1F600"] == b"grinning face"


def test_shipped_images_are_64x64_rgb_on_white(shipped):
    _, splits = shipped
    white, total = 0, 0
    for row in (row for rows in splits.values() for row in rows):
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        pixels = np.asarray(image)
        assert pixels.std() > 0, row["name"]
        white += (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(-1).sum()
        total += 4
    assert white / total > 0.9


def test_shipped_files_are_small_licensed_and_free_of_paths():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 7_000_000
    licence = (BUILTIN / "LICENSE-noto-emoji.txt").read_text()
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "Noto Emoji" in licence
    info = json.loads((SHIPPED / "dataset_info.json").read_text())
    assert info["moduleName"] == "mim_jax.data.emoji"  # not "__main__"
    assert all(split["filepathTemplate"].startswith("{DATASET}") for split in info["splits"])


def test_reads_without_tensorflow():
    code = f"""
import sys, tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(SHIPPED)!r}).as_data_source(
    "train", decoders={{"image": tfds.decode.SkipDecoding()}})
assert source[0]["image"].startswith(b"\\x89PNG")
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def package(tmp_path):
    """A tiny npm package: one emoji of each image mode, and a component."""
    images = tmp_path / "package/img/google/64"
    images.mkdir(parents=True)
    clear = {"RGBA": (255, 0, 0, 0), "LA": (0, 0), "P": 0}
    solid = {"RGBA": (255, 0, 0, 255), "LA": (0, 255), "P": 1}
    entries = []
    for code, mode, category in (
        ("1F600", "RGBA", "Smileys & Emotion"),
        ("0023-FE0F-20E3", "LA", "Symbols"),
        ("1F3E5", "P", "Travel & Places"),
        ("1F3FB", "RGBA", "Component"),
    ):
        name = f"{code.lower()}.png"
        image = Image.new(mode, (64, 64), clear[mode])
        if mode == "P":
            image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(solid[mode], (16, 16, 48, 48))
        image.save(images / name, **({"transparency": 0} if mode == "P" else {}))
        entries.append({"unified": code, "name": f"N {code}", "image": name, "category": category})
    (tmp_path / "package/emoji.json").write_text(json.dumps(entries))
    return tmp_path / "package"


def test_split_rule():
    """Changing the rule requires a new version of the set."""
    codes = ("1F600", "0023-FE0F-20E3", "1F3E5")
    assert [emoji.split_of(code) for code in codes] == ["train", "validation", "validation"]


def test_png_is_composited_on_white(package):
    colors = {"1f600": (255, 0, 0), "0023-fe0f-20e3": (0, 0, 0), "1f3e5": (0, 0, 255)}
    for name, color in colors.items():
        png = emoji.png_on_white(package / f"img/google/64/{name}.png")
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((32, 32)) == color


def test_rebuilds_and_replaces(package, tmp_path):
    first = emoji.build(package, tmp_path / "out")
    assert first == tmp_path / "out/emoji/1.0.0"
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    (first / "stale").touch()
    command = [sys.executable, "-m", "mim_jax.data.emoji", f"--package={package}"]
    subprocess.run([*command, f"--to={tmp_path / 'out'}"], check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before

    names, splits = read(first)
    rows = [row for split in splits.values() for row in split]
    assert names == ["Smileys & Emotion", "Symbols", "Travel & Places"]
    assert {row["code"] for row in rows} == {b"1F600", b"0023-FE0F-20E3", b"1F3E5"}
    for split, members in splits.items():
        for row in members:
            code = row["code"].decode()
            assert emoji.split_of(code) == split
            assert row["name"] == f"n {code}".lower().encode()
            stored = package / f"img/google/64/{code.lower()}.png"
            assert row["image"] == emoji.png_on_white(stored)
