"""Batches: pixels as PIL's, a function of seed and step, each example once in evaluation."""

import hashlib
import io
import sys

import numpy as np
import PIL
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageEnhance

from mim_jax import UserError, data
from mim_jax.data.decode import decode
from mim_jax.data.fields import fields_of
from mim_jax.data.randaugment import rand_augment
from mim_jax.data.transforms import (
    EvaluationView,
    TrainingView,
    color_jitter,
    crop,
    random_crop_box,
    resize,
)


def emoji(**settings):
    return data.make(**dict(name="emoji", size=32, crop_fraction=1.0) | settings)


def png(width=40, height=30, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, "PNG")
    return file.getvalue()


def digests(batches):
    return [
        hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        for batch in batches
    ]


def joined(parts):
    """Batches of several processes -> global batches."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*parts, strict=True)
    ]


# --- The stream. ---


def test_a_batch():
    batch = next(emoji(size=(16, 24)).training_batches(12, seed=0, start=0, stop=1))
    assert batch["image"].shape == (12, 16, 24, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["index"].tolist() == list(range(12))
    assert batch["label"].dtype == np.int32
    assert batch["valid"].tolist() == [1] * 12
    assert set(batch) == {"image", "index", "label", "valid"}


def stream(start, stop, processes=1, **settings):
    """Global batches of 24 of 100 images: an epoch ends inside a batch."""
    return joined(
        emoji(split="train[:100]", process=i, processes=processes, **settings).training_batches(
            24, seed=5, start=start, stop=stop
        )
        for i in range(processes)
    )


@pytest.mark.parametrize("settings", [dict(processes=n) for n in (2, 4, 8)] + [dict(threads=3)])
def test_the_stream_is_the_same_for_any_processes(settings):
    assert digests(stream(0, 9, **settings)) == digests(stream(0, 9))


def test_the_stream_is_the_same_from_any_step():
    assert digests(stream(0, 9))[4:] == digests(stream(4, 9))
    assert digests(stream(0, 9))[4:] == digests(stream(4, 9, processes=2))


def test_an_epoch_sees_each_image_once_and_epochs_differ():
    labels = np.concatenate([batch["label"] for batch in stream(0, 25)])
    epochs = labels.reshape(6, 100)
    assert all((np.sort(epoch) == np.sort(epochs[0])).all() for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()


def test_other_seeds_give_other_streams():
    one, other = (next(emoji().training_batches(8, seed=seed, start=0, stop=1)) for seed in (1, 2))
    assert (one["label"] != other["label"]).any()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("limit", [0, 50, 64])
def test_evaluation_sees_each_example_once(processes, limit):
    batches = joined(
        emoji(process=i, processes=processes).evaluation_batches(64, limit=limit)
        for i in range(processes)
    )
    count = limit or 566
    index, valid = (
        np.concatenate([batch[name] for batch in batches]) for name in ("index", "valid")
    )
    assert index[valid > 0].tolist() == list(range(count))
    assert valid.sum() == count
    assert len(valid) == -(-count // 64) * 64


def numbered(root, count):
    """Writes images of one color that is their number -> the numbers in the order of `all`."""
    for i in range(count):
        Image.new("L", (8, 8), i).save(root / f"{i}.png")
    source = data.make(name=f"folder:{root}", size=8, split="all", evaluation_split="all").train
    return [int(source.name_of(i).removesuffix(".png")) for i in range(count)]


@pytest.mark.parametrize("limit", [0, 10, 7])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_the_example_that_its_index_names(limit, workers, tmp_path):
    """Pixels belong to the index: each of the first examples, and the last one, exactly once."""
    order = numbered(tmp_path, 11)
    settings = dict(size=8, split="all", evaluation_split="all", channels=1, workers=workers)
    batches = data.make(name=f"folder:{tmp_path}", **settings).evaluation_batches(4, limit=limit)
    rows = [
        (int(index), int(image[0, 0, 0]))
        for batch in batches
        for index, image, valid in zip(batch["index"], batch["image"], batch["valid"], strict=True)
        if valid
    ]
    assert rows == list(enumerate(order[: limit or 11]))


def test_an_epoch_has_the_pixels_of_each_image_once(tmp_path):
    numbered(tmp_path, 12)
    settings = dict(size=8, split="all", evaluation_split="all", channels=1, crop_scale=(1.0, 1.0))
    batches = data.make(name=f"folder:{tmp_path}", **settings).training_batches(
        5, seed=0, start=0, stop=12
    )
    seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).reshape(5, 12)
    assert (np.sort(seen) == np.arange(12)).all()
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 5


@pytest.mark.parametrize(("flip", "share"), [(True, 0.5), (False, 0)])
def test_half_of_the_images_are_flipped(flip, share):
    """The share of 4000 draws lies within five standard deviations."""
    rng, left = np.random.default_rng(0), Image.new("L", (8, 8), 0)
    left.paste(255, (0, 0, 4, 8))
    file = io.BytesIO()
    left.save(file, "PNG")
    view = training_view(size=(2, 2), channels=1, crop_scale=(1.0, 1.0), flip=flip)
    views = [view({"image": file.getvalue()}, rng)["image"] for _ in range(4000)]
    flipped = np.mean([x[0, 0, 0] < x[0, 1, 0] for x in views])
    assert abs(flipped - share) <= 5 * (share * (1 - share) / 4000) ** 0.5


def test_evaluation_is_bicubic_by_default():
    """As in BEiT's linear probe, unless another is asked for."""

    def first(**settings):
        return next(emoji(crop_fraction=0.9, **settings).evaluation_batches(4))["image"]

    assert (first(interpolation="bilinear") == first()).all()
    assert (first(evaluation_interpolation="bilinear") != first()).any()


