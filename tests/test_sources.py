"""Tests of data/sources.py, and bad_files.py, and of batches from folders."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, data
from mim_jax.data.folder import Folder
from mim_jax.data.pack import pack
from mim_jax.data.sources import BUILTIN
from mim_jax.main import main
from mim_jax.sheets import MARGIN, draw_sheet
from tests.images import BAD, GOOD, PIXEL, UNREAD, encoded, npy, open_tree, pixels, plant

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def tree(tmp_path):
    return open_tree(tmp_path / "tree")


def make(root, **settings):
    settings = dict(size=16, split="all", evaluation_split="all") | settings
    return data.make(name=f"folder:{root}", **settings)


# --- Batches. ---


@pytest.mark.parametrize("dtype, channels", [("uint8", 1), ("uint16", 13), ("float32", 2)])
def test_batches_have_the_type_and_the_channels_of_the_source(tmp_path, dtype, channels):
    arrays = {i: pixels(i, channels=channels, dtype=np.dtype(dtype).type) for i in range(8)}
    plant(tmp_path, {f"{i}.npy": npy(array) for i, array in arrays.items()})
    dataset = make(tmp_path, size=(20, 24), channels=channels)
    assert dataset.image.dtype == dtype
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


def stream(root, start=0, stop=7, processes=1, **settings):
    """Returns global batches of 8 of the tree's 13 images, so that epochs end inside batches."""
    sets = (
        make(root, max_bad_fraction=0.1, process=i, processes=processes, **settings)
        for i in range(processes)
    )
    parts = [dataset.training_batches(8, seed=3, start=start, stop=stop) for dataset in sets]
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [dict(processes=2), dict(processes=4, threads=3), dict(workers=2), dict(processes=2, start=3)],
    ids=str,
)
def test_the_stream_with_bad_files_is_a_function_of_the_step(tree, settings):
    whole = digests(stream(tree))
    assert len(set(whole)) == 7
    assert digests(stream(tree, **settings)) == whole[settings.get("start", 0) :]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_reported_once(tree, workers):
    reported = []
    dataset = make(tree, workers=workers, max_bad_fraction=0.1)

    def on_bad(name, reason):
        reported.append((name, reason))

    batches = list(dataset.training_batches(8, seed=0, start=0, stop=8, on_bad=on_bad))
    assert all(set(batch) == {"image", "index", "valid"} for batch in batches)
    ((name, reason),) = reported
    assert name == "truncated.jpg"
    assert "image file is truncated" in reason


def test_a_bad_file_is_replaced_by_the_next_one(tmp_path):
    colors = {f"{i}.png": encoded(Image.new("L", (8, 8), 10 + 20 * i)) for i in range(10)}
    plant(tmp_path, colors)
    names = Folder(tmp_path).names
    bad = names[4]
    content = bytearray(colors[bad])
    content[-20] ^= 255  # damages the pixels, not the header
    plant(tmp_path, {bad: bytes(content)})
    batches = make(tmp_path, channels=1, max_bad_fraction=0.5).training_batches(
        10, seed=0, start=0, stop=1
    )
    seen = sorted(next(batches)["image"][:, 0, 0, 0].tolist())
    names[4] = names[5]
    assert seen == sorted(10 + 20 * int(name[0]) for name in names)


def test_too_many_bad_files_end_a_run(tree):
    batches = make(tree, max_bad_fraction=0.05).training_batches(8, seed=0, start=0, stop=8)
    sentence = (
        r"1 of 13 images cannot be used, more than data.max_bad_fraction = 0.05; "
        r"the last one is truncated.jpg: image file is truncated"
    )
    with pytest.raises(UserError, match=sentence):
        list(batches)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_each_good_image_once(tree, processes):
    parts = [
        make(tree, process=i, processes=processes, max_bad_fraction=1.0).evaluation_batches(8)
        for i in range(processes)
    ]
    batches = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*parts, strict=True)
    ]
    index, valid = (
        np.concatenate([batch[name] for batch in batches]) for name in ("index", "valid")
    )
    names = Folder(tree).names
    assert sorted(names[i] for i in index[valid > 0]) == sorted(GOOD)
    assert len(index) == 16


def test_the_fingerprint_depends_on_the_images_and_not_on_their_place(tree, tmp_path):
    (tree / "loop").unlink()
    shutil.copytree(tree, tmp_path / "copy")
    (tmp_path / "copy/two/notes.txt").unlink()
    fingerprint = make(tree).fingerprint
    assert make(tmp_path / "copy").fingerprint == fingerprint
    (tmp_path / "copy/array.npy").unlink()
    plant(tmp_path / "copy", {"array.npy": npy(pixels(99, height=31))})
    assert make(tmp_path / "copy").fingerprint != fingerprint


# --- User errors. ---


