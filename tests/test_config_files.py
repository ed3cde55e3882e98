"""Config files: found by path or name, imported with their neighbors, described."""

import shutil
from pathlib import Path

import pytest

from mim_jax import UserError, config_files, schema

EMOJI = Path("configs/mae_emoji.py")
BODY = "from . import small\ndef get_config():\n    c = small.get_config()\n    {}\n    return c\n"


@pytest.fixture
def mine(tmp_path):
    """Loads a config with a line of code of its own, in a folder with a neighbor."""
    folder = tmp_path / "configs"
    folder.mkdir()
    shutil.copy(EMOJI, folder / "small.py")

    def load(line):
        (folder / "mine.py").write_text(BODY.format(line))
        return schema.load(str(folder / "mine.py"))

    return load


def test_neighbors_are_imported_anew(mine, tmp_path):
    assert mine("c.model.width = 96").model.width == 96
    neighbor = tmp_path / "configs" / "small.py"
    neighbor.write_text(neighbor.read_text().replace("width=", "width=32 + 0 *"))
    assert mine("pass").model.width == 32


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("c.model.widht = 96", "no key model.widht: did you mean model.width?"),
        ("c.optimizer.rate = 1.0", "no key optimizer.rate"),
        ("c.optimizer.name = 'adam'", "did you mean adamw?"),
        ("del c.data.size", "the config must set data.size"),
        ("del c.batch_size", "the config must set batch_size"),
        ("del c.objective", "the config has no block 'objective'"),
        ("del c.objective.name", "the config must set objective.name"),
        ("c.model = dict(width='wide')", "model.width = 'wide' must be int"),
        ("del c.model\n    c.model = 3", "model is a block"),
    ],
)
def test_mistakes_are_named_with_the_file(mine, tmp_path, line, sentence):
    with pytest.raises(UserError) as error:
        mine(line)
    assert f"{tmp_path}/configs/mine.py: " in str(error.value)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import nothing_such", "line 1: ModuleNotFoundError: No module named 'nothing_such'"),
        ("def get_config():\n    return name_", "line 2: NameError: name 'name_' is not defined"),
        ("# A README\nwith words", "line 2: SyntaxError"),
        ("", "needs a function get_config()"),
        ("def get_config(): return 3", "needs a function get_config() that returns a ConfigDict"),
    ],
)
def test_files_that_are_no_configs(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        schema.load(str(path))
    assert str(path) in str(error.value)
    assert sentence in str(error.value)


def test_names_find_the_configs_of_the_package(tmp_path, monkeypatch):
    expected = schema.load("configs/mae_base.py")
    monkeypatch.chdir(tmp_path)
    assert schema.load("mae_base") == expected
    Path("mae_base").write_text("def get_config(): return 3")  # a path takes precedence
    with pytest.raises(UserError, match="returns a ConfigDict"):
        schema.load("mae_base")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("mae_emojy", "did you mean mae_emoji?"),
        ("configs/mae_emojy.py", "did you mean configs/mae_emoji.py?"),
        ("nowhere/mae_emoji.py", "did you mean mae_emoji?"),
        ("qqq", "`mim-jax configs` lists"),
    ],
)
def test_similar_names_are_suggested(path, hint):
    with pytest.raises(UserError) as error:
        config_files.find(path)
    assert f"there is no config or run {path}: {hint}" in str(error.value)


def test_every_config_has_a_summary():
    for name in config_files.names():
        summary = config_files.summary(config_files.folder() / f"{name}.py")
        assert summary.endswith("."), name
        assert len(summary) < 120, name
