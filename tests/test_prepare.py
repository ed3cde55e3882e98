"""Tests of data/prepare.py and data/pack.py: packed folders, and checks of ImageNet's tars."""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mim_jax import data
from mim_jax.data import pack, prepare

pytestmark = pytest.mark.usefixtures("cache")


def image(seed, form="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    """Sixty images in two folders, one of them with broken pixels, and a text file."""
    for i in range(60):
        path = tmp_path / "My photos!" / "ab"[i % 2] / f"{i}.{'png' if i % 7 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i, "PNG" if i % 7 else "JPEG"))
    path.write_bytes(image(0)[:800])
    (path.parent / "notes.txt").write_text("words")
    return tmp_path / "My photos!"


def digests(name, **settings):
    batches = data.make(name=name, size=16, **settings).training_batches(
        16, seed=0, start=0, stop=8
    )
    return [
        hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest()
        for batch in batches
    ]


def test_packed_sets_have_the_files_and_batches_of_the_folder(photos, tmp_path, command):
    to = tmp_path / "packed"
    done = command("mim_jax.data.prepare", f"folder:{photos}", f"--to={to}", "--labels=folder")
    assert done.returncode == 0, done.stderr
    assert f"read it with --config.data.name=tfds:{to}" in done.stdout
    assert "57 in train" in done.stdout
    builder = tfds.builder_from_directory(to)  # plain TFDS
    assert builder.info.features["label"].names == ["a", "b"]
    assert builder.info.features["image"].np_dtype == np.uint8
    raw = {"image": tfds.decode.SkipDecoding()}
    for split, count in {"train": 57, "validation": 3}.items():
        records = builder.as_data_source(split, decoders=raw)
        assert len(records) == builder.info.splits[split].num_examples == count
        for record in records:
            path = photos / record["file_name"].decode()
            assert record["image"] == path.read_bytes()
            assert path.parent.name == "ab"[record["label"]]
    assert builder.as_data_source("validation")[0]["image"].shape == (20, 24, 3)

    assert digests(f"tfds:{to}") == digests(f"folder:{photos}", labels="folder")
    ours, theirs = (
        data.make(name=f"folder:{photos}", size=16, labels="folder"),
        data.make(name=f"tfds:{to}", size=16),
    )
    assert ours.fingerprint == theirs.fingerprint


def test_packing_needs_no_tensorflow(photos, tmp_path):
    code = f"""
import sys
from mim_jax.data import prepare
assert prepare.main(["folder:{photos}", "--to={tmp_path / "packed"}"]) == 0
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packing_continues_with_the_next_shard(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "shards", lambda sizes, most: [len(sizes) - 2, 2])
    whole = tmp_path / "whole"
    pack.pack(photos, whole)
    to, written = tmp_path / "packed", []

    def killed(path, features, examples):
        if len(written) == 2:
            next(iter(examples))
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, features, examples)

    write_shard = pack.write_shard
    monkeypatch.setattr(pack, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(photos, to, in_parallel=lambda write, shards, at_once: map(write, shards))
    finished = {path.name: path.stat().st_mtime_ns for path in to.glob("*.array_record*")}
    assert len(finished) == 2
    monkeypatch.setattr(pack, "write_shard", write_shard)
    pack.pack(photos, to)
    assert {n: (to / n).stat().st_mtime_ns for n in finished} == finished

    def contents(folder):
        return {
            path.name.replace("whole", "packed"): path.read_bytes().replace(b"whole", b"packed")
            for path in folder.iterdir()
        }

    assert contents(to) == contents(whole)


@pytest.mark.parametrize("most", [1, 1000, 5000, 10**9])
def test_shards_have_about_the_given_size(most):
    sizes = np.random.default_rng(0).integers(1, 2000, 100)
    counts = pack.shards(sizes, most)
    assert sum(counts) == 100
    ends = np.cumsum(counts)
    largest = max(sizes[a:b].sum() for a, b in zip([0, *ends[:-1]], ends, strict=True))
    assert largest <= most + 2 * 2000
    assert pack.shards(sizes[:0], most) == []


def test_arrays_are_packed(tmp_path):
    for i in range(30):
        (tmp_path / "set").mkdir(exist_ok=True)
        array = np.random.default_rng(i).integers(0, 65536, (20, 16, 13), np.uint16)
        np.save(tmp_path / f"set/{i}.npy", array)
    pack.pack(tmp_path / "set", tmp_path / "packed")
    dataset = data.make(name=f"tfds:{tmp_path / 'packed'}", size=8, channels=13)
    assert dataset.image.dtype == "uint16"
    settings = dict(channels=13)
    assert digests(f"tfds:{tmp_path / 'packed'}", **settings) == digests(
        f"folder:{tmp_path / 'set'}", **settings
    )


def error_of(capsys, *arguments):
    assert prepare.main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def test_user_errors(photos, tmp_path, capsys):
    assert "set the output folder" in error_of(capsys, f"folder:{photos}")
    assert "there is no folder" in error_of(capsys, "folder:/nowhere", "--to=/nowhere")
    assert "must be a local" in error_of(capsys, f"folder:{photos}", "--to=gs://bucket/photos")
    assert "is not empty" in error_of(capsys, f"folder:{photos}", f"--to={tmp_path}")
    pack.pack(photos, tmp_path / "packed")
    (photos / "a/0.jpg").unlink()
    sentence = error_of(capsys, f"folder:{photos}", f"--to={tmp_path / 'packed'}")
    assert "holds other images" in sentence


# --- TFDS data sets. ---


def tar(path, files):
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Tars like ImageNet's, with two synsets of three images and four validation images."""
    for name, count in dict(SYNSETS=2, TRAINING_IMAGES=6, VALIDATION_IMAGES=4).items():
        monkeypatch.setattr(prepare, name, count)
    synsets = {
        f"{synset}.tar": tar(tmp_path / "tar", {f"{synset}_{i}.JPEG": image(i) for i in range(3)})
        for synset in ("n01440764", "n01443537")
    }
    tar(tmp_path / prepare.TRAIN, synsets)
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]
    tar(tmp_path / prepare.VALIDATION, {name: image(9) for name in names})
    return tmp_path


