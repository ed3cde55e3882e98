"""What is done with a finished run: evaluated again, its features written, its encoder loaded."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import mim_jax
from mim_jax import UserError, embed, evaluate, main, recipe, schema
from mim_jax.convert import files
from mim_jax.convert.files import load_weights, save_weights
from mim_jax.convert.read import read
from mim_jax.models.patches import sincos2d
from mim_jax.models.resize import resize_positions

SMALL = ["--config.steps=3", "--config.evaluate.limit=0", "--config.pictures.count=0"]
SMALL += ["--config.data.evaluation_split=validation[:30]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a classifier and of a MAE."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("mae_base_finetune", "mae_base"):
        arguments = [f"--config=configs/{name}.py", "--smoke", f"--workdir={folder / name}"]
        assert main.main([*arguments, *SMALL]) == 0
    return folder


def test_a_run_is_evaluated_again(runs, tmp_path, capsys):
    run, to = runs / "mae_base_finetune", tmp_path / "found.json"
    assert evaluate.main([f"--config={run}", f"--to={to}"]) == 0
    result = json.loads(to.read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "evaluate/accuracy" in line][-1]
    for name in ("loss", "accuracy", "top5"):
        assert result[name] == pytest.approx(last[f"evaluate/{name}"], rel=1e-6)
    shares, right = np.array(result["by_class"]).T
    assert shares.sum() == pytest.approx(1)
    assert (shares * right).sum() == pytest.approx(result["accuracy"])
    said = capsys.readouterr().out
    assert "step 3, split validation[:30]" in said
    assert "class  of all  accuracy" in said


def test_evaluation_processes_a_part_of_a_batch_at_once(runs, monkeypatch, capsys):
    """As many images as a step takes at once: there may be no memory for more."""
    rows = []

    def spy(objective, state, batches, **options):
        batches = list(batches)
        rows.append([len(batch["image"]) for batch in batches])
        return measure(objective, state, batches, **options)

    measure = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", spy)
    for parts in (1, 2):
        run = f"--config={runs / 'mae_base_finetune'}"
        assert evaluate.main([run, f"--config.accumulate={parts}"]) == 0
    whole, parts = rows
    assert [whole[0] / 2] * 2 == parts[:2]
    first, second = capsys.readouterr().out.split("mae_base_finetune, step")[1:]
    assert first.split()[:20] == second.split()[:20]


def test_a_converted_classifier_is_evaluated(runs, tmp_path, capsys):
    """By a config file that says of what data, and a run that says which weights."""
    run, converted = runs / "mae_base_finetune", tmp_path / "converted"
    assert evaluate.main([f"--config={run}"]) == 0
    expected = capsys.readouterr().out.split("\n", 1)[1]
    save_weights(converted, *load_weights(run)[:2], "mim_jax")
    settings = json.loads((run / "config.json").read_text())["config"]
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({settings!r})\n"
    )
    assert evaluate.main([f"--config={converted}"]) == 2
    assert "holds converted weights and names no data" in capsys.readouterr().err
    assert evaluate.main([f"--config={config}"]) == 2
    assert "config.py is not a run: set --config.init_from.encoder=RUN" in capsys.readouterr().err
    given = [f"--config={config}", f"--config.init_from.encoder={converted}"]
    assert evaluate.main(given) == 0
    assert capsys.readouterr().out.endswith(expected)
    assert evaluate.main([*given[:1], f"--config.init_from.encoder={runs / 'mae_base'}"]) == 2
    assert "has no fc_norm/bias, which this model needs" in capsys.readouterr().err
    for source, name in (([f"--config={run}"], "a.npz"), (given, "b.npz")):
        assert embed.main([*source, f"--to={tmp_path / name}"]) == 0
    a, b = (np.load(tmp_path / name)["mean"] for name in ("a.npz", "b.npz"))
    np.testing.assert_array_equal(a, b)


def test_evaluation_needs_the_labels_of_training(runs, monkeypatch, capsys):
    make = recipe.data.make

    @functools.wraps(make)
    def of_five_labels(**settings):
        return dataclasses.replace(make(**settings), num_labels=5)

    monkeypatch.setattr(recipe.data, "make", of_five_labels)
    assert evaluate.main([f"--config={runs / 'mae_base_finetune'}"]) == 2
    assert "params/head/bias differs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mae_base_finetune", "mae_base"])
def test_features_are_of_unmasked_images(runs, name, tmp_path):
    run, to = runs / name, tmp_path / "features.npz"
    assert embed.main([f"--config={run}", f"--to={to}"]) == 0
    features = np.load(to)
    assert features["index"].tolist() == list(range(30))
    assert features["cls"].shape == features["mean"].shape == (30, 64)
    dataset = recipe.build(schema.load(str(run))).data
    batch = next(dataset.evaluation_batches(32))
    assert (features["label"] == batch["label"][:30]).all()
    encoder, params = mim_jax.load(str(run))
    tokens = np.asarray(encoder(params, batch["image"][:30]))
    assert tokens.shape == (30, 17, 64)
    np.testing.assert_allclose(features["cls"], tokens[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features["mean"], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    assert features["file_name"].tolist() == [dataset.evaluation.name_of(i) for i in range(30)]
    classes = [dataset.class_names[label] for label in features["label"]]
    assert features["class_name"].tolist() == classes
    assert "Animals & Nature" in classes
    assert ("norm" in params) == (name == "mae_base")
    if "norm" in params:  # so each token is at mean 0 and variance 1
        np.testing.assert_allclose(tokens.std(-1), 1, atol=1e-2)


def test_features_as_a_data_set(runs, tmp_path, capsys):
    run, folder = runs / "mae_base", tmp_path / "features"
    for to in (folder, tmp_path / "features.npz"):
        assert embed.main([f"--config={run}", f"--to={to}"]) == 0
    expected = np.load(tmp_path / "features.npz")
    source = tfds.builder_from_directory(folder).as_data_source("validation__30")
    assert len(source) == 30
    for i, row in enumerate(source):
        assert row.keys() == {"cls", "mean", "index", "label", "file_name", "class_name"}
        for name, value in row.items():
            value = value.decode() if isinstance(value, bytes) else value
            np.testing.assert_array_equal(value, expected[name][i])
    assert embed.main([f"--config={run}", f"--to={folder}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_encoders_of_files(runs, tmp_path, capsys):
    """What is converted is the same function, whatever it lies in."""
    safetensors = pytest.importorskip("safetensors.numpy")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    encoder, params = mim_jax.load(runs / "mae_base")
    expected = encoder(params, images)
    for to, name in (("timm", "encoder.safetensors"), ("hf", "folder"), ("mim_jax", "converted")):
        save_weights(tmp_path / name, *load_weights(runs / "mae_base")[:2], to)
        encoder, params = mim_jax.load(tmp_path / name)
        np.testing.assert_allclose(encoder(params, images), expected, rtol=1e-6, atol=1e-6)
    assert not capsys.readouterr().err
    arrays, _ = read(tmp_path / "encoder.safetensors")
    safetensors.save_file(arrays, tmp_path / "bare.safetensors")
    encoder, params = mim_jax.load(tmp_path / "bare.safetensors", heads=2, mean=(0.5,))
    assert "does not record std of images: using ImageNet's" in capsys.readouterr().err
    assert encoder(params, images).shape == expected.shape


def test_an_encoder_for_images_of_another_size(runs):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    encoder, params = mim_jax.load(runs / "mae_base")
    with pytest.raises(UserError, match=r"for images of 64 x 64, not 32 x 48: .*image_size="):
        encoder(params, images)
    encoder, params = mim_jax.load(runs / "mae_base", image_size=(32, 48))
    assert encoder(params, images).shape == (2, 1 + 2 * 3, 64)
    fixed = np.pad(sincos2d((4, 4), 64)[0], ((1, 0), (0, 0)))[None]
    expected = resize_positions(fixed, (4, 4), (2, 3))
    np.testing.assert_allclose(params["positions"], expected, atol=1e-6)


def test_files_that_are_not_images(runs):
    encoder, params = mim_jax.load(runs / "mae_base")
    for shape in ((2, 3, 64, 64), (64, 64, 3)):
        with pytest.raises(UserError, match=r"images must have the shape \(b, H, W, 3\), not"):
            encoder(params, np.zeros(shape, np.uint8))


@pytest.mark.parametrize("images", [None, {}, [None], [1], np.array(["a.png"]), iter(())])
def test_images_of_other_types(runs, images):
    encoder, params = mim_jax.load(runs / "mae_base")
    with pytest.raises(UserError, match="must be a"):
        encoder(params, images)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(heads="x"), "heads = x must be a whole number"),
        (dict(heads=-1), "heads = -1 must be a whole number"),
        (dict(heads=2.0), "heads = 2.0 must be a whole number"),
        (dict(image_size="32"), "image_size = 32 must be a whole number"),
        (dict(image_size=32.0), "image_size = 32.0 must be a whole number"),
        (dict(image_size=(32, 32, 3)), "must be one whole number, or two"),
        (dict(mean="abc"), "mean = abc must be a number"),
        (dict(mean=(None,)), "mean = None must be a number"),
        (dict(std=(0.5, 0.5)), "must have one number, or one per channel: 3"),
    ],
)
def test_arguments_of_other_types(runs, given, sentence):
    with pytest.raises(UserError, match=sentence):
        mim_jax.load(runs / "mae_base", **given)


@pytest.mark.parametrize("source", [None, 3, ["runs/mae_base"]])
def test_sources_that_are_not_paths(source):
    with pytest.raises(UserError, match="pass the path of a run"):
        mim_jax.load(source)


def test_numpy_arguments(runs):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    given = dict(image_size=np.int64(32), mean=np.full(3, 0.5), std=0.5)
    encoder, params = mim_jax.load(runs / "mae_base", **given)
    same, _ = mim_jax.load(runs / "mae_base", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    np.testing.assert_array_equal(encoder(params, images), same(params, images))


def test_one_file_and_no_file(runs, tmp_path):
    encoder, params = mim_jax.load(runs / "mae_base")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = encoder(params, pixels[None])
    for file in (tmp_path / "image.png", str(tmp_path / "image.png")):
        np.testing.assert_allclose(encoder(params, file), expected, atol=1e-6)
    with pytest.raises(UserError, match="there are no images"):
        encoder(params, [])


def test_features_of_images_of_another_size(runs, tmp_path):
    run, to = runs / "mae_base", tmp_path / "features.npz"
    assert embed.main([f"--config={run}", f"--to={to}", "--config.data.size=(32,48)"]) == 0
    dataset = recipe.build(schema.load(str(run), ["data.size=(32,48)"])).data
    images = next(dataset.evaluation_batches(32))["image"][:30]
    encoder, params = mim_jax.load(run, image_size=(32, 48))
    expected = encoder(params, images)[:, 0]
    np.testing.assert_allclose(np.load(to)["cls"], expected, rtol=1e-4, atol=1e-5)


def test_the_config_provides_what_weights_lack(runs, tmp_path, capsys):
    """As their images' mean and deviation, and how many heads there are."""
    safetensors = pytest.importorskip("safetensors.numpy")
    run, bare = runs / "mae_base", tmp_path / "bare.safetensors"
    save_weights(tmp_path / "encoder.safetensors", *load_weights(run)[:2], "timm")
    safetensors.save_file(read(tmp_path / "encoder.safetensors")[0], bare)
    settings = json.loads((run / "config.json").read_text())["config"]
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({settings!r})\n"
    )
    given = [f"--config={config}", f"--config.init_from.encoder={bare}"]
    for source, name in (([f"--config={run}"], "a.npz"), (given, "b.npz")):
        assert embed.main([*source, f"--to={tmp_path / name}"]) == 0
    assert "ImageNet" not in capsys.readouterr().err
    a, b = (np.load(tmp_path / name)["cls"] for name in ("a.npz", "b.npz"))
    np.testing.assert_array_equal(a, b)


