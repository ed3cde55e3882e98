"""Sources: any tree of images or tars of them, its splits, labels, types, and its bad files."""

import csv
import errno
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, data, schema
from mim_jax.data import manifest
from mim_jax.data.folder import Folder
from mim_jax.data.sources import open_sources
from mim_jax.data.statistics import main as statistics_main
from mim_jax.data.statistics import statistics
from mim_jax.main import main
from mim_jax.pictures import MARGIN, draw_sheet


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Manifests of this test are kept apart."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def pixels(seed=0, height=30, width=40, channels=3, dtype=np.uint8):
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


def plant(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


GOOD = {
    "one/two/three/deep.jpg": jpeg(1),
    "one/cmyk.jpg": encoded(Image.fromarray(pixels(2)).convert("CMYK"), "JPEG"),
    "one/palette.png": encoded(Image.fromarray(pixels(3)).convert("P")),
    "one/grey with alpha.png": encoded(Image.fromarray(pixels(4)).convert("LA")),
    "one/bit.png": encoded(Image.fromarray(pixels(5)).convert("1")),
    "one/sixteen bits.png": encoded(Image.fromarray(pixels(6, dtype=np.uint16)[..., 0])),
    "two/pixel.png": encoded(Image.new("RGB", (1, 1), "red")),
    "two/thin.png": encoded(Image.new("RGB", (1, 500), "blue")),
    "two/no suffix": encoded(Image.fromarray(pixels(7)), "WEBP"),
    "two/a jpeg.png": jpeg(8),
    "two/ünïcode\n.tif": encoded(Image.fromarray(pixels(9)), "TIFF"),
    "array.npy": npy(pixels(10)),
}
BAD = {  # name: content, reason
    "truncated.jpg": (jpeg(11)[:900], "image file is truncated"),
}
NO_IMAGES = {
    "empty.jpg": (b"", "the file is empty"),
    "two/notes.txt": (b"a day at the sea", "not an image of a known format"),
    "two/head.jpg": (jpeg(12)[:50], ""),
    "words.npy": (npy(np.array([["a"]])), "not numbers"),
    "more.tar.gz": (b"\x1f\x8b", "compressed: unpack it"),
    "cut.tar": (b"\0" * 100, ""),
}


@pytest.fixture
def nasty(tmp_path):
    """A tree as people have them."""
    plant(tmp_path / "nasty", GOOD)
    plant(tmp_path / "nasty", {name: content for name, (content, _) in (BAD | NO_IMAGES).items()})
    plant(tmp_path / "nasty", {".DS_Store": b"x", "one/._deep.jpg": b"x", "__MACOSX/a.jpg": b"x"})
    (tmp_path / "nasty/empty").mkdir()
    (tmp_path / "nasty/loop").symlink_to(tmp_path / "nasty")
    return tmp_path / "nasty"


def make(root, **settings):
    settings = dict(size=16, split="all", evaluation_split="all") | settings
    return data.make(name=f"folder:{root}", **settings)


# --- What is found. ---


def test_a_nasty_tree(nasty):
    folder = Folder(nasty)
    assert sorted(folder.names) == sorted(GOOD | BAD)
    unread = dict(folder.manifest.unread)
    assert set(unread) == set(NO_IMAGES)
    for name, (_, reason) in NO_IMAGES.items():
        assert reason in unread[name], name


def test_the_manifest_knows_sizes_and_modes_without_decoding(nasty):
    folder = Folder(nasty)
    rows = dict(zip(folder.names, folder.manifest.rows, strict=True))
    modes = folder.manifest.modes
    assert [rows["two/thin.png"][key] for key in ("width", "height")] == [1, 500]
    assert modes[rows["one/cmyk.jpg"]["mode"]] == "CMYK"
    assert modes[rows["one/sixteen bits.png"]["mode"]] == "I;16"
    assert modes[rows["array.npy"]["mode"]] == "uint8 array"
    assert rows["one/cmyk.jpg"]["bytes"] == len(GOOD["one/cmyk.jpg"])


@pytest.fixture
def opened(monkeypatch):
    """Names of the files whose headers were read."""
    names, describe = [], manifest.describe

    def noted(root, tars, file):
        names.append(file.name)
        return describe(root, tars, file)

    monkeypatch.setattr(manifest, "describe", noted)
    return names


def test_what_is_known_is_not_opened_again(nasty, opened):
    first = manifest.scan(nasty)
    assert len(opened) == len(GOOD | BAD | NO_IMAGES) - 1  # but the tar
    opened.clear()
    again = manifest.scan(nasty)
    assert not opened
    assert again.names == first.names
    assert (again.rows == first.rows).all()
    assert again[3:] == first[3:]


def test_what_changed_is_seen(nasty, opened):
    before = manifest.scan(nasty)
    opened.clear()
    plant(nasty, {"one/two/new.jpg": jpeg(20)})
    (nasty / "array.npy").unlink()
    (nasty / "empty.jpg").write_bytes(jpeg(21))  # a copy that has come to its end
    after = Folder(nasty)
    assert set(opened) == {"one/two/new.jpg", "empty.jpg"} | set(NO_IMAGES) - {"cut.tar"}
    assert "array.npy" not in after.names
    assert {"one/two/new.jpg", "empty.jpg"} <= set(after.names)
    assert before.rows.shape == (len(after.names) - 1,)


def test_where_nothing_can_be_kept_all_is_scanned(nasty, opened, cache):
    shutil.rmtree(cache)
    cache.write_text("no folder")
    manifest.scan(nasty)
    count = len(opened)
    manifest.scan(nasty)
    assert len(opened) == 2 * count
    cache.unlink()


def test_a_folder_that_may_not_be_read_is_told(nasty, monkeypatch):
    scandir = os.scandir

    def forbid(path):
        if str(path).endswith("/two"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(manifest.os, "scandir", forbid)
        folder = Folder(nasty)
    unread = (name for name in (GOOD | BAD) if "two/" in name)
    assert set(folder.names) == set(GOOD | BAD) - set(unread)
    assert dict(folder.manifest.unread)["two"] == "cannot be read: Permission denied"
    assert len(Folder(nasty).names) == len(GOOD | BAD)  # it is tried again


def test_a_cache_that_is_rubbish_is_not_believed(nasty, cache):
    manifest.scan(nasty)
    (kept,) = (cache / "mim_jax/manifests").iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    assert len(manifest.scan(nasty).rows) == len(GOOD | BAD)


# --- Tars. ---


def tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_tars_are_read_as_if_they_were_unpacked(tmp_path):
    images = {f"{i}.jpg": jpeg(i) for i in range(4)}
    tar(tmp_path / "set/train/n01.tar", images)  # of a class, as ImageNet's
    tar(tmp_path / "set/train/shard-0.tar", {"./n02/a.jpg": jpeg(5), "n02/a.txt": b"words"})
    tar(tmp_path / "set/val.tar", {"n01/b.jpg": jpeg(6), "n02/._b.jpg": b"x"})
    folder = Folder(tmp_path / "set")
    assert set(folder.names) == {
        *(f"train/n01/{i}.jpg" for i in range(4)),
        "train/n02/a.jpg",
        "val/n01/b.jpg",
    }
    train, validation = open_sources(
        f"folder:{tmp_path / 'set'}", ("train", "validation"), labels="folder"
    )
    assert (len(train.examples), len(validation.examples), train.num_labels) == (5, 1, 2)
    read = {train.name_of(i): train.examples[i] for i in range(5)}
    assert read["train/n01/2.jpg"] == {"image": images["2.jpg"], "label": 0}
    assert read["train/n02/a.jpg"] == {"image": jpeg(5), "label": 1}


def test_tars_in_a_tar_are_read_where_they_lie(tmp_path):
    """ImageNet's training set is a tar of a thousand, the whole of ImageNet one of 21841."""
    images = {f"n0{k}": {f"n0{k}_{i}.JPEG": jpeg(9 * k + i) for i in range(3)} for k in (1, 2)}
    inner = {f"{k}.tar": tar(tmp_path / "inner.tar", images[k]).read_bytes() for k in images}
    path = tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    (source,) = open_sources(f"folder:{path}", ("all",), labels="folder")
    read = {source.name_of(i): source.examples[i] for i in range(len(source.examples))}
    assert source.num_labels == 2
    assert read == {
        f"{synset}/{name}": {"image": content, "label": int(synset[-1]) - 1}
        for synset, members in images.items()
        for name, content in members.items()
    }
    tar(tmp_path / "set/train.tar", inner)
    assert Folder(tmp_path / "set").split


def test_a_tar_may_be_the_whole_set_and_may_be_cut_off(tmp_path):
    path = tar(tmp_path / "set.tar", {f"{i}/{i}.jpg": jpeg(i, height=100) for i in range(10)})
    assert Folder(path, "folder").label_names == [str(i) for i in range(10)]
    path.write_bytes(path.read_bytes()[:-30_000])
    cut = Folder(path)
    assert 0 < len(cut.names) < 10
    assert cut.manifest.unread[0][1] == "the tar file is cut off"


# --- Splits. ---


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "test"])
def test_folders_are_splits(tmp_path, validation):
    names = ["train/a/1.png", "train/b/2.png", f"{validation}/a/3.png", "extra/4.png", "5.png"]
    plant(tmp_path, dict.fromkeys(names, GOOD["two/pixel.png"]))
    folder = Folder(tmp_path)

    def of(split):
        return {folder.names[row] for row in folder.rows(split)}

    assert of("train") == set(names[:2])
    assert of("validation") == {names[2]}
    assert of("extra") == {"extra/4.png"}
    assert of("all") == set(names[:4])


