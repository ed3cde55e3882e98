"""The rooms of the house: who imports whom, how long the newcomer's path is, how all is named."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "mim_jax").rglob("*.py"))
MAY_IMPORT = {  # of ours; all may import UserError from mim_jax
    "models": {"models"},
    "masking": set(),
    "augment": set(),
    "normalize": set(),
    "targets": {"models", "normalize"},
    "sharding": set(),
    "optim": set(),
    "log": set(),
    "pictures": set(),
    "objectives": {"augment", "models", "masking", "normalize", "objectives", "targets"},
    "train": {"objectives", "sharding"},
    "checkpoint": {"train"},
    "transfer": {"checkpoint", "models", "train"},
    "data": {"data"},
    "convert": {"checkpoint", "command", "convert", "masking", "models", "objectives", "train"},
    "recipe": {"data", "models", "objectives", "optim", "sharding"},
    "command": {"checkpoint", "recipe", "sharding", "train", "transfer"},
    "inspect": {"command", "convert"},
    "main": {"checkpoint", "command", "log", "pictures", "probe", "recipe", "sharding", "train"},
    "probe": {"data", "sharding", "train"},
    "tokenize": {
        *("checkpoint", "command", "models", "normalize", "recipe", "sharding", "train"),
        "transfer",
    },
    "check": {"command", "data", "normalize", "pictures", "recipe", "sharding", "train"},
    "evaluate": {"checkpoint", "command", "recipe", "train", "transfer"},
    "embed": {
        *("command", "convert", "data", "normalize", "objectives", "recipe", "sharding"),
        "transfer",
    },
    "__init__": {"embed"},
}
NOT_IN = {  # packages that a room has nothing to do with
    "models": {"ml_collections", "optax", "grain"},
    "masking": {"ml_collections", "optax", "flax", "grain"},
    "augment": {"ml_collections", "optax", "flax", "grain"},
    "normalize": {"ml_collections", "optax", "flax", "grain"},
    "objectives": {"ml_collections", "grain"},
    "train": {"ml_collections", "grain", "flax"},
    "optim": {"ml_collections", "flax"},
    "data": {"jax", "flax", "optax", "tensorflow", "ml_collections"},
    "convert": {"ml_collections", "grain", "tensorflow"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_who_imports_whom(path):
    room = path.relative_to(ROOT / "mim_jax").parts[0].removesuffix(".py")
    names = imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("mim_jax.")}
    ours -= {"UserError", "__version__"}
    assert ours <= MAY_IMPORT[room]
    assert not {name.split(".")[0] for name in names} & NOT_IN.get(room, set())


def test_configs_import_nothing_but_configs():
    for path in (ROOT / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections", "configs"}
        assert len(path.read_text().splitlines()) <= 60


def test_the_newcomers_path_is_short():
    """README: read these three and you know the library. Make room before you make this larger."""
    path = ["train.py", "objectives/mae.py", "models/vit.py"]
    assert sum(len((ROOT / "mim_jax" / name).read_text().splitlines()) for name in path) <= 400


def test_names_and_habits():
    for path in FILES:
        assert not re.search(r"util|common|misc|helper|base|registry|types|constants", path.stem)
        text = path.read_text()
        assert not re.search(r"config\.get\(|cfg|\.pmap\(|flax\.training|import clu", text), path
        assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is"


def test_torch_stays_in_its_files():
    """Nobody needs PyTorch but to write its files and to run its models."""
    for path in FILES:
        if not path.name.startswith("torch_"):
            packages = {name.split(".")[0] for name in imports(path)}
            assert not packages & {"torch", "timm", "torchvision"}, path
