"""Tests of data/folder.py, layout.py and labels.py: splits and labels of trees and tars."""

import csv
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mim_jax import UserError
from mim_jax.data import pack
from mim_jax.data.folder import Folder
from mim_jax.data.layout import is_shard, layout, split_of
from mim_jax.data.sources import open_sources
from tests.images import PIXEL, jpeg, plant, tar

pytestmark = pytest.mark.usefixtures("cache")


def tree(root, *names):
    return plant(root, dict.fromkeys(names, PIXEL))


def splits_of(folder):
    """Returns {split: names of its images}."""
    return {split: {folder.names[row] for row in rows} for split, rows in folder.splits.items()}


def labels_of(root, how):
    """Returns {name: label's name} of all images."""
    folder = Folder(root, how)
    names = [*folder.label_names, ""]
    return {name: names[label] for name, label in zip(folder.names, folder.labels, strict=True)}


# --- Splits. ---


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "test"])
def test_folders_are_splits(tmp_path, validation):
    names = ["train/a/1.png", "train/b/2.png", f"{validation}/a/3.png", "extra/4.png", "5.png"]
    folder = Folder(tree(tmp_path, *names))

    def of(split):
        return {folder.names[row] for row in folder.rows(split)}

    assert of("train") == set(names[:2])
    assert of("validation") == {names[2]}
    assert of("extra") == {"extra/4.png"}
    assert of("all") == set(names[:4])
    assert folder.unread == [("5.png", "it is not in the folder of a split")]


@pytest.mark.parametrize(
    "train, other, split",
    [
        ("Training", "Testing", "test"),
        ("Train", "Test", "test"),
        ("train", "eval", "validation"),
        ("TRAIN", "VAL", "validation"),
        ("train", "dev", "validation"),
        ("train2017", "val2017", "validation"),
        ("training_set", "test_set", "test"),
        ("train_images", "validation images", "validation"),
        ("seg_train", "seg_test", "test"),
        ("trainset", "Evaluation", "validation"),
        ("dataset/train", "dataset/Valid", "validation"),
        ("a/b/Train", "a/b/Dev", "validation"),
        ("seg_train/seg_train", "seg_test/seg_test", "test"),
        ("train", "holdout", "holdout"),  # told by the same folders below
    ],
)
def test_folders_of_splits_in_any_spelling_are_not_labels(tmp_path, train, other, split):
    names = [f"{top}/{kind}/{i}.png" for top in (train, other) for kind in "ab" for i in "12"]
    folder = Folder(tree(tmp_path, *names), "folder")
    assert folder.label_names == ["a", "b"]
    splits = splits_of(folder)
    assert splits["train"] | (splits["validation"] if split == "holdout" else set()) == {
        name for name in names if name.startswith(train)
    }
    assert splits[split] == {name for name in names if name.startswith(other)}
    assert labels_of(tmp_path, "folder") == {name: name[-7] for name in names}


def test_classes_above_the_splits(tmp_path):
    names = [f"{kind}/{split}/{i}.png" for kind in "ab" for split in ("train", "test") for i in "1"]
    folder = Folder(tree(tmp_path / "one", *names), "folder")
    assert folder.label_names == ["a", "b"]
    assert splits_of(folder)["test"] == {"a/test/1.png", "b/test/1.png"}
    names = [
        f"{kind}/{split}/{state}/1.png"
        for kind in "ab"
        for split in ("train", "test")
        for state in ("good", "bad")
    ]
    assert set(Folder(tree(tmp_path / "two", *names)).splits) == {"train", "test", "validation"}
    with pytest.raises(UserError, match="folders above and below the splits could both be labels"):
        Folder(tmp_path / "two", "folder")


@pytest.mark.parametrize(
    "kinds",
    [
        ("car", "plane", "train"),
        ("bullet_train", "electric-train", "train station"),
        ("test tube", "valley", "developer"),
    ],
)
def test_classes_may_be_called_like_splits(tmp_path, kinds):
    names = [f"{kind}/{i}.png" for kind in kinds for i in range(10)]
    folder = Folder(tree(tmp_path, *names), "folder")
    assert not folder.layout.splits
    assert folder.label_names == sorted(kinds)
    assert len(folder.rows("train")) == 29


@pytest.mark.parametrize("place", ["", "set/", "set/{split}/", "{split}/", "{split}/images/all/"])
def test_folders_that_hold_all_images_are_not_labels(tmp_path, place):
    names = [
        f"{place.format(split=split)}{kind}/{split}{i}.png"
        for split in ("train", "val")
        for kind in ("cat", "dog")
        for i in range(3)
    ]
    assert Folder(tree(tmp_path, *names), "folder").label_names == ["cat", "dog"]


