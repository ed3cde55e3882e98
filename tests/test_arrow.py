"""Tests of data/arrow.py: Parquet and Arrow files as `datasets` of Hugging Face writes them."""

import json

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, data
from mim_jax.data import arrow
from mim_jax.data.arrow import split_name
from mim_jax.data.decode import BadImageError, decode
from tests.images import encoded, jpeg, pixels

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ANIMALS = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def png(i):
    return encoded(Image.fromarray(pixels(i)))


def table(rows, features=ANIMALS, *, image="image", label="label", labels=None):
    """A table of rows (numbers of images), with the metadata that `datasets` adds."""
    images = [{"bytes": png(i), "path": None} for i in rows]
    columns = {image: pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if label:
        columns[label] = pa.array([i % 2 for i in rows] if labels is None else labels)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_parquet(path, content, rows_per_group=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=rows_per_group)


def write_stream(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, content.schema) as writer:
        writer.write_table(content, max_chunksize=4)


def write_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(path, content.schema) as writer:
        writer.write_table(content)


WRITERS = {"parquet": write_parquet, "stream": write_stream, "file": write_file}


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    """Twenty training images in two files, and seven of a test split."""
    write, suffix = WRITERS[request.param], "parquet" if request.param == "parquet" else "arrow"
    for part in range(2):
        path = tmp_path / "data" / f"train-{part:05d}-of-00002.{suffix}"
        write(path, table(range(10 * part, 10 * part + 10)))
    write(tmp_path / "data" / f"test-00000-of-00001.{suffix}", table(range(20, 27)))
    return tmp_path


def make(folder, **settings):
    return data.make(**dict(name=f"hf:{folder}", size=16) | settings)


def test_every_row_has_its_image_and_its_label(folder):
    dataset = make(folder)
    assert (dataset.examples, len(dataset.evaluation.examples)) == (20, 7)
    assert (dataset.num_labels, dataset.class_names) == (2, ("cat", "dog"))
    for i in range(20):
        example = dataset.train.examples[i]
        np.testing.assert_array_equal(np.asarray(decode(example["image"], 3)), pixels(i))
        assert example["label"] == i % 2
    assert dataset.train.name_of(13).endswith("row 3")
    assert "train-00001-of-00002" in dataset.train.name_of(13)
    assert dataset.train.examples[3]["label"].dtype == np.int32


def test_the_stream_is_the_same_from_any_step_and_in_workers(folder):
    def stream(start, **settings):
        batches = make(folder, **settings).training_batches(8, seed=1, start=start, stop=5)
        return [(x["image"].tobytes(), x["label"].tolist()) for x in batches]

    assert stream(2) == stream(0)[2:]
    assert stream(0, workers=1) == stream(0)


def test_an_evaluation_sees_each_row_once(folder):
    (batch,) = make(folder).evaluation_batches(8)
    assert batch["valid"].tolist() == [1] * 7 + [0]
    assert batch["label"][:7].tolist() == [i % 2 for i in range(20, 27)]


def test_slices_and_a_split_that_is_drawn(tmp_path):
    write_parquet(tmp_path / "train.parquet", table(range(40)))
    dataset = make(tmp_path)
    assert (dataset.examples, len(dataset.evaluation.examples)) == (38, 2)
    seen = {*dataset.train.examples.rows, *dataset.evaluation.examples.rows}
    assert seen == set(range(40))
    assert make(tmp_path, split="train[:10]").examples == 10
    assert make(tmp_path, split="all").examples == 40


def test_columns(tmp_path):
    """Labels that are texts are sorted; several columns of labels must be chosen among."""
    texts = ["b", "a", "c", "a"]
    features = {"img": {"_type": "Image"}, "kind": {"_type": "Value"}}
    words = table(range(4), features, image="img", label="kind", labels=texts)
    write_parquet(tmp_path / "one" / "train.parquet", words)
    dataset = make(tmp_path / "one", labels="kind", split="all", evaluation_split="all")
    assert dataset.class_names == ("a", "b", "c")
    rows = dataset.train.examples.rows
    labels = {int(row): int(dataset.train.examples[i]["label"]) for i, row in enumerate(rows)}
    assert labels == {0: 1, 1: 0, 2: 2, 3: 0}
    assert make(tmp_path / "one", split="all", evaluation_split="all").num_labels == 0
    coarse = dict(ANIMALS, label={"_type": "Value"}, fine={"_type": "ClassLabel", "names": ["x"]})
    coarse["coarse"] = {"_type": "ClassLabel", "names": ["y", "z"]}
    two = table(range(4), coarse, label="fine", labels=[0] * 4)
    two = two.append_column("coarse", pa.array([1] * 4))
    write_parquet(tmp_path / "two" / "train.parquet", two)
    with pytest.raises(UserError, match=r"several columns of labels: set data.labels to one of"):
        make(tmp_path / "two")
    assert make(tmp_path / "two", labels="coarse", evaluation_split="all").class_names == ("y", "z")
    with pytest.raises(UserError, match=r"data.labels = 'no' is not a column of"):
        make(tmp_path / "two", labels="no")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train-00000-of-00001-0123abcd.parquet", "train"),
        ("plain/test/0000.parquet", "test"),
        ("validation/data-00000-of-00001.arrow", "validation"),
        ("dev.parquet", "validation"),
        ("data-00000-of-00001.arrow", "train"),
    ],
)
def test_names_of_splits(path, split):
    assert split_name(path) == split


