"""Images with masks: what is paired, how values are read, and what is refused by its name."""

import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError
from mim_jax.data import masks, pairs, tree
from mim_jax.data.classes import palette, parse_ade20k, parse_classes
from mim_jax.data.decode import BadImageError

RNG = np.random.default_rng(0)
CLASSES = "0,sky,#0080ff\n1,road\n7,\n"


pytestmark = pytest.mark.usefixtures("cache")


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8), mode).save(path, **options)


def build(root, names=("train/a", "train/b", "val/c"), size=(5, 7)):
    """A data set with images/ and masks/ of these names."""
    for name in names:
        save(root / f"images/{name}.jpg", RNG.integers(0, 256, (*size, 3)))
        save(root / f"masks/{name}.png", RNG.choice([0, 1, 7], size))
    (root / "classes.csv").write_text(CLASSES)
    return root


def opened(root, splits=("train", "validation"), **options):
    return pairs.open_masked(f"folder:{root}", splits, **options)


def test_folders(tmp_path):
    train, validation = opened(build(tmp_path / "set"))
    assert sorted(map(train.name_of, range(2))) == ["images/train/a.jpg", "images/train/b.jpg"]
    assert [validation.name_of(0)] == ["images/val/c.jpg"]
    assert train.classes.names == ("sky", "road")
    assert train.classes.colors[0] == (0, 128, 255)
    np.testing.assert_array_equal(train.sizes, [[5, 7], [5, 7]])
    example = validation.examples[0]
    assert example["image"] == (tmp_path / "set/images/val/c.jpg").read_bytes()
    assert example["mask"] == (tmp_path / "set/masks/val/c.png").read_bytes()
    assert train.fingerprint["version"] != validation.fingerprint["version"]


def test_common_stems_without_splits(tmp_path):
    """A twentieth is held out; a palette image is a mask, beside a photograph in PNG too."""
    for i in range(20):
        save(tmp_path / f"set/{i}.jpg", RNG.integers(0, 256, (4, 4, 3)))
        save(tmp_path / f"set/{i}.png", RNG.integers(0, 2, (4, 4)))
    (tmp_path / "set/classes.csv").write_text(CLASSES)
    train, validation = opened(tmp_path / "set")
    assert (len(train.examples), len(validation.examples)) == (19, 1)
    parts = opened(tmp_path / "set", ["train[:10]", "train[10:]"])
    names = [part.name_of(i) for part in parts for i in range(len(part.examples))]
    assert names == [train.name_of(i) for i in range(19)]
    for i in range(20):
        (tmp_path / f"set/{i}.jpg").unlink()
        (tmp_path / f"set/{i}.png").unlink()
    with pytest.raises(UserError, match=r"neither images/ and masks/"):
        opened(tmp_path / "set")


def test_splits_are_those_of_any_data_set(tmp_path):
    """Other spellings; `test` stands in for a missing validation; what lies elsewhere is left."""
    root = build(tmp_path / "set", ["Training/a", "Training/b/c", "val2017/d", "e"])
    train, validation = opened(root)
    assert sorted(map(train.name_of, range(2))) == [
        "images/Training/a.jpg",
        "images/Training/b/c.jpg",
    ]
    assert [validation.name_of(i) for i in range(len(validation.examples))] == [
        "images/val2017/d.jpg"
    ]
    _, test = opened(build(tmp_path / "other", ["train/a", "test/b"]))
    assert test.name_of(0) == "images/test/b.jpg"
    with pytest.raises(UserError, match="has no split 'extra'"):
        opened(root, ["extra"])