@pytest.mark.parametrize(
    "files, settings, sentence",
    [
        ({}, {}, "holds no image that can be read: it is empty"),
        (
            {"a.txt": b"x"},
            {},
            "holds no image that can be read: for most of its 1 files, the reason is: not an",
        ),
        (
            {"a.png": 1},
            dict(split="train[5"),
            "has no split 'train[5'; it has train, validation, all",
        ),
        ({"a.png": 1}, dict(split="dev"), "has no split 'dev'; it has train, validation, all"),
        ({"a.png": 1}, dict(evaluation_split="validation"), "split 'validation' of .* is empty"),
        ({"a.png": 1}, dict(labels="folder"), "are not in folders that could be labels"),
        ({"a.png": 1}, dict(labels="no.csv"), "data.labels = 'no.csv' cannot be read"),
        ({"a.png": 1}, dict(channels=2), "data.channels = 2, but the images of folder:.* have 3"),
        (
            {"a.npy": npy(pixels(channels=13))},
            {},
            "data.channels = 3 does not fit .* a.npy: its shape, .30, 40, 13.",
        ),
    ],
)
def test_user_errors(tmp_path, files, settings, sentence):
    files = {n: PIXEL if content == 1 else content for n, content in files.items()}
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=sentence.replace("[", r"\[")):
        make(plant(tmp_path / "set", files), **settings)


def test_sources_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a data set of TFDS or `mim-jax prepare`"):
        data.make(name=f"tfds:{tmp_path}", size=16)
    with pytest.raises(UserError, match=r"is for data.name=folder:PATH"):
        data.make(name="emoji", size=16, labels="folder")


NESTED = json.dumps({"image": {"type": "evil_features.Evil", "content": {}}})
EVIL = {  # ways to name a class in features.json
    "proto": {"pythonClassName": "evil_features.Evil", "text": {}},
    "field of a proto": {"python_class_name": "evil_features.Evil", "text": {}},
    "legacy": {"type": "evil_features.Evil", "content": {}},
    "nested": {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "jsonFeature": {"json": NESTED},
    },
}


@pytest.mark.parametrize("feature", EVIL.values(), ids=EVIL)
def test_a_data_set_imports_no_code(feature, tmp_path, monkeypatch):
    """TFDS imports the module of each class that features.json names."""
    module = tmp_path / "modules" / "evil_features.py"
    made = tmp_path / "made"
    plant(tmp_path, {"modules/evil_features.py": f"open({str(made)!r}, 'w')".encode()})
    monkeypatch.syspath_prepend(str(module.parent))
    folder = shutil.copytree(BUILTIN["emoji"], tmp_path / "set")
    path = folder / "features.json"
    content = json.loads(path.read_text())
    content["featuresDict"]["features"]["image"] = feature
    path.write_text(json.dumps(feature if "type" in feature else content))
    with pytest.raises(UserError, match=r"evil_features.Evil, which is not a feature of TFDS"):
        data.make(name=f"tfds:{folder}", size=16)
    assert not made.exists()
    assert data.make(name="emoji", size=16).num_labels == 9


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"type": 1, "content": 2}'])
def test_damaged_metadata(content, tmp_path):
    folder = shutil.copytree(BUILTIN["emoji"], tmp_path / "set")
    (folder / "features.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot be read|is not a feature of TFDS"):
        data.make(name=f"tfds:{folder}", size=16)


def zeros(content, start, length):
    return content[:start] + bytes(length) + content[start + length :]


