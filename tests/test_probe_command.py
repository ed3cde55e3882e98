"""`mim-jax probe`: the features of each block of an encoder."""

import jax
import numpy as np
import pytest

import mim_jax
from mim_jax import data, main, probe, probe_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--config=mae_emoji", "--smoke", f"--workdir={folder}", "--config.steps=3"]
    assert main.main([*arguments, "--config.pictures.count=0"]) == 0
    return folder


def rows_of(text):
    lines = text.splitlines()
    return [line.split() for line in lines if line.strip()[:1].isdigit() and "%" in line]


def test_the_last_layer_without_its_norm_is_the_encoders(run, capsys):
    """The table's last row, from features of `mim_jax.load`, which differ by a final norm alone."""
    assert probe_command.main([str(run), "--data=emoji", "--images=60", "--batch-size=16"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1", "2"]

    encoder, params = mim_jax.load(run)
    dataset = data.make(name="emoji", size=32)
    features, labels = {}, {}
    for of_training in (True, False):
        batch = next(dataset.evaluation_batches(60, limit=60, of_training=of_training))
        tokens = jax.jit(encoder)(params, batch["image"])
        features[of_training] = np.asarray(tokens[:, 1:].mean(1))
        labels[of_training] = batch["label"]
    predicted = probe.neighbors(features[True], labels[True], features[False])
    accuracy = (predicted == labels[False]).mean()
    assert float(rows[-1][2].rstrip("%")) == pytest.approx(100 * accuracy, abs=7)
    assert 1 < float(rows[-1][1]) < 60


def test_mistakes(run, tmp_path, capsys):
    assert probe_command.main([str(run), "--data=nothing"]) == 2
    assert "there is no data set 'nothing'" in capsys.readouterr().err
    assert probe_command.main([str(tmp_path / "x.pth"), "--data=emoji"]) == 2
    assert "x.pth" in capsys.readouterr().err