def test_a_class_may_be_called_train(tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("car", "plane", "train") for i in range(10)]
    plant(tmp_path, dict.fromkeys(names, GOOD["two/pixel.png"]))
    folder = Folder(tmp_path)
    assert len(folder.rows("train")) == 29
    assert Folder(tmp_path, "folder").label_names == ["car", "plane", "train"]


def test_a_twentieth_is_held_out_the_same_everywhere_and_as_the_set_grows(tmp_path):
    def held_out(count, root):
        plant(root, {f"{i}.png": GOOD["two/pixel.png"] for i in range(count)})
        folder = Folder(root)
        train, validation = (
            {folder.names[row] for row in folder.rows(split)} for split in ("train", "validation")
        )
        assert not train & validation
        assert len(train | validation) == count
        return validation

    first = held_out(200, tmp_path / "a")
    assert len(first) == 10
    assert held_out(200, tmp_path / "b") == first
    assert len(held_out(220, tmp_path / "b") & first) >= 9
    assert len(held_out(3, tmp_path / "c")) == 1


def test_slices_are_tfds(tmp_path):
    plant(tmp_path, {f"{i}.png": GOOD["two/pixel.png"] for i in range(40)})
    folder = Folder(tmp_path)
    rows = folder.rows("all")
    assert sorted(rows) == list(range(40))
    assert (folder.rows("train[:10%]") == folder.rows("train")[:4]).all()
    assert (folder.rows("validation+train") == rows).all()