def test_complete_tars_of_imagenet_are_accepted(imagenet):
    prepare.check_imagenet(imagenet)


def test_incomplete_tars_of_imagenet_are_refused(imagenet):
    def message():
        with pytest.raises(prepare.UserError) as error:
            prepare.check_imagenet(imagenet)
        return str(error.value)

    train, validation = imagenet / prepare.TRAIN, imagenet / prepare.VALIDATION
    whole = validation.read_bytes()
    tar(validation, {f"ILSVRC2012_val_{i:08d}.JPEG": image(9) for i in (1, 2, 4)})
    assert "lacks 1 of the 4 images of the validation set" in message()
    validation.write_bytes(whole[:1500])
    assert "is incomplete" in message()
    validation.write_bytes(whole)
    one = {f"n01440764_{i}.JPEG": image(i) for i in range(3)}
    tar(train, {"n01440764.tar": tar(imagenet / "tar", one)})
    assert "has 3 images of 1 synsets, not 6 of 2" in message()
    train.unlink()
    assert "has no ILSVRC2012_img_train.tar" in message()


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow")
def test_imagenet_is_prepared_by_tfds(imagenet):
    """Runs in its own process because it imports TensorFlow."""
    code = f"""
from mim_jax.data import prepare
prepare.SYNSETS, prepare.TRAINING_IMAGES, prepare.VALIDATION_IMAGES = 2, 6, 4
where = "--data_dir={imagenet / "tfds"}"
assert prepare.main(["imagenet2012", where, "--manual_dir={imagenet}"]) == 0
assert prepare.main(["imagenet2012", where]) == 0  # already prepared
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.count("6 in train, 4 in validation") == 2
    dataset = data.make(name="imagenet2012", data_dir=str(imagenet / "tfds"), size=16)
    assert (dataset.examples, dataset.num_labels) == (6, 1000)


def test_data_sets_that_cannot_be_prepared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    assert "pip install 'mim-jax[prepare]'" in error_of(capsys, "imagenet2012")
    monkeypatch.setattr(prepare, "find_spec", lambda name: True)
    where = f"--data_dir={tmp_path}"
    assert "TFDS has no data set 'my_set'" in error_of(capsys, "my_set", where)
    sentence = error_of(capsys, "imagenet2012", where, f"--manual_dir={tmp_path}")
    assert "has no ILSVRC2012_img_train.tar: download it from image-net.org" in sentence


def test_beam_writes_the_same_files(photos, tmp_path, command, capsys, monkeypatch):
    if importlib.util.find_spec("apache_beam") is None:
        arguments = (f"folder:{photos}", f"--to={tmp_path / 'packed'}", "--beam")
        assert "pip install 'mim-jax[beam]'" in error_of(capsys, *arguments)
        pytest.skip("needs Apache Beam")
    whole, to = tmp_path / "a" / "packed", tmp_path / "b" / "packed"
    pack.pack(photos, whole, shard_mb=0.02)
    arguments = (f"folder:{photos}", f"--to={to}", "--shard_mb=0.02", "--beam")
    done = command("mim_jax.data.prepare", *arguments, "--runner=DirectRunner")
    assert done.returncode == 0, done.stderr
    assert len(list(to.glob("*.array_record*"))) > 3
    for path in whole.iterdir():
        assert (to / path.name).read_bytes() == path.read_bytes()


def test_splits_keep_their_names(tmp_path):
    for i in range(6):
        path = tmp_path / "set" / ("test" if i < 2 else "train") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    pack.pack(tmp_path / "set", tmp_path / "packed")
    assert {*tfds.builder_from_directory(tmp_path / "packed").info.splits} == {"train", "test"}
    for name in (f"folder:{tmp_path / 'set'}", f"tfds:{tmp_path / 'packed'}"):
        dataset = data.make(name=name, size=16)  # its evaluation split is called "validation"
        assert dataset.examples == 4
        assert next(dataset.evaluation_batches(4))["valid"].tolist() == [1, 1, 0, 0]
