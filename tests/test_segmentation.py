"""Transforms of an image together with its mask."""

import io

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, data
from mim_jax.data import segmentation
from mim_jax.data.classes import Classes
from mim_jax.data.fields import fields_of
from mim_jax.data.masks import read_values

CLASSES = Classes(("a", "b"), ((1, 2, 3), (4, 5, 6)), (0, 1), (9,))


def rng(seed=0):
    return np.random.default_rng(seed)


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def example(height=40, width=60):
    """An image whose colors say which class a pixel is of, and 9, ignored, on the left."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :] = 1
    mask[:, :5] = 9
    image = np.zeros((height, width, 3), np.uint8)
    image[mask == 1], image[mask == 9] = (0, 200, 0), (200, 0, 0)
    return {"image": png(image), "mask": png(mask)}


def fields(size=(32, 32), dtype="uint8"):
    settings = dict(size=size, tokenizer_size=0, channels=3, dtype=dtype, labeled=False)
    return fields_of(**settings, interpolation="bilinear", segmentation="uint8")


def training(size=(32, 32), dtype="uint8", **changes):
    settings = dict(short_side=32, long_side=128, fill=(9, 8, 7), classes=CLASSES)
    settings |= dict(distortion=False) | changes
    view = segmentation.SegmentationTrainingView
    return view.configured(fields(size, dtype), settings)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((512, 683), (512, 2048), (512, 683)),
        ((300, 400), (512, 2048), (512, 683)),
        ((100, 1000), (512, 2048), (205, 2048)),
        ((1000, 100), (256, 1024), (1024, 102)),
    ],
)
def test_fitted(size, limits, expected):
    """As mmcv's rescale_size: the side that reaches its limit first decides."""
    assert segmentation.fitted(size, *limits) == expected


