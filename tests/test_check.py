"""The preflight as a user types it: what it says of good and of bad runs, and its exit codes."""

import collections
import json
import shlex
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from mim_jax import check, schema
from mim_jax.main import main

TINY = [
    "--config=configs/mae_emoji.py",
    *(f"--config.model.{key}" for key in ("size=", "width=32", "depth=1", "heads=2", "patch=16")),
    *(f"--config.objective.decoder_{key}" for key in ("width=16", "depth=1", "heads=2")),
    "--config.batch_size=8",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images of a run, from 30 to 69 pixels wide, two of them cut off, and a text."""
    root = tmp_path_factory.mktemp("images")
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (50, 30 + i, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.jpg")
    for i in (3, 20):
        path = root / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[:800])
    (root / "notes.txt").write_text("no image")
    return root


def test_a_run_that_would_start(tmp_path, capsys):
    assert check.main([*TINY, f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    for line in (
        "patches = 64 / 16 x 64 / 16 = 16, 12 of 16 patches are hidden and 4 visible "
        "(mask_ratio = 0.75)",
        "lr = base_lr x batch / 256 = 0.006 x 8 / 256 = 0.0001875",
        "1,340, of which 1,340 were decoded; 0 are bad",
        "height x width: 64 x 64 to 64 x 64",
        "modes: RGB 100.0%",
        "9 labels, 9 of them found; the most frequent on 19.8% of the images, the rarest on 5.1%",
        "of 8 images (the run has 8)",
        "none: all of them learn",
    ):
        assert line in said
    assert said.endswith("\nthe run would start\n")
    assert np.asarray(Image.open(tmp_path / "check.png")).std() > 10
    assert [p.name for p in tmp_path.iterdir()] == ["check.png"]  # no run has begun


@pytest.mark.parametrize(("most", "code"), [(0.04, 1), (0.2, 0)])
def test_bad_images_are_reported_by_name(folder, tmp_path, capsys, most, code):
    bad = f"--config.data.max_bad_fraction={most}"
    data = [f"--config.data.name=folder:{folder}", "--config.data.split=all", bad]
    assert check.main([*TINY, *data, "--all", f"--workdir={tmp_path}"]) == code
    said = capsys.readouterr().out
    for line in ("notes.txt: not an image", "3.jpg: ", "20.jpg: ", "40, of which 40 were decoded"):
        assert line in said
    assert "50 x 30 to 50 x 69" in said
    assert "are smaller than 64 x 64: enlarged" in said
    assert ("2 of 40 images of all cannot be used" in said) == (code == 1)


def test_a_run_that_does_not_fit_in_memory_would_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "free_memory", lambda: 1000)
    assert check.main([*TINY, f"--workdir={tmp_path}"]) == 1
    assert "of memory; 0.00 GiB are free" in capsys.readouterr().out
    disk = collections.namedtuple("disk", "free")
    size = 1_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(3 * size))
    assert check.check_disk(size, 2, str(tmp_path)) == []
    assert "no space for 4 checkpoints" in check.check_disk(size, 3, str(tmp_path))[0]


def test_user_errors_exit_with_code_2_and_one_sentence(tmp_path, capsys):
    assert check.main([*TINY, "--config.data.size=100", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "100 x 100 pixels cannot be cut" in error
    assert error.count("\n") == 1


def test_a_folder_of_another_run_is_refused(tmp_path, capsys):
    config = schema.load("configs/mae_emoji.py", []).to_dict()
    run = json.dumps(dict(config=config, trajectory={"data set's name": "folder"}))
    (tmp_path / "config.json").write_text(run)
    assert check.main([*TINY, f"--workdir={tmp_path}"]) == 0  # it never saved: nothing goes on
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    assert check.main([*TINY, f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "holds a run with other settings" in error
    option = shlex.split(error[error.index("the change: ") + len("the change: ") :])[0]
    assert "data set's name" in option.removeprefix("--change=").split(",")
    assert (tmp_path / "config.json").read_text() == run


def test_the_step_is_traced_at_full_size(tmp_path, capsys):
    """A mixup_group that does not divide the run's batch, though it may the few images tried."""
    config = ["--config=configs/emoji_scratch.py", "--config.batch_size=32"]
    group = ["--config.objective.mixup_group=24", f"--workdir={tmp_path}"]
    assert check.main([*config, *group]) == 2
    assert "mixup_group = 24 does not divide the" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["emoji_scratch", "emoji_linear"])
