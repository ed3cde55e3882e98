"""Pictures of checkpoints of every kind, on images that are not part of a data set."""

import json

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, attend, cli, main, pictures
from mim_jax.convert import files
from mim_jax.models.patches import patchify
from mim_jax.objectives import image_encoder
from tests.images import pixels

NAMES = ("mae_base", "beit_base", "dvae", "mae_base_finetune", "ade20k_beit_base")
SHORT = ["--config.steps=3", "--config.evaluate.limit=0", "--config.pictures.count=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns a folder with a tiny run of each of NAMES."""
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        config = [f"--config=configs/{name}.py", f"--workdir={folder / name}"]
        assert main.main([*config, "--smoke", *SHORT]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Returns three image files: in color, gray, and of another shape."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{name}.png" for name in ("color", "gray", "wide")]
    Image.fromarray(pixels(0, 70, 70)).save(paths[0])
    Image.fromarray(pixels(1, 80, 70)[..., 0]).save(paths[1])
    Image.fromarray(pixels(2, 64, 200)).save(paths[2])
    return paths


def hidden_patches(columns, patch):
    """Returns which patches (b, n) differ between the masked and the original images."""
    masked, original = (np.asarray(patchify(columns[k], patch)) for k in ("masked", "original"))
    return (np.abs(masked - original) > 1e-5).any(-1)


def test_reconstructions_of_a_run(runs, images):
    columns = pictures.reconstruct(runs / "mae_base", images)
    assert list(columns) == ["masked", "painted, true mean and variance", "original"]
    assert columns["original"].shape == (3, 64, 64, 3)
    crop = np.asarray(Image.open(images[2]).crop((68, 0, 132, 64))) / 255
    np.testing.assert_allclose(columns["original"][2], crop, atol=1e-5)
    hidden = hidden_patches(columns, (16, 16))
    np.testing.assert_array_equal(hidden.sum(1), 12)  # three quarters of 16
    painted = np.asarray(patchify(columns["painted, true mean and variance"], (16, 16)))
    original = np.asarray(patchify(columns["original"], (16, 16)))
    same = np.isclose(painted, original, atol=1e-5).all(-1)
    np.testing.assert_array_equal(same, ~hidden)


def test_options_of_a_reconstruction(runs, images):
    def hidden(**options):
        columns = pictures.reconstruct(runs / "mae_base", images, **options)
        return hidden_patches(columns, (16, 16))

    np.testing.assert_array_equal(hidden(mask_ratio=0.5).sum(1), 8)
    np.testing.assert_array_equal(hidden(seed=1), hidden(seed=1))
    assert (hidden(seed=1) != hidden(seed=2)).any()
    changed = hidden(overrides=["objective.sampling=grid"])
    assert changed.reshape(3, 4, 4)[:, ::2, ::2].sum() == 0
    with pytest.raises(UserError, match=r"mask_ratio = 1\.5 must be at least 0"):
        hidden(mask_ratio=1.5)


@pytest.mark.parametrize("to", ["hf", "mim_jax", "file"])
def test_converted_weights_are_drawn_like_their_run(to, runs, images, tmp_path):
    run = runs / "mae_base"
    params, network, _ = files.load_weights(run)
    path = tmp_path / ("mae.safetensors" if to == "file" else to)
    files.save_weights(path, params, network, "mae" if to == "file" else to)
    expected = pictures.reconstruct(run, images, seed=3)
    ours = pictures.reconstruct(path, images, seed=3)
    assert ours.keys() == expected.keys()
    for caption, x in ours.items():
        np.testing.assert_allclose(x, expected[caption], atol=1e-5)


def test_predicted_tokens_are_decoded(runs, images, tmp_path):
    columns = pictures.reconstruct(runs / "beit_base", images[:1], mask_ratio=0.25)
    assert "decoded from predicted tokens" in columns
    assert hidden_patches(columns, (16, 16)).sum() <= 4
    params, network, _ = files.load_weights(runs / "beit_base")
    files.save_weights(tmp_path / "beit", params, network, "mim_jax")
    with pytest.raises(UserError, match="does not hold its tokenizer: set --tokenizer=CKPT"):
        pictures.reconstruct(tmp_path / "beit", images)
    with pytest.raises(UserError, match="holds no dVAE"):
        pictures.reconstruct(tmp_path / "beit", images, tokenizer=runs / "mae_base")
    again = pictures.reconstruct(tmp_path / "beit", images, tokenizer=runs / "dvae")
    assert again["decoded from its tokens"].shape[0] == 3


@pytest.mark.parametrize("name", ["dvae", "mae_base_finetune"])
def test_what_cannot_be_reconstructed(name, runs, images):
    with pytest.raises(UserError, match="does not predict hidden patches"):
        pictures.reconstruct(runs / name, images)


def test_tokens(runs, images):
    columns = pictures.tokenize(runs / "dvae", images)
    colors = columns["its tokens, one color each"]
    assert list(columns) == ["original", "its tokens, one color each", "from its tokens"]
    side = colors.shape[1] // 8
    cells = colors.reshape(3, side, 8, side, 8, 3)
    assert (cells == cells[:, :, :1, :, :1]).all()
    larger = pictures.tokenize(runs / "dvae", images[:1], size=100)
    assert larger["from its tokens"].shape == (1, 96, 96, 3)
    assert pictures.tokenize(runs / "beit_base", images).keys() == columns.keys()
    with pytest.raises(UserError, match="holds no tokenizer"):
        pictures.tokenize(runs / "mae_base", images)


def test_attention_of_a_run(runs, images):
    columns = pictures.attend(runs / "mae_base", images[:2], queries=[(0, 1), (3, 2)], size=64)
    assert list(columns) == ["image, the query framed", "average over heads", "head 0", "head 1"]
    assert {x.shape for x in columns.values()} == {(6, 32, 32, 3)}
    params, network, _ = files.load_weights(runs / "mae_base")
    statistics = {name: network.metadata[name] for name in ("mean", "std")}
    seen = []

    class Spy:
        depth = network.encoder.depth

        def apply(self, variables, images, layers):
            seen.append(images)
            return [images]

    image_encoder(Spy(), **statistics)({}, np.asarray(Image.open(images[0]).resize((64, 64)))[None])
    maps = attend.attention_maps(network.encoder, params["encoder"], seen[0])
    rows = attend.rows_of(np.asarray(maps), (4, 4), (0, 1))
    one = pictures.attend(runs / "mae_base", images[:1], queries=[(0, 1)], size=64, head=1)
    assert one["head 1"].shape == (2, 64, 64, 3)
    brightest = np.unravel_index(rows[0, 1].argmax(), (4, 4))
    drawn = one["head 1"][1].sum(-1)[8::16, 8::16]
    assert np.unravel_index(drawn.argmax(), (4, 4)) == brightest


def test_attention_at_another_size(runs, images):
    for name in ("mae_base", "beit_base", "mae_base_finetune"):
        columns = pictures.attend(runs / name, images[:1], size=100, head="average")
        assert {x.shape for x in columns.values()} == {(1, 96, 96, 3)}
    with pytest.raises(UserError, match="no head 2: the encoder has 2 heads"):
        pictures.attend(runs / "mae_base", images, head=2)
    with pytest.raises(UserError, match="no layer 5"):
        pictures.attend(runs / "mae_base", images, layer=5)
    with pytest.raises(UserError, match="dVAE, which has no ViT encoder"):
        pictures.attend(runs / "dvae", images)


def test_the_command(runs, images, tmp_path, capsys):
    to = tmp_path / "new" / "a.png"
    run = str(runs / "mae_base")
    command = ["pictures", "reconstruct", run, *map(str, images), f"--to={to}", "--seed=2"]
    assert cli.main([*command, "--config.objective.sampling=grid"]) == 0
    assert Image.open(to).size[1] > 3 * 128
    assert cli.main(["pictures", "attend", run, str(images[0]), f"--to={to}", "--query=0,30"]) == 2
    assert "--query=0,30 is outside the grid of 30 x 30" in capsys.readouterr().err
    for text in ("no such file", "not an image"):
        path = tmp_path / f"{text}.png"
        if text.startswith("not"):
            path.write_text(text)
        assert cli.main(["pictures", "attend", run, str(path), f"--to={to}"]) == 2
        assert f"cannot read the image {path}" in capsys.readouterr().err
    for option, words in {
        "--mask-ratio=0.5": "--mask-ratio does not apply to attend",
        "--query=3": "3 must be ROW,COLUMN",
        "--head=first": "first must be a number from 0, or average",
    }.items():
        with pytest.raises(SystemExit):
            cli.main(["pictures", "attend", run, str(images[0]), option])
        assert words in capsys.readouterr().err


def test_arrays_of_a_notebook(runs):
    array, gray = pixels(0, 64, 64), Image.fromarray(pixels(1, 64, 64)).convert("L")
    columns = pictures.reconstruct(runs / "mae_base", [array])
    np.testing.assert_allclose(columns["original"][0], array / 255, atol=1e-5)
    columns = pictures.reconstruct(runs / "mae_base", [gray])
    np.testing.assert_allclose(columns["original"][0, ..., 2], np.asarray(gray) / 255, atol=1e-5)


def test_classes_of_pixels(runs, images):
    columns = pictures.segment(runs / "ade20k_beit_base", [images[0], images[2]])
    assert list(columns) == ["image", "its classes", "largest classes"]
    assert len({x.shape for x in columns.values()}) == 1
    wide = columns["image"][1]
    assert wide.shape[1] >= 3 * 64  # the short side has the size of training
    record = json.loads((runs / "ade20k_beit_base" / "config.json").read_text())
    colors = np.array([*record["data"]["class_colors"], (255, 255, 255)])
    predicted = (columns["its classes"][1] * 255).round().reshape(-1, 1, 3)
    assert (predicted == colors).all(-1).any(-1).all()
    assert columns["largest classes"][1].std() > 0
    with pytest.raises(UserError, match="does not classify pixels"):
        pictures.segment(runs / "mae_base", images)