def test_zip_is_read_as_the_folder(tmp_path):
    root = build(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*.*")):
            file.write(path, f"outer/{path.relative_to(root)}")
        file.writestr("__MACOSX/outer/images/train/a.jpg", b"")
    for folder, packed in zip(opened(root), opened(tmp_path / "set.zip"), strict=True):
        assert folder.fingerprint == packed.fingerprint
        packed.examples[0]
        examples = pickle.loads(pickle.dumps(packed.examples))
        assert [examples[i] for i in range(len(examples))] == list(folder.examples)


def test_ade20k_release(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save(root / f"images/{split}/{name}.jpg", RNG.integers(0, 256, (4, 6, 3)))
        save(root / f"annotations/{split}/{name}.png", [[0, 1, 2, 3, 150, 0]] * 4)
    lines = [f"{i}\t0.1\t5\t5\t0\tthing{i}, other word" for i in range(1, 151)]
    header = "Idx\tRatio\tTrain\tVal\tStuff\tName"
    (root / "objectInfo150.txt").write_text("\n".join([header, *lines]) + "\n")
    train, validation = opened(root)
    assert train.classes.names[:2] == ("thing1", "thing2")
    assert len(train.classes.names) == 150
    labels = train.classes.labels(masks.read_values(train.examples[0]["mask"]))
    np.testing.assert_array_equal(labels[0], [255, 0, 1, 2, 149, 255])
    assert validation.name_of(0) == "images/validation/ADE_val_00000001.jpg"


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_values_are_read_as_they_are(tmp_path, bits, palette):
    """Of any depth, and of a palette the indices: its colors are all alike here."""
    values = RNG.integers(0, min(2**bits, 200), (6, 9)).astype(np.uint8)
    path = tmp_path / "mask.png"
    if palette:
        image = Image.fromarray(values, "P")
        image.putpalette([7, 7, 7] * 256)
        image.save(path, bits=bits)
    else:
        path.write_bytes(gray_png(values, bits))
    np.testing.assert_array_equal(masks.read_values(path.read_bytes()), values)


def gray_png(values: np.ndarray, bits: int) -> bytes:
    """A gray PNG of any depth, by the standard: Pillow does not write those of 2 and 4 bits."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    height, width = values.shape
    unpacked = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(unpacked.reshape(height, -1).astype(np.uint8), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def test_16_bits_and_many_classes(tmp_path):
    """More than 255 classes need labels of 16 bits."""
    lines = "".join(f"{1000 + i},class {i}\n" for i in range(300))
    classes = parse_classes(lines + "0,\n", "classes.csv")
    values = RNG.choice([0, 1000, 1299], (4, 6)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "mask.png")
    read = masks.read_values((tmp_path / "mask.png").read_bytes())
    np.testing.assert_array_equal(read, values)
    labels = classes.labels(read)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, np.where(values == 0, 65535, values - 1000))
    with pytest.raises(BadImageError, match="value 999, which is not a class"):
        classes.labels(np.array([[999]], np.uint16))


def broken(root, how):
    """Makes one file wrong."""
    mask = root / "masks/train/a.png"
    if how == "colored":
        save(mask, RNG.integers(0, 2, (5, 7, 3)))
    elif how == "size":
        save(mask, RNG.integers(0, 2, (7, 5)))
    elif how == "missing":
        mask.unlink()
    elif how == "extra":
        save(root / "masks/train/z.png", RNG.integers(0, 2, (5, 7)))
    elif how == "range":
        save(mask, RNG.choice([0, 1, 3], (5, 7)))
    elif how == "jpeg":
        mask.unlink()
        save(mask.with_suffix(".jpg"), RNG.integers(0, 2, (5, 7)))
    elif how == "cut":
        mask.write_bytes(mask.read_bytes()[:40])
    elif how == "image":
        (root / "images/train/a.jpg").write_bytes(b"no image")
    elif how == "cut image":
        (root / "images/train/a.jpg").unlink()
        save(root / "images/train/a.png", RNG.integers(0, 256, (5, 7, 3)))
        (root / "images/train/a.png").write_bytes((root / "images/train/a.png").read_bytes()[:60])
    elif how == "turned":
        exif = Image.Exif()
        exif[masks.ORIENTATION] = 6
        save(root / "images/train/a.jpg", RNG.integers(0, 256, (5, 7, 3)), exif=exif)
    elif how == "turned mask":
        exif = Image.Exif()
        exif[masks.ORIENTATION] = 3
        save(mask, RNG.integers(0, 2, (5, 7)), exif=exif)
    elif how == "alpha":
        save(mask, RNG.integers(0, 2, (5, 7, 2)), "LA")
    elif how == "two images":
        save(root / "images/train/a.png", RNG.integers(0, 256, (5, 7, 3)))
    elif how == "not UTF-8":
        (root / "images/train/a.jpg").rename(root / "images/train" / os.fsdecode(b"\xe9.jpg"))
    elif how == "broken link":
        (root / "images/train/a.jpg").unlink()
        (root / "images/train/a.jpg").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("colored", r"masks/train/a\.png: it is in color \(RGB\)"),
        ("size", r"masks/train/a\.png: it has 5 x 7 pixels, its image 7 x 5"),
        ("missing", r"images/train/a\.jpg has no mask: masks/train/a\.png is missing"),
        ("extra", r"masks/train/z\.png has no image"),
        ("range", r"masks/train/a\.png has values without a class: 3"),
        ("jpeg", r"masks/train/a\.jpg: it is not a whole PNG"),
        ("cut", r"masks/train/a\.png: it is not a whole PNG"),
        ("image", r"images/train/a\.jpg"),
        ("cut image", r"images/train/a\.png: image file is truncated"),
        ("turned", r"images/train/a\.jpg has an EXIF orientation"),
        ("turned mask", r"masks/train/a\.png has an EXIF orientation"),
        ("alpha", r"masks/train/a\.png: it has an alpha channel \(LA\)"),
        ("two images", r"images/train/a\.jpg and images/train/a\.png differ only in their suffix"),
        ("not UTF-8", r"images/train/\\xe9\.jpg has no mask: masks/train/\\xe9\.png is missing"),
        ("broken link", r"masks/train/a\.png has no image"),
    ],
)
def test_refused_by_name(tmp_path, how, words):
    root = build(tmp_path / "set")
    opened(root)  # what was right before does not count
    broken(root, how)
    with pytest.raises(UserError, match=words):
        opened(root)


def test_links_and_names_of_any_bytes(tmp_path):
    root = build(tmp_path / "set")
    for name in ("images/train/a.jpg", "masks/train/a.png"):
        path = root / name
        path.rename(path.with_name(os.fsdecode(b"\xe9[*]\n") + path.suffix))
        save(path.parent / "@eaDir" / path.name, np.zeros((5, 7)))
    (root / "images/train/z.jpg").symlink_to("nowhere.jpg")
    (root / "images/loop").symlink_to("..")
    train, _ = opened(root)
    names = sorted(map(train.name_of, range(len(train.examples))))
    assert names == ["images/train/\\xe9[*]\\n.jpg", "images/train/b.jpg"]
    assert dict(train.unread) == {
        "images/train/z.jpg": "a broken link",
        "images/loop": "a link to a folder that is scanned already",
    }


@pytest.mark.parametrize("shape", [(5, 7, 3), (3, 5, 7)])
def test_arrays_with_masks(tmp_path, shape):
    root = build(tmp_path / "set")
    for path in (root / "images").rglob("*.jpg"):
        np.save(path.with_suffix(".npy"), RNG.integers(0, 256, shape, np.uint8))
        path.unlink()
    train, _ = opened(root, channels=3)
    np.testing.assert_array_equal(train.sizes, [[5, 7], [5, 7]])


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"words"])
def test_damaged_cache_of_checks_is_ignored(tmp_path, cache, damage):
    root = build(tmp_path / "set")
    opened(root)
    (kept,) = cache.rglob("masks/*.npy")
    kept.write_bytes(damage)
    np.testing.assert_array_equal(opened(root)[0].sizes, [[5, 7], [5, 7]])


def test_zip_with_a_password_is_refused(tmp_path):
    root = build(tmp_path / "set")
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in sorted(x for x in root.rglob("*") if x.is_file()):
            file.write(name, name.relative_to(root))
        for member in file.filelist:
            member.flag_bits |= tree.ENCRYPTED
    with pytest.raises(UserError, match="it is encrypted"):
        opened(path)


def test_large_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    root = build(tmp_path / "set")
    monkeypatch.setattr(masks, "LARGE", 20)
    with pytest.raises(UserError, match=r"masks/train/a\.png: it has more than 20 pixels: cut"):
        opened(root)
    monkeypatch.setattr(tree, "LARGEST", 100)
    with pytest.raises(UserError, match=r"images/train/a\.jpg: it has \d+ bytes, more than 100"):
        opened(root)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_file_unpacks_to_no_more_than_its_sizes(tmp_path, method):
    """A mask of 100 MB of zeros, of which the zip file says that it has 1000 bytes."""
    root, size = build(tmp_path / "set"), 10**8
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as file:
        for path in sorted(root.rglob("*.*")):
            if path.name == "c.png":
                file.writestr(str(path.relative_to(root)), bytes(size))
            else:
                file.write(path, path.relative_to(root))
    content = (tmp_path / "set.zip").read_bytes()
    claimed = content.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    (tmp_path / "set.zip").write_bytes(claimed)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"(masks/val/c\.png: |classes\.csv )cannot be read: "):
            opened(tmp_path / "set.zip")
        assert tracemalloc.get_traced_memory()[1] < 5e7
    finally:
        tracemalloc.stop()


def test_how_many_are_wrong(tmp_path):
    root = build(tmp_path / "set")
    for name in ("a", "b"):
        save(root / f"masks/train/{name}.png", RNG.choice([0, 9], (5, 7)))
    with pytest.raises(
        UserError, match=r"a\.png .* without a class: 9\. \(1 other files are wrong too\)"
    ):
        opened(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,sky\n0,road\n", "line 2: .*value 0 occurs twice"),
        ("0,sky\n", "at least 2 classes"),
        ("0,sky\nroad,1\n", "line 2: .*must be VALUE,NAME"),
        ("0,sky,blueish\n1,road\n", "'blueish' is not a color"),
        ("0,sky\n70000,road\n", "must be VALUE,NAME"),
        ("-1,sky\n0,road\n1,car\n", "line 1: .*must be VALUE,NAME"),
        ("0,sky\n1,sky\n", "line 2: .*name 'sky' occurs twice"),
        (f"0,{'s' * 200_000}\n1,road\n", "cannot be read: field larger"),
    ],
)
def test_classes_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_classes(text, "classes.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_classes(end):
    classes = parse_classes(end.join(("value,name", "0,sky", "1,road", "7,", "")), "classes.csv")
    assert classes[:1] + classes[2:] == (("sky", "road"), (0, 1), (7,))


def test_ade20k_list_that_is_malformed():
    for text in ("", "Idx\tName\nx\twall\n2\tsky\n"):
        with pytest.raises(UserError, match=r"objectInfo150\.txt must"):
            parse_ade20k(text)


def test_classes_are_needed(tmp_path):
    root = build(tmp_path / "set")
    (root / "classes.csv").rename(tmp_path / "other.csv")
    with pytest.raises(UserError, match=r"has no classes\.csv"):
        opened(root)
    train, _ = opened(root, classes=str(tmp_path / "other.csv"))
    assert train.classes.names == ("sky", "road")
    (tmp_path / "other.csv").write_text("value,name,color\n0,sky\n1,road\n7,\n")
    assert opened(root, classes=str(tmp_path / "other.csv"))[0].classes.ignored == (7,)


def test_palette_is_that_of_pascal_voc():
    colors = palette(150)
    assert colors[:4] == ((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert len(set(colors)) == 150
    assert (0, 0, 0) not in colors


def test_emoji_masks():
    """Each class occurs, white is background, and most pixels count."""
    (train,) = pairs.open_masked("emoji", ["train"])
    pixels = np.concatenate(
        [
            train.classes.labels(masks.read_values(train.examples[i]["mask"])).ravel()
            for i in range(0, 200, 5)
        ]
    )
    shares = np.bincount(pixels, minlength=256) / len(pixels)
    assert (shares[:6] > 0.01).all()
    assert shares[0] > 0.2
    assert 0 < shares[255] < 0.1
    with pytest.raises(UserError, match="has no masks"):
        pairs.open_masked("cifar10", ["train"])