def test_labels_are_resized_as_pillow_does():
    labels = rng().integers(0, 9, (13, 17)).astype(np.uint8)
    for size in ((26, 34), (5, 40), (13, 17), (1, 1)):
        theirs = np.asarray(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
        np.testing.assert_array_equal(segmentation.resize_labels(labels, size), theirs)


def test_image_and_mask_stay_together():
    """After scale, crop and flip each labeled pixel still has its color, but at edges."""
    for seed in range(20):
        views = training()(example(), rng(seed))
        image, labels = views["image"].astype(int), views["segmentation"]
        padded = (image == (9, 8, 7)).all(-1)
        green, red = image[..., 1] > 100, image[..., 0] > 100
        assert (labels[padded] == 255).all()
        agree = np.where(labels == 255, red | padded, green == (labels == 1))
        assert agree.mean() > 0.93
        assert image.shape == (32, 32, 3)
        assert labels.shape == (32, 32)


def test_scales():
    """Sides from half to twice the short side: what is smaller than the crop is padded."""
    heights = []
    for seed in range(200):
        views = training(size=(80, 80))(example(), rng(seed))
        heights.append(int((views["image"] != (9, 8, 7)).any(-1).any(1).sum()))
    assert 16 <= min(heights) < 20
    assert 58 < max(heights) <= 64


def test_same_generator_same_view():
    one, two = (training(distortion=True)(example(), rng(3)) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_class_share():
    """Crops with nearly one class are drawn again, up to ten times; ignored pixels do not count."""
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 40:], labels[:, 50:] = 1, 255

    def largest_share(share, seed):
        image = np.zeros((64, 64, 3), np.uint8)
        options = dict(class_share=share, ignore_label=255)
        _, part = segmentation.random_crop(image, labels, (16, 16), rng(seed), **options)
        counts = np.bincount(part.ravel(), minlength=2)[:2]
        return counts.max() / max(1, counts.sum())

    limited = np.array([largest_share(0.75, seed) for seed in range(200)])
    free = np.array([largest_share(1.0, seed) for seed in range(200)])
    suits = (free < 0.75).mean()
    assert 0.1 < suits < 0.3
    assert abs((limited < 0.75).mean() - (1 - (1 - suits) ** 11)) < 0.06


def test_distortion_of_one_color():
    """Of mid gray: only brightness and contrast, within their limits; half is left as it is."""
    image = np.full((2, 2, 3), 128, np.uint8)
    values = [segmentation.distort(image, rng(seed))[0, 0] for seed in range(400)]
    assert all(len(set(value.tolist())) == 1 for value in values)
    values = np.array(values)[:, 0]
    assert 0.2 < (values == 128).mean() < 0.3
    assert 48 <= values.min() < 60
    assert 225 < values.max() <= 240


def test_distortion_of_hue():
    """Of a red that nothing clips, hue moves by at most 36 degrees, and to both sides."""
    image = np.array([[[130, 40, 40]]], np.uint8)
    hues = []
    for seed in range(300):
        distorted = Image.fromarray(segmentation.distort(image, rng(seed)))
        hue, saturation, _ = distorted.convert("HSV").getpixel((0, 0))
        hues += [(hue + 128) % 256 - 128] if saturation > 60 else []
    assert min(hues) < -20
    assert max(hues) > 18
    assert max(map(abs, hues)) <= 27  # of 256


def evaluation():
    settings = dict(short_side=32, long_side=128, fill=(9, 8, 7), classes=CLASSES)
    return segmentation.SegmentationEvaluationView.configured(fields(), settings)


def test_evaluation_view():
    """The resized image and the mask in its own size, both padded."""
    ((indices, view),) = evaluation().groups([(40, 60)], 1)
    views = view(example())
    assert indices == [0]
    assert views["image"].shape == (32, 48, 3)
    np.testing.assert_array_equal(views["image_size"], [32, 48])
    assert views["segmentation"].shape == (48, 64)
    np.testing.assert_array_equal(views["segmentation_size"], [40, 60])
    labels = views["segmentation"]
    assert (labels[40:] == 255).all()
    assert (labels[:, 60:] == 255).all()
    np.testing.assert_array_equal(labels[:40, 5:60], np.repeat([0, 1], 20)[:, None].repeat(55, 1))


def test_groups():
    """Every image is in one, with room for it; sizes of 1,000 images make few shapes."""
    sizes = np.clip(rng().lognormal(5.5, 0.4, (1000, 2)), 100, 2000).astype(int)
    groups = evaluation().groups(sizes, 1000)
    assert sorted(i for indices, _ in groups for i in indices) == list(range(1000))
    assert len(groups[0][0]) == max(len(indices) for indices, _ in groups)
    assert sum(len(indices) for indices, _ in evaluation().groups(sizes, 30)) == 30
    for indices, view in groups:
        shape, label_shape = view.shapes
        for i in indices:
            assert (sizes[i] <= label_shape).all()
            assert (np.array(segmentation.fitted(tuple(sizes[i]), 32, 128)) <= shape).all()
    assert len({view.shapes[0] for _, view in groups}) <= 10


def test_next_side():
    sides = [segmentation.next_side(side) for side in (1, 2, 3, 4, 5, 6, 7, 9, 512, 513, 683, 769)]
    assert sides == [1, 2, 3, 4, 6, 6, 8, 12, 512, 768, 768, 1024]


def test_images_that_do_not_fit_are_clipped():
    """As of an image that replaces a bad one, which is not counted."""
    ((_, view),) = evaluation().groups([(20, 20)], 1)
    views = view(example())
    assert views["image"].shape == (32, 32, 3)
    np.testing.assert_array_equal(views["image_size"], [32, 32])
    np.testing.assert_array_equal(views["segmentation_size"], [24, 24])


@pytest.mark.parametrize(("dtype", "expected"), [("uint16", 9 * 257), ("float32", 9 / 255)])
def test_padding_of_other_types(dtype, expected):
    np.testing.assert_allclose(training(dtype=dtype).padding[0], expected, rtol=1e-6)


def test_sides_by_default():
    """Those of ADE20K: 512 and 2048 for crops of 512."""
    view = training((512, 512), short_side=0, long_side=0)
    assert view.limits() == (512, 2048)
    assert view.limits(0.5) == (256, 1024)


def test_refused():
    with pytest.raises(UserError, match=r"data\.scale_range"):
        training(scale_range=(2.0, 0.5))
    with pytest.raises(UserError, match=r"data\.distortion needs 8-bit"):
        training(dtype="uint16", distortion=True)
    with pytest.raises(UserError, match=r"data\.fill"):
        training(fill=(1, 2))


# --- Batches of a data set. ---


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of images of many sizes with masks; the red channel is 20 times the class."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = rng()
    for split, count in (("train", 12), ("val", 11)):
        for i in range(count):
            size = tuple(random.integers(20, 70, 2))
            mask = random.integers(0, 3, size).astype(np.uint8)
            image = np.stack([20 * mask, mask, mask], -1)
            for folder, pixels in (("images", image), ("masks", mask)):
                path = tmp_path / "set" / folder / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(pixels))
    (tmp_path / "set/classes.csv").write_text("0,a\n1,b\n2,\n")
    return tmp_path / "set"