def test_a_single_class_is_a_label(tmp_path):
    assert Folder(tree(tmp_path, "cat/1.png", "cat/2.png"), "folder").label_names == ["cat"]
    names = ("train/cat/1.png", "train/cat/tabby/2.png", "val/cat/3.png")
    assert Folder(tree(tmp_path / "two", *names), "folder").label_names == ["cat"]


def test_a_class_below_a_split_may_be_called_train(tmp_path):
    names = [f"{split}/{kind}/1.png" for split in ("train", "val") for kind in ("car", "train")]
    assert Folder(tree(tmp_path, *names), "folder").label_names == ["car", "train"]


def test_a_tree_without_train_has_no_other_split_of_that_name(tmp_path):
    folder = Folder(tree(tmp_path, "test/a/1.png", "test/b/1.png"), "folder")
    assert set(folder.splits) == {"test", "validation"}
    assert folder.label_names == ["a", "b"]
    with pytest.raises(UserError, match="has no split 'train'; it has test, validation, all"):
        folder.rows("train")


def test_one_split_has_one_folder(tmp_path):
    """Of val and eval the second keeps its name."""
    names = [f"{split}/1.png" for split in ("Train", "val", "eval", "more data", "1st")]
    splits = splits_of(Folder(tree(tmp_path, *names)))
    assert splits == {
        "train": {"Train/1.png"},
        "validation": {"val/1.png"},
        "eval": {"eval/1.png"},
        "more_data": {"more data/1.png"},
        "_1st": {"1st/1.png"},
    }


@pytest.mark.parametrize("masks", ["masks", "annotations"])
@pytest.mark.parametrize("root", ["", "set/"])
def test_masks_are_not_images(tmp_path, root, masks):
    """Those of an image, in folders beside images/, whatever else lies there."""
    images = [f"{root}images/{name}.jpg" for name in ("train/a", "train/b/c", "val/d")]
    others = [f"{root}{masks}/{name}.png" for name in ("train/a", "train/b/c", "val/d")]
    folder = Folder(tree(tmp_path, *images, *others))
    assert splits_of(folder) == {"train": set(images[:2]), "validation": {images[2]}}
    assert {name for name, _ in folder.unread} == set(others)
    unsplit = [f"{root}images/{i}.jpg" for i in range(20)]
    folder = Folder(
        tree(tmp_path / "flat", *unsplit, *(f"{root}{masks}/{i}.png" for i in range(20)))
    )
    assert set().union(*splits_of(folder).values()) == set(unsplit)
    classes = tree(tmp_path / "classes", "images/1.png", f"{masks}/2.png")
    assert len(Folder(classes).rows("all")) == 2


def test_names_of_splits():
    words = {"train": "train", "Val2017": "val", "test-images": "test", "DEV": "dev", "tst": "tst"}
    words |= {"TrainingSet": "training", "testimages": "test", "ValDataset": "val"}
    words |= {"testset": "testset"}
    for name, word in words.items():
        assert split_of(name) == word
    for name in (
        "bullet_train",
        "trained",
        "latest",
        "validator",
        "trainers",
        "train_test",
        "data",
        "2017",
        "",
    ):
        assert not split_of(name)
    assert split_of("ILSVRC2012_img_train", is_tar=True) == "train"
    assert split_of("imagenet-val-000001", is_tar=True) == "val"
    for name in ("shard_0", "part-00001", "images_001", "data-000000", "batch 3", "shard-1-of-9"):
        assert is_shard(name)
    for name in ("0", "00041", "n01440764", "class_1", "Boeing 747", "images", "part"):
        assert not is_shard(name)
    for name in ("00000", "imagenet-train-000012", "x_3", "a-00001-of-00010"):
        assert is_shard(name, is_tar=True)
    assert not is_shard("n01440764", is_tar=True)


def test_an_empty_tree_has_a_layout():
    assert layout([]).splits == layout([""]).splits == []


def test_the_held_out_twentieth_is_stable_as_the_set_grows(tmp_path):
    def held_out(count, root):
        folder = Folder(tree(root, *(f"{i}.png" for i in range(count))))
        train, validation = (splits_of(folder)[split] for split in ("train", "validation"))
        assert not train & validation
        assert len(train | validation) == count
        return validation

    first = held_out(200, tmp_path / "a")
    assert len(first) == 10
    assert held_out(200, tmp_path / "b") == first
    assert len(held_out(220, tmp_path / "b") & first) >= 9
    assert len(held_out(3, tmp_path / "c")) == 1


