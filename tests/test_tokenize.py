"""The command that writes tokens, on a run of the dVAE."""

import numpy as np
import pytest

from mim_jax import main, tokenize


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    small = ["--config.steps=3", "--config.pictures.count=0", "--config.evaluate.limit=16"]
    arguments = ["--config=configs/dvae_emoji.py", "--smoke", f"--workdir={folder}", *small]
    assert main.main(arguments) == 0
    return folder


def test_the_tokens_of_a_split(trained, tmp_path, capsys):
    to = tmp_path / "tokens.npz"
    overrides = ["--config.data.evaluation_split=train[:20]"]
    assert tokenize.main([f"--config={trained}", f"--to={to}", *overrides]) == 0
    assert "20 images of 16 tokens" in capsys.readouterr().out
    written = np.load(to)
    assert written["tokens"].shape == (20, 4, 4)
    np.testing.assert_array_equal(written["index"], np.arange(20))
    assert written["vocabulary"] == 64
    assert written["tokens"].max() < 64
    assert written["label"].shape == (20,)


def test_directories_of_other_runs(trained, tmp_path, capsys):
    for run, sentence in [
        (
            "configs/mae_emoji.py",
            "configs/mae_emoji.py did not train a tokenizer: it is a run of mae",
        ),
        ("configs/dvae_emoji.py", "is not a run: set --config.init_from.tokenizer=RUN"),
        ("nowhere", "there is no config or run nowhere"),
    ]:
        assert tokenize.main([f"--config={run}", f"--to={tmp_path / 'x.npz'}"]) == 2
        assert sentence in capsys.readouterr().err
    assert tokenize.main([f"--config={trained}", f"--to={trained}/config.json/no/x.npz"]) == 2
    assert "cannot write to" in capsys.readouterr().err