@pytest.mark.parametrize("labeled", [True, False])
def test_labels_out_of_range_end_training_that_needs_them(labeled, monkeypatch):
    sources = data.open_sources
    fewer = lambda *given, **how: [x._replace(num_labels=5) for x in sources(*given, **how)]  # noqa: E731
    monkeypatch.setattr(data, "open_sources", fewer)
    batches = emoji(labeled=labeled).training_batches(64, seed=0, start=0, stop=1)
    if not labeled:
        next(batches)
        return
    with pytest.raises(UserError, match=r"an image of train has the label 8, outside 0 to 4"):
        next(batches)


def test_worker_processes_make_the_same_stream():
    assert digests(stream(0, 5, workers=2)) == digests(stream(0, 5))


def test_reading_needs_no_tensorflow():
    next(emoji().training_batches(2, seed=0, start=0, stop=1))
    assert "tensorflow" not in sys.modules


# --- Data sets that TFDS prepared. ---


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Eight JPEGs under a name of TFDS or one of the user's; written without TensorFlow."""

    VERSION = tfds.core.Version("5.1.0")
    labeled = True

    def _info(self):
        features = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
        if self.labeled:
            features["label"] = tfds.features.ClassLabel(num_classes=1000)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for i in range(8):
            jpeg = io.BytesIO(png(60 + i, 50, seed=i))
            example = {"image": jpeg, "file_name": f"{split}_{i}"}
            yield i, example | ({"label": i} if self.labeled else {})


def prepare(name, labeled, folder):
    settings = dict(name=name, labeled=labeled, VERSION=Builder.VERSION)
    with tfds.core.registered.skip_registration():  # reading finds TFDS's own, or none
        builder = type(name, (Builder,), settings)
    builder(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.mark.parametrize(("name", "labeled"), [("imagenet2012", True), ("my_own_images", False)])
def test_any_prepared_data_set_is_read_by_its_name(name, labeled, tmp_path):
    prepare(name, labeled, tmp_path)
    source = data.make(name=name, size=32, data_dir=str(tmp_path))
    assert (source.examples, source.num_labels) == (8, 1000 if labeled else 0)
    assert source.fingerprint["version"] == "5.1.0"
    batch = next(source.training_batches(8, seed=0, start=0, stop=1))
    assert ("label" in batch) == labeled
    if labeled:
        assert sorted(batch["label"]) == list(range(8))


def test_a_set_in_another_file_format_is_refused(tmp_path):
    prepare("imagenet2012", True, tmp_path)
    info = tmp_path / "imagenet2012" / "5.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="in a file format without random access"):
        data.make(name="imagenet2012", size=32, data_dir=str(tmp_path))


def test_a_set_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"'imagenet2012' is not prepared in .*--config.data.data_dir"
    ):
        data.make(name="imagenet2012", size=32, data_dir=str(tmp_path))