def test_slices_and_sums(tmp_path):
    folder = Folder(tree(tmp_path, *(f"{i}.png" for i in range(40))))
    rows = folder.rows("all")
    assert sorted(rows) == list(range(40))
    assert (folder.rows("train[:10%]") == folder.rows("train")[:4]).all()
    assert (folder.rows("validation+train") == rows).all()


# --- Shards. ---


def samples(shard, labels=True, count=6):
    """Returns the files of a WebDataset shard."""
    files = {}
    for i in range(count):
        files[f"{shard}{i:03d}.jpg"] = jpeg(10 * shard + i)
        if labels:
            files[f"{shard}{i:03d}.cls"] = str(i % 4).encode()
            meta = {"label": i % 3 * 1.0, "info": {"kind": f"kind {i % 2}"}, "list": [1]}
            files[f"{shard}{i:03d}.json"] = json.dumps(meta).encode()
            files[f"{shard}{i:03d}.txt"] = b"a caption"
    return files


@pytest.mark.parametrize("names", ["data-{:06d}", "{:05d}", "x_{}", "part-{:05d}-of-00002"])
def test_shards_are_not_labels(tmp_path, names):
    for shard in range(2):
        tar(tmp_path / "set" / f"{names.format(shard)}.tar", samples(shard, labels=False))
        plant(tmp_path / "tree" / f"shard_{shard}", samples(shard, labels=False))
    assert len(Folder(tmp_path / "set").names) == 12
    for root in (tmp_path / "set", tmp_path / "tree"):
        with pytest.raises(UserError, match=r"are not in folders that could be labels"):
            Folder(root, "folder")
    tar(tmp_path / "set/00009.tar", {"cat/1.jpg": jpeg(), "dog/1.jpg": jpeg()})
    assert Folder(tmp_path / "set", "folder").label_names == ["cat", "dog"]


def test_labels_of_webdataset_shards(tmp_path):
    """With random access, the same from tars, from a tree and packed."""
    for shard in range(2):
        tar(tmp_path / "set" / f"data-{shard:06d}.tar", samples(shard))
        plant(tmp_path / "tree", samples(shard))
    for root in (tmp_path / "set", tmp_path / "tree"):
        assert not Folder(root).unread
        by_cls = labels_of(root, "cls")
        assert by_cls == {name: str(int(name[-7:-4]) % 4) for name in by_cls}
        assert len(by_cls) == 12
        by_key = labels_of(root, "json:info.kind")
        assert by_key == {name: f"kind {int(name[-7:-4]) % 2}" for name in by_key}
        by_number = labels_of(root, "json:label")
        assert by_number == {name: str(int(name[-7:-4]) % 3) for name in by_number}
    source, _ = open_sources(f"folder:{tmp_path / 'set'}", ("all", "train"), labels="cls")
    assert source.class_names == ["0", "1", "2", "3"]
    for i in range(12):
        name = source.name_of(i)[-8:]
        assert source.examples[i]["image"] == (tmp_path / "tree" / name).read_bytes()
        assert source.examples[i]["label"] == int(name[-5]) % 4
    pack.pack(tmp_path / "set", tmp_path / "packed", labels="cls")
    (packed,) = open_sources(f"tfds:{tmp_path / 'packed'}", ("train",))
    assert packed.class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize("stem, suffix", [("a.{}", ".cls"), ("{}", ".CLS"), ("a.{}", ".CLS")])
def test_names_of_files_of_labels(tmp_path, stem, suffix):
    """Names may have other dots, and suffixes may be in upper case."""
    files = {}
    for i in range(3):
        files[stem.format(i) + ".jpg"] = jpeg(i)
        files[stem.format(i) + suffix] = str(2 - i).encode()
    tar(tmp_path / "set" / "data.tar", files)
    plant(tmp_path / "tree", files)
    for root in (tmp_path / "set", tmp_path / "tree"):
        labels = {name[-5:-4]: label for name, label in labels_of(root, "cls").items()}
        assert labels == {"0": "2", "1": "1", "2": "0"}


def test_shards_named_as_splits(tmp_path):
    for split, shards in {"train": range(3), "val": range(3, 4)}.items():
        for shard in shards:
            tar(tmp_path / f"imagenet-{split}-{shard:06d}.tar", samples(shard))
    folder = Folder(tmp_path, "cls")
    assert {split: len(rows) for split, rows in folder.splits.items()} == {
        "train": 18,
        "validation": 6,
    }