def test_damaged_records_are_replaced_and_listed(tmp_path):
    """As damaged files: also in worker processes, and in evaluations."""
    folder = shutil.copytree(BUILTIN["emoji"], tmp_path / "set")
    for split in ("train", "validation"):
        (shard,) = folder.glob(f"*-{split}.*")
        content = shard.read_bytes()
        shard.write_bytes(zeros(content, len(content) // 2, 3000))
    settings = dict(name=f"tfds:{folder}", size=16, max_bad_fraction=0.01)
    reported = []
    dataset = data.make(**settings)
    batches = list(
        dataset.training_batches(64, seed=0, start=0, stop=21, on_bad=lambda *x: reported.append(x))
    )
    assert 1 <= len(reported) <= 5
    assert all("its record cannot be read: Corrupted" in reason for _, reason in reported)
    assert all(name.startswith("train, example ") for name, _ in reported)
    again = data.make(**settings, workers=1).training_batches(64, seed=0, start=20, stop=21)
    np.testing.assert_array_equal(next(again)["image"], batches[20]["image"])
    valid = np.concatenate([batch["valid"] for batch in dataset.evaluation_batches(64)])
    assert 561 <= valid.sum() < 566


@pytest.mark.parametrize(
    "damage", [lambda x: x[: len(x) // 2], lambda x: bytes(len(x)), lambda x: b""]
)
def test_a_damaged_shard_among_others(damage, tmp_path):
    """Its examples are replaced by those of other shards, or end the run in a sentence."""
    plant(
        tmp_path / "set", {f"{i:03d}.png": encoded(Image.new("L", (8, 8), i)) for i in range(200)}
    )
    pack(str(tmp_path / "set"), str(tmp_path / "packed"), shard_mb=0.0035)
    shards = sorted((tmp_path / "packed").glob("*-train.*"))
    assert len(shards) > 3
    shards[1].write_bytes(damage(shards[1].read_bytes()))
    settings = dict(name=f"tfds:{tmp_path / 'packed'}", size=8, channels=1)
    lost = []
    dataset = data.make(**settings, max_bad_fraction=0.5)
    for _ in dataset.training_batches(
        19, seed=0, start=0, stop=10, on_bad=lambda *x: lost.append(x)
    ):
        pass
    assert 20 < len(lost) < 80
    with pytest.raises(UserError, match=r"images cannot be used, more than data.max_bad_fraction"):
        list(data.make(**settings).training_batches(19, seed=0, start=0, stop=10))


@pytest.mark.parametrize("name", ["kaggle:set", "huggingface:mnist", "someone:set"])
def test_names_with_a_namespace_are_refused(name):
    with pytest.raises(UserError, match="is not a data set: set it to emoji, folder:PATH"):
        data.make(name=name, size=16)


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


def test_a_killed_worker_ends_the_run(run_workers):
    done = run_workers("workers[0]")
    assert done.returncode == 1
    assert "was terminated unexpectedly" in done.stderr


def test_no_worker_outlives_a_killed_parent(run_workers):
    """Workers hold the output open, so `run_workers` returns when the last one has ended."""
    done = run_workers("os.getpid()")
    assert done.returncode == -9
    assert len(done.stdout.split()) == 2


# --- Views and pictures. ---


def test_evaluating_a_line_of_pixels_takes_little_memory(tmp_path):
    """Resized to a short side of 224, it would take 400 MB."""
    plant(tmp_path, {"line.png": encoded(Image.new("RGB", (2_000, 1), "red"))})
    tracemalloc.start()
    batch = next(make(tmp_path, size=224).evaluation_batches(1))
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()
    assert (batch["image"] == [255, 0, 0]).all()


def test_pictures_of_sensors_are_not_dark(tmp_path):
    images = np.linspace(0.02, 0.05, 300).reshape(1, 10, 10, 3)
    for stretch, brightest in ((False, 13), (True, 255)):
        path = tmp_path / f"{stretch}.png"
        draw_sheet(path, {"original": images}, "", stretch=stretch)
        sheet = np.asarray(Image.open(path)).astype(int)
        tile = sheet[-MARGIN - 140 : -MARGIN, MARGIN : MARGIN + 140]
        assert abs(tile.max() - brightest) <= 1


# --- A run. ---


def test_a_run_lists_the_files_that_it_could_not_use(tree, tmp_path, capsys):
    def run(**settings):
        settings = {"name": f"folder:{tree}", "split": "all", "evaluation_split": "all"} | settings
        overrides = [f"--config.data.{key}={value}" for key, value in settings.items()]
        workdir = f"--workdir={tmp_path / 'run'}"
        return main([*("--config=configs/mae_emoji.py", "--smoke", workdir), *overrides])

    assert run(max_bad_fraction=0.05) == 2
    assert "1 of 13 images cannot be used" in capsys.readouterr().err
    assert run(max_bad_fraction=0.1) == 0  # continues in the same folder
    assert "cannot use" not in capsys.readouterr().out  # reported before
    lines = (tmp_path / "run/bad_files.jsonl").read_text().splitlines()
    reasons = {line["file"]: line["reason"] for line in map(json.loads, lines)}
    assert set(reasons) == set(UNREAD) | set(BAD)
    assert len(lines) == len(reasons)
    assert (tmp_path / "run/pictures/step_0000020.png").exists()


HOSTILE = {
    "deep features": ("features.json", lambda path: path.write_text("[" * 100_000)),
    "a pipe": ("dataset_info.json", lambda path: (path.unlink(), os.mkfifo(path))),
    "a device": ("metadata.json", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
    "long metadata": ("metadata.json", lambda path: os.truncate(path, 2**33)),
    "half metadata": ("metadata.json", lambda path: os.truncate(path, 30)),
    "another mode": ("metadata.json", lambda path: path.write_text('{"mode": 5}')),
    "other digests": ("metadata.json", lambda path: path.write_text('{"digests": [1]}')),
    "a shard": ("*train.array_record*", lambda path: (path.unlink(), os.mkfifo(path))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_prepared_sets_that_cannot_be_read_in_bounded_time(tmp_path, case):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / f"images/{i}.png").write_bytes(encoded(Image.fromarray(pixels())))
    pack(str(tmp_path / "images"), str(tmp_path / "set"))
    name, change = HOSTILE[case]
    change(next((tmp_path / "set").glob(name)))
    with pytest.raises(UserError, match=r"the metadata of .* cannot be read: "):
        data.make(name=f"tfds:{tmp_path / 'set'}", size=8)