# --- Labels. ---


def test_labels_are_folders_or_a_csv(tmp_path):
    names = [
        f"{split}/{kind}/x/{i}.png" for split in ("train", "val") for kind in "ab" for i in "12"
    ]
    plant(tmp_path / "set", dict.fromkeys(names, GOOD["two/pixel.png"]))

    def labels(how):
        sources = open_sources(f"folder:{tmp_path / 'set'}", ("train", "validation"), labels=how)
        return sources[0].num_labels, {
            source.name_of(i): source.examples[i].get("label")
            for source in sources
            for i in range(len(source.examples))
        }

    assert labels("") == (0, dict.fromkeys(names))
    assert labels("folder") == (2, {name: int("/b/" in name) for name in names})
    table = tmp_path / "labels.csv"
    for rows, (number, expected) in {
        (("path", "label"), *((n, n[-5]) for n in names)): (3, {n: int(n[-5]) for n in names}),
        tuple((f"./{n}", f"kind {n[-5]}", "x") for n in names): (
            2,
            {n: int(n[-5]) - 1 for n in names},
        ),
    }.items():
        with table.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        assert labels(str(table)) == (number, expected)


# --- Batches. ---


@pytest.mark.parametrize("dtype, channels", [("uint8", 1), ("uint16", 13), ("float32", 2)])
def test_batches_have_the_type_and_the_channels_of_the_source(tmp_path, dtype, channels):
    arrays = {i: pixels(i, channels=channels, dtype=np.dtype(dtype).type) for i in range(8)}
    plant(tmp_path, {f"{i}.npy": npy(array) for i, array in arrays.items()})
    dataset = make(tmp_path, size=(20, 24), channels=channels)
    assert dataset.dtype == dtype
    for batch in (
        next(dataset.training_batches(8, seed=0, start=0, stop=1)),
        next(dataset.evaluation_batches(8)),
    ):
        assert batch["image"].shape == (8, 20, 24, channels)
        assert batch["image"].dtype == dtype
        assert batch["image"].std() > 0