def test_rows_without_an_image_are_bad_files(tmp_path):
    content = table(range(4))
    images = content["image"].to_pylist()
    images[1] = {"bytes": None, "path": "/home/a.jpg"}
    images[2] = None
    column = pa.array(images, content["image"].type)
    write_parquet(tmp_path / "train.parquet", content.set_column(0, "image", column))
    dataset = make(tmp_path, split="all", evaluation_split="all", max_bad_fraction=0.5)
    rows = dataset.train.examples.rows.tolist()
    with pytest.raises(BadImageError, match=r"only the path '/home/a.jpg'"):
        dataset.train.examples[rows.index(1)]
    reported = []
    (batch,) = dataset.evaluation_batches(4, on_bad=lambda *bad: reported.append(bad))
    assert batch["valid"].tolist() == [row in (0, 3) for row in rows]
    assert {name for name, _ in reported} == {f"train.parquet, row {i}" for i in (1, 2)}


@pytest.mark.parametrize(
    "metadata",
    [b"{", b"[]", b'{"info": 1}', b'{"info": {"features": [1]}}', b"\xff", b"[" * 100_000],
)
def test_metadata_of_another_form(metadata, tmp_path):
    content = table(range(4), None).replace_schema_metadata({"huggingface": metadata})
    write_parquet(tmp_path / "train.parquet", content)
    dataset = make(tmp_path, split="all", evaluation_split="all")
    assert dataset.class_names == ("0", "1")


def test_labels_that_are_no_classes(tmp_path):
    """Names are numbered; numbers out of range are reported, missing ones are -1."""
    named = table(range(4), labels=["dog", "cat", None, "eel"])
    write_parquet(tmp_path / "names" / "train.parquet", named)
    settings = dict(split="all", evaluation_split="all")
    source = make(tmp_path / "names", **settings).train
    at = {row: i for i, row in enumerate(source.examples.rows.tolist())}
    assert [source.examples[at[row]]["label"] for row in range(3)] == [1, 0, -1]
    with pytest.raises(BadImageError, match="its label is 'eel'"):
        source.examples[at[3]]
    write_parquet(tmp_path / "large" / "train.parquet", table(range(2), labels=[2**40, 0]))
    (batch,) = make(tmp_path / "large", **settings, max_bad_fraction=1.0).evaluation_batches(2)
    assert batch["valid"].sum() == 1