def test_a_reduced_batch_has_groups_that_fit(name, tmp_path, capsys, monkeypatch):
    """Of mixup, and of a linear probe's normalisation: its encoder, too, takes time."""
    config = [f"--config=configs/{name}.py", "--config.init_from.encoder=", *TINY[1:6]]
    monkeypatch.setattr(check, "CPU_LIMIT", 1e5)
    assert check.main([*config, "--config.batch_size=256", f"--workdir={tmp_path}"]) == 0
    assert "of 16 images (the run has 256)" in capsys.readouterr().out  # two on each of 8 devices


def test_parameters_without_a_gradient_are_listed():
    optimizer = optax.chain(check.watch(), optax.sgd(1.0))
    params = {"idle": jnp.ones(3), "late": jnp.ones(3), "busy": jnp.ones(3)}
    zero, grads = jnp.zeros(3), jnp.array([0.0, 1.0, 0.0])
    state = optimizer.init(params)
    _, state = optimizer.update({"idle": zero, "late": zero, "busy": grads}, state)
    updates, state = optimizer.update({"idle": zero, "late": grads, "busy": zero}, state)
    assert state[0] == {"idle": False, "late": True, "busy": True}
    np.testing.assert_array_equal(updates["late"], -grads)


def test_a_reduced_batch_keeps_the_schedule(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "CPU_LIMIT", 1e5)
    long = ["--config.batch_size=256", "--config.steps=100", "--config.optimizer.warmup_steps=0"]
    long += ["--config.optimizer.warmup_epochs=2", f"--workdir={tmp_path}"]
    assert check.main([*TINY, *long]) == 0
    assert "100, including 10 of warm-up" in capsys.readouterr().out


def test_the_source_of_a_run_may_be_deleted(tmp_path, capsys):
    """It is read once, before the first step; later the run's own checkpoints are used."""
    source, short = tmp_path / "source", ["--config.steps=2", "--config.pictures.count=0"]
    short += ["--config.probe.images=0", "--config.evaluate.limit=8"]
    assert main([*TINY, *short, f"--workdir={source}"]) == 0
    run = ["--config=configs/emoji_finetune.py", *TINY[1:6], *short, "--config.batch_size=16"]
    run += ["--config.objective.mixup_group=2", f"--config.init_from.encoder={source}"]
    run += [f"--workdir={tmp_path / 'run'}"]
    assert main(run) == 0
    shutil.rmtree(source)
    capsys.readouterr()
    assert check.main(run) == 0
    shutil.rmtree(tmp_path / "run")
    assert check.main(run) == 2
    assert "source is not a run directory" in capsys.readouterr().err


def test_a_zero_head_does_not_hide_gradients_of_the_encoder(tmp_path, capsys):
    """The encoder has a gradient only after the head has moved, at the first rate above 0."""
    run = [*TINY[1:6], "--config=configs/emoji_scratch.py", "--config.objective.head_std=0"]
    small = ["--config.batch_size=16", "--config.objective.mixup_group=2"]
    assert check.main([*run, *small, f"--workdir={tmp_path}"]) == 0
    assert "none: all of them learn" in capsys.readouterr().out


def test_values_that_do_not_match_mean_and_std(tmp_path, capsys):
    """Floats in 0 to 255: check and train report the range and refuse the images."""
    for i in range(24):
        array = np.random.default_rng(i).uniform(0, 255, (32, 32, 3)).astype(np.float32)
        (tmp_path / "set").mkdir(exist_ok=True)
        np.save(tmp_path / "set" / f"{i}.npy", array)
    arguments = ["--config=configs/mae_emoji.py", f"--config.data.name=folder:{tmp_path / 'set'}"]
    arguments += ["--config.batch_size=8", "--config.data.size=32", "--config.model.patch=16"]
    assert check.main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 1
    printed = capsys.readouterr().out
    assert "float32 values from 0" in printed
    assert "do not fit the images" in printed
    assert main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "do not fit the images" in capsys.readouterr().err