def digests(batches):
    return [
        hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        for batch in batches
    ]


def stream(root, start=0, stop=7, processes=1, bad=None, **settings):
    """Global batches of 8 of the 13 images of the nasty tree: epochs end inside batches."""
    parts = [
        make(root, max_bad_fraction=0.1, process=i, processes=processes, **settings)
        .training_batches(8, seed=3, start=start, stop=stop, on_bad=(bad or {}).__setitem__)
        for i in range(processes)
    ]  # fmt: skip
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [dict(processes=2), dict(processes=4, threads=3), dict(workers=2), dict(processes=2, start=3)],
    ids=str,
)
def test_the_stream_with_bad_files_is_a_function_of_the_step(nasty, settings):
    whole = digests(stream(nasty))
    assert len(set(whole)) == 7
    assert digests(stream(nasty, **settings)) == whole[settings.get("start", 0) :]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_told_once_with_the_reason(nasty, workers):
    told = []
    dataset = make(nasty, workers=workers, max_bad_fraction=0.1)
    on_bad = lambda *file: told.append(file)  # noqa: E731
    batches = list(dataset.training_batches(8, seed=0, start=0, stop=8, on_bad=on_bad))
    assert all(set(batch) == {"image", "index"} for batch in batches)
    ((name, reason),) = told
    assert name == "truncated.jpg"
    assert "image file is truncated" in reason


def test_a_bad_file_gives_way_to_the_next_one(tmp_path):
    colours = {f"{i}.png": encoded(Image.new("L", (8, 8), 10 + 20 * i)) for i in range(10)}
    plant(tmp_path, colours)
    names = Folder(tmp_path).names
    bad = names[4]
    content = bytearray(colours[bad])
    content[-20] ^= 255  # a header that is sound, pixels that are not
    plant(tmp_path, {bad: bytes(content)})
    batches = make(tmp_path, channels=1, max_bad_fraction=0.5).training_batches(
        10, seed=0, start=0, stop=1
    )
    seen = sorted(next(batches)["image"][:, 0, 0, 0].tolist())
    names[4] = names[5]
    assert seen == sorted(10 + 20 * int(name[0]) for name in names)


def test_too_many_bad_files_end_a_run(nasty):
    batches = make(nasty, max_bad_fraction=0.05).training_batches(8, seed=0, start=0, stop=8)
    sentence = (
        r"1 of 13 images cannot be used, more than data.max_bad_fraction = 0.05; "
        r"the last one is truncated.jpg: image file is truncated"
    )
    with pytest.raises(UserError, match=sentence):
        list(batches)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_each_good_image_once(nasty, processes):
    parts = [
        make(nasty, process=i, processes=processes, max_bad_fraction=1.0).evaluation_batches(8)
        for i in range(processes)
    ]
    batches = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*parts, strict=True)
    ]
    index, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("index", "mask"))
    names = Folder(nasty).names
    assert sorted(names[i] for i in index[mask > 0]) == sorted(GOOD)
    assert len(index) == 16