@pytest.mark.parametrize(
    "how, files, sentence",
    [
        ("cls", {"0.jpg": jpeg()}, "no image of .* has a .cls file next to it"),
        (
            "json:label",
            {"0.jpg": jpeg(), "0.json": b"{}"},
            "'x/0.jpg' cannot be used: it has no 'lab",
        ),
        ("json:label", {"0.jpg": jpeg(), "0.json": b"{"}, "'x/0.jpg' cannot be used: Expecting"),
        ("json:list", {"0.jpg": jpeg(), "0.json": b'{"list": [1]}'}, r"\[1\] is not a label"),
        ("cls", {"0.jpg": jpeg(), "0.cls": b"-1"}, "the label -1 is negative"),
        ("cls", {"0.jpg": jpeg(), "0.cls": b"0.5"}, r"the label '0.5' is not an integer"),
        ("cls", {"0.jpg": jpeg(), "0.cls": b"9" * 5000}, r"its label has 5,000 characters"),
        ("json:a", {"0.jpg": jpeg(), "0.json": b"[" * 100_000}, "it is nested too deeply"),
        ("json:a", {"0.jpg": jpeg(), "0.json": b'{"a": NaN}'}, "nan is not a label"),
        ("json:a", {"0.jpg": jpeg(), "0.json": b" " * 2**25}, "it has 33,554,432 bytes"),
    ],
)
def test_wrong_labels_beside_images(tmp_path, how, files, sentence):
    tar(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match=sentence):
        Folder(tmp_path, how)


# --- Labels by folders and tables. ---


def test_class_names(tmp_path):
    names = [f"train/{kind}/{i}.png" for kind in ("bee", "ant", "Cat") for i in range(2)]
    tree(tmp_path, *names, "val/bee/9.png")
    train, validation = open_sources(f"folder:{tmp_path}", ("train", "validation"), labels="folder")
    assert train.class_names == validation.class_names == ["Cat", "ant", "bee"]
    assert validation.examples[0]["label"] == 2
    emoji, _ = open_sources("emoji", ("train", "validation"))
    assert emoji.class_names[:2] == ["Activities", "Animals & Nature"]
    assert len(emoji.class_names) == emoji.num_labels == 9


def test_a_class_that_train_lacks_is_refused(tmp_path):
    folder = Folder(tree(tmp_path, "train/a/1.png", "train/b/1.png", "val/c/1.png"), "folder")
    with pytest.raises(
        UserError, match=r"1 of 1 images .* have no label, or one that does not occur"
    ):
        folder.examples("validation")


ROWS = [(f"im{i:02d}.png", i % 12) for i in range(24)]


@pytest.fixture
def images(tmp_path):
    return tree(tmp_path / "set", *(name for name, _ in ROWS))


def table(path, *lines):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return str(path)


@pytest.mark.parametrize(
    "lines",
    [
        ROWS,
        [("path", "label"), *ROWS],
        [("image_id", "label"), *ROWS],
        [("Image Index", "Finding Labels"), *ROWS],
        [("label", "image_path"), *((label, name) for name, label in ROWS)],
        [("", "path", "Label"), *((i, *row) for i, row in enumerate(ROWS))],  # as pandas writes
        [("path", "label"), *((name, f"{label}.0") for name, label in ROWS)],
        [("path", "label"), *((name, f" {label:02d}") for name, label in ROWS)],
        [("file_name", "text", "label"), *((name, f"photo, {name}", i) for name, i in ROWS)],
        [("file", "split", "width", "class"), *((name, "train", 9, i) for name, i in ROWS)],
        [("file", "label_name", "label"), *((name, f"kind {i}", i) for name, i in ROWS)],
        [(f"./{name}", label) for name, label in ROWS],
        [(f"set/{name}", label) for name, label in ROWS],  # from the folder of the table
        [(f"set\\{name}", label) for name, label in ROWS],
        [*ROWS, *ROWS],
        [("missing.png", 3), *ROWS],
    ],
    ids=lambda lines: ",".join(map(str, lines[0])),
)
def test_tables_of_labels(tmp_path, images, lines):
    path = table(tmp_path / "labels.csv", *lines)
    folder = Folder(images, path)
    assert folder.label_names == [str(i) for i in range(12)]
    for name, label in zip(folder.names, folder.labels, strict=True):
        assert label == int(name[2:4]) % 12
    missing = [("missing.png", f"{path} names it, but it is not an image")]
    assert folder.unread == (missing if lines[0][0] == "missing.png" else [])


@pytest.mark.parametrize("delimiter", [";", "\t", " "])
def test_tables_with_other_delimiters(tmp_path, images, delimiter):
    """As in the lists of ImageNet, and as spreadsheets write them where commas are decimal."""
    (tmp_path / "labels.txt").write_text("".join(f"{x}{delimiter}{i}\n" for x, i in ROWS))
    folder = Folder(images, str(tmp_path / "labels.txt"))
    assert folder.label_names == [str(i) for i in range(12)]
    for name, label in zip(folder.names, folder.labels, strict=True):
        assert label == int(name[2:4]) % 12