# --- Transforms. ---


def image_fields(size, *, tokenizer_size=0, channels=3):
    declared = dict(size=size, tokenizer_size=tokenizer_size, channels=channels, dtype="uint8")
    return fields_of(**declared, interpolation="bicubic", labeled=False)


def training_view(size=(20, 24), tokenizer_size=0, channels=3, **settings):
    fields = image_fields(size, tokenizer_size=tokenizer_size, channels=channels)
    return TrainingView.configured(fields, settings)


def evaluation_view(size, channels=3, crop_fraction=1.0):
    fields = image_fields(size, channels=channels)
    return EvaluationView.configured(fields, dict(crop_fraction=crop_fraction))


class Fixed:
    """A generator of given numbers."""

    def __init__(self, *values):
        self.values = iter(values)

    def __getattr__(self, name):
        return lambda *args: next(self.values)


@pytest.mark.parametrize("flip", [True, False])
def test_a_training_view_equals_pil(flip):
    view = training_view(size=(20, 24))
    rng = Fixed(0.25, 0.0, 7, 3, 0.3 if flip else 0.7)  # area, log aspect, left, top, flip
    ours = view({"image": png()}, rng)["image"]
    side = round((40 * 30 * 0.25) ** 0.5)
    theirs = Image.open(io.BytesIO(png())).crop((7, 3, 7 + side, 3 + side))
    theirs = np.asarray(theirs.resize((24, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(ours, theirs[:, ::-1] if flip else theirs)


def test_the_tokenizer_gets_the_same_crop_and_colors():
    """BEiT's two views: jitter of the whole image, one crop, bicubic and Lanczos, one flip."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = (0.7, 1.3, 0.8)
    rng = Fixed((2, 0, 1), *factors, 0.5, 0.0, 7, 3, 0.3)
    view = training_view(size=(28, 28), tokenizer_size=(14, 14), color_jitter=0.4)
    ours = view({"image": png()}, rng)
    image = Image.open(io.BytesIO(png()))
    for i, factor in zip((2, 0, 1), factors, strict=True):
        image = kinds[i](image).enhance(factor)
    side = round((40 * 30 * 0.5) ** 0.5)
    image = image.crop((7, 3, 7 + side, 3 + side))
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # they flip before they crop
    for name, side, kind in [
        ("image", 28, Image.Resampling.BICUBIC),
        ("tokenizer_image", 14, Image.Resampling.LANCZOS),
    ]:
        theirs = np.asarray(image.resize((side, side), kind), np.int32)
        assert abs(ours[name] - theirs).mean() <= 0.2


def test_color_jitter_changes_by_up_to_its_strength():
    rng, gray = np.random.default_rng(0), Image.new("L", (1, 1), 100)  # only brightness is seen
    drawn = [color_jitter(gray, 0.4, rng).getpixel((0, 0)) for _ in range(2000)]
    assert (min(drawn), max(drawn)) == (60, 139)  # PIL cuts decimals off
    assert np.mean(drawn) == pytest.approx(100, abs=2)
    with pytest.raises(UserError, match=r"data.color_jitter needs 8-bit images"):
        color_jitter(np.zeros((8, 8, 13), np.uint16), 0.4, rng)


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_of_two_views(processes):
    sets = [
        emoji(size=(32, 64), tokenizer_size=(16, 32), process=i, processes=processes)
        for i in range(processes)
    ]
    shapes = {field.name: field.shape for field in sets[0].image_fields}
    assert shapes == {"image": (32, 64, 3), "tokenizer_image": (16, 32, 3)}
    train = joined(s.training_batches(8, seed=0, start=0, stop=2) for s in sets)
    evaluation = joined(s.evaluation_batches(8, limit=8) for s in sets)
    for batch in train + evaluation:
        for name, shape in shapes.items():
            assert batch[name].shape == (8, *shape)
        small = batch["image"].reshape(8, 16, 2, 32, 2, 3).mean((2, 4))
        assert abs(small - batch["tokenizer_image"]).mean() < 6  # the same part of the same image


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_faster_resizer_equals_pillow_up_to_single_pixels(interpolation, mode):
    pytest.importorskip("cykooz_resizer")
    with Image.open(io.BytesIO(png(16, 12))) as image:
        image = image.convert(mode).resize((350, 270), Image.Resampling.BICUBIC)  # smooth
    for size in [(224, 224), (112, 112), (300, 400)]:
        ours, pillows = (
            resize(image, size, interpolation, resizer).astype(int)
            for resizer in ("simd", "pillow")
        )
        difference = abs(ours - pillows)
        assert difference.mean() < 0.05
        assert difference.max() <= 2


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="took the width first always")
@pytest.mark.parametrize("shape", [(605, 179), (588, 417), (400, 300), (179, 605), (100, 90)])
def test_the_faster_resizer_starts_with_the_same_side_as_pillow(shape):
    """Of noise, where the other side first would differ by 0.3 in the mean."""
    pytest.importorskip("cykooz_resizer")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    ours, pillows = (
        resize(Image.fromarray(pixels), (224, 200), "bicubic", resizer).astype(int)
        for resizer in ("simd", "pillow")
    )
    assert abs(ours - pillows).mean() < 0.02


def test_a_resizer_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("mim_jax.data.transforms.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs cykooz-resizer: pip install"):
        emoji(resizer="simd")


@pytest.mark.parametrize("shape", [(20, 24), (30, 40), (70, 50)])
def test_four_channels_are_resized_independently(shape):
    """Pillow would multiply the others by the fourth, as by alpha."""
    array = np.random.default_rng(0).integers(60, 200, (30, 40, 4), np.uint8)
    array[:, ::2, 3] = 0
    seen = resize(Image.fromarray(array), shape, "bicubic")
    for c in range(4):
        theirs = Image.fromarray(array[..., c]).resize(shape[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(seen[..., c], theirs)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_of_any_type_equal_pil(dtype):
    """Channel by channel, in the array's own type; overshoots of integers are clipped."""
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    image = (rng.integers(0, 2, (30, 40, 13)) * top).astype(dtype)
    seen = resize(crop(image, (5, 2, 37, 29)), (20, 24), "bicubic")
    assert (seen.shape, seen.dtype) == ((20, 24, 13), dtype)
    for c in range(13):
        channel = image[2:29, 5:37, c].astype(np.uint8 if dtype == np.uint8 else np.float32)
        theirs = Image.fromarray(channel).resize((24, 20), Image.Resampling.BICUBIC)
        theirs = np.asarray(theirs).clip(*((0, top) if top > 1 else (-9, 9)))
        np.testing.assert_allclose(seen[..., c], theirs, rtol=0, atol=0.5 if top > 255 else 0)


def test_crops_equal_torchvision():
    """Shares of the area and aspects are spread as drawn; what cannot fit falls to the centre."""
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((500, 400), rng, (0.2, 1.0)) for _ in range(4000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 500
    assert boxes[:, 3].max() <= 400
    share, aspect = width * height / 200_000, width / height
    assert 0.19 < share.min() < 0.21
    area, shape = rng.uniform(0.2, 1, 100_000) * 200_000, np.exp(rng.uniform(-1, 1, 100_000))
    shape = shape ** np.log(4 / 3)
    fits = (area * shape < 500.5**2) & (area / shape < 400.5**2)  # what does not is drawn again
    assert share.mean() == pytest.approx(area[fits].mean() / 200_000, abs=0.01)
    assert 0.74 < aspect.min() < aspect.max() < 1.35
    assert random_crop_box((1000, 10), rng, (0.9, 1.0)) == (493, 0, 506, 10)
    assert random_crop_box((10, 1000), rng, (0.9, 1.0)) == (0, 493, 10, 506)
    assert random_crop_box((1, 1), rng, (0.2, 1.0)) == (0, 0, 1, 1)


def test_crops_for_linear_probing_are_clipped():
    """Four times as wide as the image is high: MAE's crop takes all of the height."""
    rng = Fixed(0.9, np.log(4 / 3), 11, 0)  # area, log aspect, left, top: no second try
    assert random_crop_box((60, 15), rng, (0.08, 1), clip=True) == (11, 0, 11 + 33, 15)


def test_randaugment_comes_last(monkeypatch):
    view = training_view(size=(28, 28), randaugment=(9, 0.5))
    rng, again = np.random.default_rng(1), np.random.default_rng(1)
    ours = view({"image": png()}, rng)["image"]
    plain = training_view(size=(28, 28))({"image": png()}, again)["image"]
    theirs = rand_augment(Image.fromarray(plain), 9, 0.5, (124, 116, 104), again)
    np.testing.assert_array_equal(ours, np.asarray(theirs))
    assert (ours != plain).any()
    gray = training_view(channels=1, randaugment=(9, 0.5), fill=(120,))
    assert gray({"image": png()}, rng)["image"].shape == (20, 24, 1)
    with pytest.raises(UserError, match=r"there are 3 channels and data.fill = \(124,\)"):
        emoji(randaugment=(9, 0.5), fill=(124,))
    with pytest.raises(UserError, match="cannot be used together with tokenizer_image"):
        emoji(randaugment=(9, 0.5), tokenizer_size=16)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (32, 32), (500, 375)])
def test_an_evaluation_view_equals_torchvision(width, height):
    encoded = png(width, height)
    ours = evaluation_view((28, 28), crop_fraction=0.875)({"image": encoded})["image"]
    image = Image.open(io.BytesIO(encoded))
    long = int(32 * max(width, height) / min(width, height))  # the short side becomes 28 / 0.875
    image = image.resize((long, 32) if width >= height else (32, long), Image.Resampling.BICUBIC)
    left, top = round((image.width - 28) / 2), round((image.height - 28) / 2)
    theirs = image.crop((left, top, left + 28, top + 28))
    np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("excess", range(17))
def test_the_corner_of_the_evaluation_crop_is_rounded_to_even(excess):
    """As in torchvision's center crop, which uses Python's round: 0.5 becomes 0, 1.5 becomes 2."""
    pixels = np.arange(28 * (28 + excess), dtype=np.uint16).reshape(28, -1)
    file = io.BytesIO()
    np.save(file, pixels)
    declared = dict(size=28, tokenizer_size=0, channels=1, dtype="uint16", labeled=False)
    fields = fields_of(**declared, interpolation="bicubic")
    view = EvaluationView.configured(fields, dict(crop_fraction=1.0))
    corner = (0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8, 8)[excess]
    ours = view({"image": file.getvalue()})["image"][..., 0]
    np.testing.assert_array_equal(ours, pixels[:, corner : corner + 28])


def test_sides_of_evaluation_views_are_truncated():
    """As in torchvision's Resize: 224 / 0.9 = 248.9 gives 248, not 249."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 431, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    ours = evaluation_view((224, 224), crop_fraction=0.9)({"image": file.getvalue()})["image"]
    resized = image.resize((int(248 * 431 / 300), 248), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    np.testing.assert_array_equal(ours, np.asarray(resized.crop((left, 12, left + 224, 236))))


def test_an_evaluation_view_that_is_not_square():
    view = evaluation_view((16, 48))({"image": png(60, 60)})["image"]
    assert view.shape == (16, 48, 3)
    assert view.std() > 10


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1"])
def test_every_mode_is_converted_to_the_channels(mode):
    for channels in (1, 3, 4) if mode in ("RGBA", "LA") else (1, 3):
        view = evaluation_view((8, 8), channels)
        image = view({"image": png(mode=mode)})
        assert image["image"].shape == (8, 8, channels)
    assert decode(png(mode=mode), 3).mode == "RGB"
