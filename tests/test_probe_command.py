"""`mim-jax probe`: the features of each block of an encoder."""

import numpy as np
import pytest
from PIL import Image

from mim_jax import data, main, probe, probe_command
from mim_jax.convert import files
from mim_jax.embed import statistics_of
from mim_jax.normalize import normalize


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--config=mae_emoji", "--smoke", f"--workdir={folder}", "--config.steps=3"]
    assert main.main([*arguments, "--config.pictures.count=0"]) == 0
    return folder


def rows_of(text):
    lines = text.splitlines()
    return [line.split() for line in lines if line.strip()[:1].isdigit() and "%" in line]


def test_each_block_is_probed(run, capsys):
    """The table, from the outputs of the blocks that Flax captures."""
    assert probe_command.main([str(run), "--data=emoji", "--images=60", "--batch-size=16"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1", "2"]

    params, network, _ = files.load_weights(run)
    dataset = data.make(name="emoji", size=32)
    features, labels = {}, {}
    for of_training in (True, False):
        batch = next(dataset.evaluation_batches(60, limit=60, of_training=of_training))
        _, state = network.encoder.apply(
            {"params": params["encoder"]},
            normalize(batch["image"], **statistics_of(run, network.metadata)),
            capture_intermediates=lambda module, _: (module.name or "").startswith("block_"),
            mutable=["intermediates"],
        )
        outputs = [state["intermediates"][f"block_{i}"]["__call__"][0] for i in range(2)]
        features[of_training] = [np.asarray(tokens[:, 1:].mean(1)) for tokens in outputs]
        labels[of_training] = batch["label"]
    for row, train, test in zip(rows, features[True], features[False], strict=True):
        assert float(row[1]) == pytest.approx(probe.rank(train), abs=0.06)
        for text, predict in zip(row[2:], (probe.neighbors, probe.linear), strict=True):
            accuracy = (predict(train, labels[True], test) == labels[False]).mean()
            assert float(text.rstrip("%")) == pytest.approx(100 * accuracy, abs=0.006)


def test_without_labels_the_message_names_the_option(run, tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for value in range(4):
                Image.new("RGB", (32, 32), (60 * value, 9, 9)).save(folder / f"{value}.png")
    arguments = [str(run), f"--data=folder:{tmp_path}", "--batch-size=8"]
    assert probe_command.main(arguments) == 0
    assert "only the rank is computed: pass --labels=folder" in capsys.readouterr().err
    assert probe_command.main([*arguments, "--labels=folder"]) == 0
    captured = capsys.readouterr()
    assert "only the rank" not in captured.err
    assert len(rows_of(captured.out)) == 2


def test_mistakes(run, tmp_path, capsys):
    assert probe_command.main([str(run), "--data=nothing"]) == 2
    assert "there is no data set 'nothing'" in capsys.readouterr().err
    assert probe_command.main([str(tmp_path / "x.pth"), "--data=emoji"]) == 2
    assert "x.pth" in capsys.readouterr().err