def test_absolute_paths_in_tables(tmp_path, images):
    (tmp_path / "link").symlink_to(images)
    for root in (images, tmp_path / "link"):
        path = table(tmp_path / "labels.csv", *((root / name, i) for name, i in ROWS))
        assert (Folder(root, path).labels >= 0).all()


def test_names_in_tables_are_sorted(tmp_path, images):
    path = table(tmp_path / "labels.csv", *((name, f"kind {i}") for name, i in ROWS))
    folder = Folder(images, path)
    assert folder.label_names == sorted(f"kind {i}" for i in range(12))
    for name, label in zip(folder.names, folder.labels, strict=True):
        assert folder.label_names[label] == f"kind {int(name[2:4]) % 12}"


def test_a_first_line_of_a_missing_image_is_no_header(tmp_path):
    tree(tmp_path / "set", "a.png", "b.png")
    (tmp_path / "labels.csv").write_text("gone.jpg,cat\na.png,cat\nb.png,dog\n")
    folder = Folder(tmp_path / "set", str(tmp_path / "labels.csv"))
    assert folder.label_names == ["cat", "dog"]
    assert "gone.jpg" in dict(folder.unread)


@pytest.mark.parametrize(
    "lines, sentence",
    [
        ("a.png\n", "has no labels: add a first line such as 'path,label'"),
        ("", "contains no path of an image"),
        (
            "other.png,1\n",
            "contains no path of an image in .*: use paths relative .*example '.*.png'",
        ),
        ("a.png,\nb.png,1\n", "the line 'a.png,' has no label"),
        ("path,label\na.png,nan\nb.png,1\n", "the line 'a.png,nan' has no label"),
        ("a.png,1\n", "1 of 2 images of split 'all' have no label, .* 'b.png'"),
        ("a.png,0\nb.png,1700000000000\n", "the largest is 1700000000000, but there are only 2"),
        ("a.png,cat\nb.png,dog\na.png,dog\n", "'a.png' has two labels, 'cat' and 'dog'"),
        ("a.png,1,x\nb.png,2,y\n", "has 3 columns and no line that names them"),
        ("a.png,-1\nb.png,0\n", "the label -1 is negative"),
        ("a.png,0.5\nb.png,1.5\n", r"the label '0.5' is not an integer"),
        ("a.png,train\nb.png,test\n", "are names of splits"),
        ("id,path\n7,a.png\n8,b.png\n", "name the one with the labels 'label'"),
        ("path,split\na.png,train\nb.png,test\n", "name the one with the labels 'label'"),
        (
            "path,breed,color\na.png,x,red\nb.png,y,red\n",
            "has the columns 'path', 'breed', 'color'",
        ),
        ("path,class,category\na.png,x,red\nb.png,y,red\n", "name the one with the labels 'label'"),
        ("image,mask,label\na.png,a.png,1\nb.png,b.png,2\n", "several columns that name images"),
    ],
)
def test_tables_that_are_refused(tmp_path, lines, sentence):
    tree(tmp_path / "set", "a.png", "b.png")
    (tmp_path / "labels.csv").write_text(lines)
    with pytest.raises(UserError, match=sentence):
        Folder(tmp_path / "set", str(tmp_path / "labels.csv")).examples("all")


def test_tables_that_cannot_be_read(tmp_path, images):
    (tmp_path / "latin.csv").write_bytes(b"im00.png,caf\xe9\n")
    for path in ("no.csv", "latin.csv"):
        with pytest.raises(UserError, match="cannot be read"):
            Folder(images, str(tmp_path / path))


def test_packed_folders_keep_class_names_and_splits(tmp_path):
    names = [
        f"{split}/{kind}/{i}.png" for split in ("Train", "Testing") for kind in "ab" for i in "12"
    ]
    pack.pack(tree(tmp_path / "set", *names), tmp_path / "packed[1]", labels="folder")
    builder = tfds.builder_from_directory(tmp_path / "packed[1]")
    assert set(builder.info.splits) == {"train", "test"}
    train, test = open_sources(f"tfds:{tmp_path / 'packed[1]'}", ("train", "validation"))
    assert train.class_names == ["a", "b"]
    assert {test.name_of(i) for i in range(4)} == {n for n in names if n.startswith("Testing")}
    assert np.bincount([train.examples[i]["label"] for i in range(4)]).tolist() == [2, 2]