def test_the_fingerprint_is_that_of_the_images_not_of_their_place(nasty, tmp_path):
    (nasty / "loop").unlink()
    shutil.copytree(nasty, tmp_path / "copy")
    (tmp_path / "copy/two/notes.txt").unlink()
    fingerprint = make(nasty).fingerprint
    assert make(tmp_path / "copy").fingerprint == fingerprint
    (tmp_path / "copy/array.npy").unlink()
    plant(tmp_path / "copy", {"array.npy": npy(pixels(99, height=31))})
    assert make(tmp_path / "copy").fingerprint != fingerprint


# --- Mistakes. ---


@pytest.mark.parametrize(
    "files, settings, sentence",
    [
        ({}, {}, "holds no image that can be read: it is empty"),
        (
            {"a.txt": b"x"},
            {},
            "holds no image that can be read: of 1 files most are not because: not an",
        ),
        (
            {"a.png": 1},
            dict(split="train[5"),
            "has no split 'train[5'; it has train, validation, all",
        ),
        ({"a.png": 1}, dict(split="dev"), "has no split 'dev'; it has train, validation, all"),
        ({"a.png": 1}, dict(evaluation_split="validation"), "split 'validation' of .* is empty"),
        ({"a.png": 1}, dict(labels="folder"), "lie in no folders that could be labels"),
        ({"a.png": 1}, dict(labels="no.csv"), "data.labels = 'no.csv' cannot be read"),
        ({"a.png": 1}, dict(channels=2), "data.channels = 2, but the images of folder:.* have 3"),
        (
            {"a.npy": npy(pixels(channels=13))},
            {},
            "data.channels = 3 does not fit .* a.npy: its shape, .30, 40, 13.",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, files, settings, sentence):
    files = {n: GOOD["two/pixel.png"] if content == 1 else content for n, content in files.items()}
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=sentence.replace("[", r"\[")):
        make(plant(tmp_path / "set", files), **settings)


@pytest.mark.parametrize(
    "lines, sentence",
    [
        ("a.png\n", "'a.png' is not a path, a comma, a label"),
        ("", "names none of the images"),
        ("other.png,1\n", "names none of the images of .*: write paths from there, as '.*.png'"),
        ("a.png,1\n", "gives 1 of 2 images of split 'all' no label that train has; .* 'b.png'"),
        ("a.png,0\nb.png,1700000000000\n", "the largest is 1700000000000, but there are 2"),
        ("a.png,cat\nb.png,dog\na.png,dog\n", "'a.png' has two labels, 'cat' and 'dog'"),
    ],
)
def test_wrong_tables_of_labels(tmp_path, lines, sentence):
    plant(tmp_path / "set", dict.fromkeys(("a.png", "b.png"), GOOD["two/pixel.png"]))
    (tmp_path / "labels.csv").write_text(lines)
    with pytest.raises(UserError, match=sentence):
        make(tmp_path / "set", labels=str(tmp_path / "labels.csv"))


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        make(tmp_path / "nowhere")
    (tmp_path / "set.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="neither a folder nor a plain tar"):
        make(tmp_path / "set.tar.gz")
    with pytest.raises(UserError, match=r"no folder that TFDS or mim_jax.data.prepare finished"):
        data.make(name=f"tfds:{tmp_path}", size=16)
    with pytest.raises(UserError, match=r"is for data.name=folder:PATH"):
        data.make(name="emoji", size=16, labels="folder")


# --- Worker processes. ---

WORKERS = """
import multiprocessing, os, signal, sys
from mim_jax import data

if __name__ == "__main__":
    batches = data.make(name="emoji", size=16, workers=2).training_batches(
        8, seed=0, start=0, stop=1_000_000
    )
    next(batches)
    workers = [process.pid for process in multiprocessing.active_children()]
    print(*workers, flush=True)
    os.kill({killed}, signal.SIGKILL)
    for _ in batches:
        pass
"""


@pytest.fixture
def run_workers(tmp_path):
    def run(killed):
        script = tmp_path / "script.py"
        script.write_text(WORKERS.format(killed=killed))
        return subprocess.run(
            [sys.executable, script],
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )

    return run


def test_a_worker_that_is_killed_ends_the_run(run_workers):
    done = run_workers("workers[0]")
    assert done.returncode == 1
    assert "was terminated unexpectedly" in done.stderr


def test_no_worker_outlives_a_parent_that_is_killed(run_workers):
    """They hold its output open, so `run_workers` returns when the last of them is gone."""
    done = run_workers("os.getpid()")
    assert done.returncode == -9
    assert len(done.stdout.split()) == 2


# --- Statistics. ---


@pytest.mark.parametrize("dtype, channels", [("uint8", 3), ("uint16", 13), ("float32", 2)])
def test_statistics_are_numpys(tmp_path, dtype, channels):
    arrays = [pixels(i, 20, 30, channels, np.dtype(dtype).type) // (i + 1) for i in range(9)]
    plant(tmp_path, {f"{i}.npy": npy(array) for i, array in enumerate(arrays)})
    mean, std = statistics(f"folder:{tmp_path}", channels=channels, split="all")
    values = np.concatenate(arrays).reshape(-1, channels).astype(float)
    values /= {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-9)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-9)


def test_statistics_come_as_a_config_takes_them(nasty, capsys):
    assert statistics_main([f"folder:{nasty}", "--split=all"]) == 0
    told = capsys.readouterr()
    assert "1 of 13 images cannot be used" in told.err
    overrides = [word.removeprefix("--config.") for word in shlex.split(told.out)]
    config = schema.load("configs/mae_emoji.py", overrides)
    assert len(config.objective.mean) == len(config.objective.std) == 3
    assert 0 < min(config.objective.std) < max(config.objective.mean) < 1
    assert statistics_main([f"folder:{nasty}/empty"]) == 2


# --- What people see. ---


def test_a_line_of_pixels_takes_no_memory_in_evaluation(tmp_path):
    """Its short side made 224 long, it would take 400 MB."""
    plant(tmp_path, {"line.png": encoded(Image.new("RGB", (2_000, 1), "red"))})
    tracemalloc.start()
    batch = next(make(tmp_path, size=224).evaluation_batches(1))
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()
    assert (batch["image"] == [255, 0, 0]).all()


def test_sheets_of_sensors_are_not_dark(tmp_path):
    images = np.linspace(0.02, 0.05, 300).reshape(1, 10, 10, 3)
    for stretch, brightest in ((False, 13), (True, 255)):
        path = tmp_path / f"{stretch}.png"
        draw_sheet(path, {"original": images}, "", stretch=stretch)
        sheet = np.asarray(Image.open(path)).astype(int)
        tile = sheet[-MARGIN - 140 : -MARGIN, MARGIN : MARGIN + 140]
        assert abs(tile.max() - brightest) <= 1


# --- A run. ---


def test_a_run_on_a_nasty_tree_lists_what_it_could_not_use(nasty, tmp_path, capsys):
    def run(**settings):
        settings = {"name": f"folder:{nasty}", "split": "all", "evaluation_split": "all"} | settings
        overrides = [f"--config.data.{key}={value}" for key, value in settings.items()]
        workdir = f"--workdir={tmp_path / 'run'}"
        return main([*("--config=configs/mae_emoji.py", "--smoke", workdir), *overrides])

    assert run(max_bad_fraction=0.05) == 2
    assert "1 of 13 images cannot be used" in capsys.readouterr().err
    assert run(max_bad_fraction=0.1) == 0  # goes on in the same folder
    assert "cannot use" not in capsys.readouterr().out  # said before
    lines = (tmp_path / "run/bad_files.jsonl").read_text().splitlines()
    told = {line["file"]: line["reason"] for line in map(json.loads, lines)}
    assert set(told) == set(NO_IMAGES) | set(BAD)
    assert len(lines) == len(told)
    assert (tmp_path / "run/pictures/step_0000020.png").exists()