def opened(folder, **settings):
    defaults = dict(size=32, segmented=True, evaluation_interpolation="bilinear")
    return data.make(name=f"folder:{folder}", **defaults | settings)


def test_fields(photographs):
    """Of training batches, as declared; evaluation adds what is not padding."""
    dataset = opened(photographs)
    batch = next(dataset.training_batches(4, seed=0, start=0, stop=1))
    declared = {field.name: (field.shape, field.dtype) for field in dataset.fields}
    assert {name: (x.shape[1:], x.dtype.name) for name, x in batch.items()} == declared
    assert [field.name for field in dataset.image_fields] == ["image"]
    batch = next(dataset.evaluation_batches(4))
    assert batch.keys() == declared.keys() | {"image_size", "segmentation_size"}
    assert dataset.segmentation_classes == ("a", "b")
    assert list(dataset.legend) == ["a", "b"]


@pytest.mark.parametrize("processes", [1, 2])
def test_training_batches_are_a_function_of_the_step(photographs, processes):
    """A run that continues gets the batches that it would have had, on other processes too."""
    whole = list(opened(photographs).training_batches(4, seed=3, start=0, stop=5))
    parts = [
        opened(photographs, process=i, processes=processes).training_batches(
            4, seed=3, start=2, stop=5
        )
        for i in range(processes)
    ]
    for batch, *rows in zip(whole[2:], *parts, strict=True):
        for name, x in batch.items():
            np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), x)


def test_each_image_is_evaluated_once(photographs):
    """Each in its own size, in batches of one shape, and with all its labels."""
    dataset = opened(photographs)
    batches = list(dataset.evaluation_batches(4))
    assert len({batch["image"].shape for batch in batches}) > 1
    seen = [int(i) for batch in batches for i in batch["index"][batch["valid"] > 0]]
    assert sorted(seen) == list(range(11))
    assert sum(len(x["valid"]) for x in batches) > 11
    for batch in batches:
        for row in np.flatnonzero(batch["valid"]):
            values = read_values(dataset.evaluation.examples[batch["index"][row]]["mask"])
            height, width = batch["segmentation_size"][row]
            labels = batch["segmentation"][row]
            np.testing.assert_array_equal(
                labels[:height, :width], np.where(values == 2, 255, values)
            )
            assert (labels[height:] == 255).all()
            size = segmentation.fitted(values.shape, 32, 128)
            assert tuple(batch["image_size"][row]) == size
    first = list(dataset.evaluation_batches(4, limit=5))
    assert sorted(int(i) for x in first for i in x["index"][x["valid"] > 0]) == list(range(5))


def test_an_image_that_breaks_off_is_not_evaluated(photographs):
    """The check of all files reads the headers of JPEGs only."""
    path = photographs / "images/val/3.jpg"
    pixels = Image.open(path.with_suffix(".png")).convert("RGB")
    path.with_suffix(".png").unlink()
    pixels.save(path)
    path.write_bytes(path.read_bytes()[:700])
    dataset, bad = opened(photographs, max_bad_fraction=0.5), []
    batches = dataset.evaluation_batches(4, on_bad=lambda name, reason: bad.append(name))
    assert sum(int(batch["valid"].sum()) for batch in batches) == 10
    assert bad == ["images/val/3.jpg"]


@pytest.mark.parametrize("key", ["labels", "tokenizer_size"])
def test_masks_are_the_only_labels(photographs, key):
    with pytest.raises(UserError, match=rf"data\.{key} = .* must not be set"):
        opened(photographs, **{key: dict(labels="folder", tokenizer_size=16)[key]})