def test_files_with_other_classes_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", table(range(4)))
    other = dict(ANIMALS, label={"_type": "ClassLabel", "names": ["dog", "cat"]})
    for content in (table(range(4), other), table(range(4), image="img")):
        write_parquet(tmp_path / "test.parquet", content)
        with pytest.raises(UserError, match=r"other columns or classes than each other"):
            make(tmp_path)


def test_a_split_without_labels(tmp_path):
    """Its labels are -1, as in ImageNet's test split, whichever file comes first."""
    write_parquet(tmp_path / "train.parquet", table(range(4)))
    write_parquet(tmp_path / "test.parquet", table(range(4, 6), label=None))
    dataset = make(tmp_path)
    assert dataset.class_names == ("cat", "dog")
    (batch,) = dataset.evaluation_batches(2)
    assert batch["label"].tolist() == [-1, -1]
    assert not dataset.evaluation_labeled


def test_lists_are_not_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", table(range(4), None, labels=[[0], [1, 0], [], [1]]))
    settings = dict(split="all", evaluation_split="all")
    assert make(tmp_path, **settings).num_labels == 0
    with pytest.raises(UserError, match=r"data.labels = 'label' is a column of list"):
        make(tmp_path, labels="label", **settings)


@pytest.mark.parametrize(
    ("features", "labels", "names", "numbers"),
    [
        (None, [1.0, float("nan"), 0.0], ("0", "1"), [1, -1, 0]),
        (None, ["b", "", " a"], ("a", "b"), [1, -1, 0]),
        (ANIMALS, [1.0, float("nan"), 0.0], ("cat", "dog"), [1, -1, 0]),
    ],
)
def test_floats_and_gaps_in_columns_of_labels(tmp_path, features, labels, names, numbers):
    write_parquet(tmp_path / "train.parquet", table(range(3), features, labels=pa.array(labels)))
    source = make(tmp_path, split="all", evaluation_split="all").train
    assert tuple(source.class_names) == names
    read = {int(row): source.examples[i]["label"] for i, row in enumerate(source.examples.rows)}
    assert [read[row] for row in range(3)] == numbers


def test_links_junk_and_missing_parts(tmp_path):
    parts = tmp_path / "data"
    write_parquet(parts / "train-00000-of-00003.PARQUET", table(range(4)))
    write_parquet(parts / "test-00000-of-00001.parquet", table(range(2)))
    (parts / "._test-00000-of-00001.parquet").write_bytes(b"junk")
    (tmp_path / "loop").symlink_to(".")
    (parts / "train-00001-of-00003.parquet").symlink_to("nowhere")
    dataset = make(tmp_path)
    assert dataset.examples == 4
    assert dict(dataset.unread) == {
        "data/train": "2 of 3 parts are missing",
        "data/train-00001-of-00003.parquet": "a broken link",
        "loop": "a link to a folder that is scanned already",
    }
    write_parquet(parts / "train-00000-of-00001.parquet", table(range(4)))
    with pytest.raises(UserError, match="parts of different divisions of the same split"):
        make(tmp_path)


def test_large_row_groups_are_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", table(range(8)), rows_per_group=8)
    monkeypatch.setattr(arrow, "LARGEST", 1000)
    with pytest.raises(UserError, match="write smaller row groups"):
        make(tmp_path)


def test_user_errors(tmp_path, monkeypatch):
    for name, problem in (("none", "there is no folder"), ("empty", "holds no .parquet or .arrow")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=problem):
            make(tmp_path / name)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(jpeg())
    with pytest.raises(UserError, match=r"train.parquet cannot be read"):
        make(tmp_path / "bad")
    write_parquet(tmp_path / "texts" / "a.parquet", pa.table({"text": ["x"]}))
    with pytest.raises(UserError, match="has no column of images; its columns are text"):
        make(tmp_path / "texts")
    monkeypatch.setattr(arrow, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'mim-jax\[arrow\]'"):
        make(tmp_path)