def test_evaluating_another_model_is_refused(runs, capsys):
    """Though all arrays have its shapes."""
    run = runs / "mae_base_finetune"
    assert evaluate.main([f"--config={run}", "--config.model.heads=4"]) == 2
    assert "its model.heads is 2, this run's is 4" in capsys.readouterr().err


@pytest.mark.parametrize("command", [evaluate, embed])
def test_evaluation_on_devices_that_do_not_divide_the_batch(command, runs, tmp_path):
    path, run = tmp_path / "x.json", tmp_path / "run"
    shutil.copytree(runs / "mae_base_finetune", run)
    saved = json.loads((run / "config.json").read_text())
    saved["config"] |= dict(fsdp=16, batch_size=36, accumulate=3)
    (run / "config.json").write_text(json.dumps(saved))
    to = path if command is evaluate else tmp_path / "x.npz"
    assert command.main([f"--config={run}", f"--to={to}"]) == 0


@pytest.mark.parametrize("command", [evaluate, embed])
def test_directories_that_cannot_be_written(command, runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    to = tmp_path if command is evaluate else tmp_path / "file"
    assert command.main([f"--config={runs / 'mae_base_finetune'}", f"--to={to}"]) == 2
    assert f"error: cannot write to {to}: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [evaluate, embed])
def test_folders_that_are_not_runs(command, tmp_path, capsys):
    assert command.main([f"--config={tmp_path}", f"--to={tmp_path / 'x'}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_encoders_take_images_of_any_size_and_kind(runs, tmp_path):
    """Pillow images, files and arrays: the tokens of the same center crop."""
    encoder, params = mim_jax.load(runs / "mae_base")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    expected = encoder(params, pixels[None])
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for image in (Image.fromarray(pixels), tmp_path / "image.png", str(tmp_path / "image.png")):
        np.testing.assert_allclose(encoder(params, [image]), expected, atol=1e-6)
    np.testing.assert_allclose(encoder(params, Image.fromarray(pixels)), expected, atol=1e-6)
    np.testing.assert_allclose(encoder(params, [pixels, pixels])[1:], expected, atol=1e-6)
    wide = Image.fromarray(pixels).resize((200, 100))
    assert encoder(params, [wide, pixels]).shape == (2, *expected.shape[1:])
    with pytest.raises(UserError, match=r"must be in \[0, 1\], not 0 to 255"):
        encoder(params, np.full((1, 64, 64, 3), 255.0))
    with pytest.raises(UserError, match=r"must be in \[0, 1\], not nan to nan"):
        encoder(params, np.full((1, 64, 64, 3), np.nan))
    with pytest.raises(UserError, match=r"must be integers or floats in .*, not bool"):
        encoder(params, pixels[None] > 9)
    with pytest.raises(UserError, match="there are no images"):
        encoder(params, pixels[None][:0])
    with pytest.raises(UserError, match=r"std = \(0, 0, 0\) positive"):
        mim_jax.load(runs / "mae_base", std=(0, 0, 0))
    with pytest.raises(UserError, match=r"cannot read the image nowhere\.png: No such file"):
        encoder(params, ["nowhere.png"])


def test_models_of_the_hub_are_taken_from_its_cache(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def cached(name, local_files_only):
        assert local_files_only
        if name != "facebook/vit-mae-base":
            raise hub.errors.LocalEntryNotFoundError("not there")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", cached)
    assert files.cached("facebook/vit-mae-base") == tmp_path
    assert str(files.cached("some/deep/path")) == "some/deep/path"
    with pytest.raises(UserError, match="run `hf download facebook/nothing` first"):
        mim_jax.load("facebook/nothing")


def test_other_endings_are_refused(runs, capsys):
    with pytest.raises(SystemExit):
        embed.main([f"--config={runs / 'mae_base'}", "--to=x.pt"])
    assert ".pt files are not supported; pass an .npz file or a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mae_base", "mae_base_finetune"])
def test_an_encoder_must_have_the_arrays_of_its_config(runs, name):
    params, network, _ = load_weights(runs / name)
    encoder = params["encoder"]
    files.require_encoder("RUN", encoder, network)
    without = {name: part for name, part in encoder.items() if name != "cls_token"}
    with pytest.raises(UserError, match=r"RUN does not hold .*: encoder/cls_token is missing"):
        files.require_encoder("RUN", without, network)
    other = encoder | {"cls_token": np.zeros((1, 1, 7))}
    with pytest.raises(UserError, match=r"cls_token has the shape \(1, 1, 7\), not \(1, 1, 64\)"):
        files.require_encoder("RUN", other, network)
