"""Classes are matched by name: evaluations and labels of data sets in another order."""

import json

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, data
from mim_jax.data.class_names import are_numbers, list_names, numbers_in, renumber
from mim_jax.data.classes import Classes
from mim_jax.data.sources import Source

pytestmark = pytest.mark.usefixtures("cache")


def folder(root, names, each=6):
    """Images of one color for each class: its place in the alphabet of `names`."""
    for name in names:
        for i in range(each):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), ord(name[0])).save(path)
    return root


def labels_by_color(root, **settings):
    dataset = data.make(
        **dict(name=f"folder:{root}", size=8, labels="folder", channels=1) | settings
    )
    batches = [
        *dataset.training_batches(8, seed=0, start=0, stop=3),
        *dataset.evaluation_batches(4),
    ]
    pairs = {
        (chr(image[0, 0, 0]), int(label))
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
    }
    return dataset, pairs


def test_labels_have_the_numbers_of_known_names(tmp_path):
    root = folder(tmp_path, ("ant", "bee", "cat"))
    dataset, pairs = labels_by_color(root)
    assert pairs == {("a", 0), ("b", 1), ("c", 2)}
    assert dataset.class_names == ("ant", "bee", "cat")
    dataset, pairs = labels_by_color(root, class_names=["cat", "dog", "ant", "bee"])
    assert pairs == {("a", 2), ("b", 3), ("c", 0)}
    assert (dataset.num_labels, dataset.class_names) == (4, ("cat", "dog", "ant", "bee"))
    assert labels_by_color(root, class_names=["bee", "cat", "ant"], workers=1)[1] == {
        *(("a", 2), ("b", 0), ("c", 1))
    }


def test_other_classes_are_refused(tmp_path):
    root = folder(tmp_path, ("ant", "bee", "zebra"))
    with pytest.raises(UserError, match=r"has other classes .*: zebra is not among ant, bee, cat"):
        labels_by_color(root, class_names=["ant", "bee", "cat"])


def test_classes_without_names(capsys):
    """They have numbers, and can only be assumed to be in the same order."""
    assert are_numbers(("0", "1"))
    assert not are_numbers(("1", "2"))
    assert numbers_in(("0", "1", "2"), ("0", "1"), "x").tolist() == [0, 1]
    assert numbers_in(("0", "1"), ("cat", "dog"), "x").tolist() == [0, 1]
    assert "assuming the same order" in capsys.readouterr().err
    with pytest.raises(UserError, match="x has 3 classes, but the run was trained on 2"):
        numbers_in(("cat", "dog"), ("0", "1", "2"), "x")
    assert list_names([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_labels_outside_the_classes_stay_invalid():
    examples = [{"label": np.int32(x)} for x in (1, -1, 7)]
    source = Source(examples, 2, {}, "RGB", str, class_names=("a", "b"))
    renumbered = renumber(source, ("b", "a"), "x").examples
    assert [renumbered[i]["label"] for i in range(3)] == [0, -1, -1]


def test_classes_of_pixels():
    classes = Classes(("sky", "sea"), ((1, 1, 1), (2, 2, 2)), (10, 20), ignored=(0,))
    source = Source([], 0, {}, "RGB", str, classes=classes)
    matched = renumber(source, ("sea", "sky"), "x").classes
    assert matched == Classes(("sea", "sky"), ((2, 2, 2), (1, 1, 1)), (20, 10), ignored=(0,))
    labels = matched.labels(np.array([[10, 20, 0]]))
    assert labels.tolist() == [[1, 0, 255]]
    with pytest.raises(UserError, match="lacks classes that the run was trained on: land"):
        renumber(source, ("sea", "sky", "land"), "x")


@pytest.mark.parametrize(
    "bands, sentence",
    [
        (("red",), r"has 1 names, but data.channels = 3"),
        (("red", "red", "nir"), "must be different names"),
        ((1, 2, 3), "must be different names"),
    ],
)
def test_names_of_bands(bands, sentence):
    with pytest.raises(UserError, match=sentence):
        data.make(name="emoji", size=16, bands=bands)
    assert data.make(name="emoji", size=16, bands=("r", "g", "b")).bands == ("r", "g", "b")


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict(dict(batch_size=8, steps=40))
    config.model = dict(width=32, depth=1, heads=2, patch=8, positions="learned")
    config.objective = dict(name="classify", mean=(0.5,), std=(0.5,))
    config.data = dict(name="emoji", size=16, labels="folder", crop_scale=(1.0, 1.0))
    config.optimizer = dict(name="adamw", base_lr=3e-2)
    config.save = dict(every_steps=40)
    return config
"""
COLORS = dict(ant=(220, 30, 30), bee=(30, 220, 30), cat=(30, 30, 220))


def splits_of_colors(root, names):
    for split in ("train", "val"):
        for name in names:
            for i in range(8):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), COLORS[name.split()[-1]]).save(path)
    return f"--config.data.name=folder:{root}"


def test_a_run_is_evaluated_by_the_names_of_its_classes(tmp_path, command):
    (tmp_path / "config.py").write_text(CONFIG)
    run, numbers = tmp_path / "run", tmp_path / "metrics.json"
    data_set = splits_of_colors(tmp_path / "one", COLORS)
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={run}", data_set]
    trained = command("mim_jax.main", *arguments)
    assert trained.returncode == 0, trained.stderr
    assert "3 classes: ant, bee, cat" in trained.stdout
    record = json.loads((run / "config.json").read_text())
    assert record["data"]["class_names"] == ["ant", "bee", "cat"]
    fewer = splits_of_colors(tmp_path / "fewer", ("bee", "cat"))  # 0 and 1 in their own order
    evaluated = command("mim_jax.evaluate", f"--config={run}", fewer, f"--to={numbers}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(numbers.read_text())["accuracy"] == 1
    other = splits_of_colors(tmp_path / "other", ("big ant", "bee", "cat"))
    refused = command("mim_jax.evaluate", f"--config={run}", other)
    assert refused.returncode == 2
    assert "big ant is not among ant, bee, cat" in refused.stderr
