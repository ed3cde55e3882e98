"""Import rules, the length of the reading path, and conventions of the package."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from mim_jax import config_files

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "mim_jax").rglob("*.py"))
MAY_IMPORT = {  # modules of mim_jax; all may import UserError from mim_jax itself
    "keys": set(),
    "models": {"keys", "models"},
    "masking": set(),
    "augment": set(),
    "normalize": {"keys"},
    "targets": {"models", "normalize"},
    "sharding": set(),
    "optim": {"keys"},
    "goodput": set(),
    "progress": set(),
    "log": {"goodput", "progress", "workdir"},
    "sheets": {"storage"},
    "attend": {"models"},
    "flops": set(),
    "bucket": set(),
    "storage": {"bucket"},
    "workdir": {"storage"},
    "objectives": {"augment", "keys", "models", "masking", "normalize", "objectives", "targets"},
    "conditional": set(),
    "train": {"conditional", "objectives", "sharding"},
    "checkpoint": {"bucket", "checkpoint", "storage", "train"},
    "transfer": {"checkpoint", "models", "train", "workdir"},
    "data": {"cli", "data", "keys", "progress", "storage"},
    "schema": {"config_files", "data", "keys", "models", "objectives", "optim", "workdir"},
    "recipe": {"data", "models", "objectives", "optim", "schema", "sharding"},
    "start": {
        *("checkpoint", "flops", "recipe", "schema", "sharding", "train", "transfer", "workdir"),
    },
    "probe": {"data", "sharding", "train"},
    "probe_command": {
        "cli",
        "convert",
        "data",
        "embed",
        "models",
        "normalize",
        "probe",
        "progress",
    },
    "convert": {
        *(
            "checkpoint",
            "cli",
            "convert",
            "masking",
            "models",
            "objectives",
            "schema",
            "train",
            "workdir",
        ),
    },
    "cli": {"bucket", "storage", "processes", "workdir"},
    "config_files": set(),
    "list_configs": {"cli", "config_files"},
    "list_keys": {"cli", "keys", "objectives", "optim", "schema"},
    "__main__": {"cli"},
    "inspect": {"checkpoint", "cli", "convert", "goodput", "workdir"},
    "divergence": {"storage", "train"},
    "preemption": set(),
    "processes": set(),
    "stop": {"preemption", "processes"},
    "watchdog": {"processes"},
    "training": {
        *("checkpoint", "divergence", "experiment", "flops", "goodput", "log", "objectives"),
        *("probe", "progress", "recipe", "schema", "sheets", "start", "stop", "train", "watchdog"),
        "workdir",
    },
    "replay": {
        *("checkpoint", "cli", "divergence", "objectives", "recipe", "schema", "sharding"),
        *("start", "storage", "train", "workdir"),
    },
    "experiment": {"checkpoint", "recipe", "schema", "sharding", "start", "train", "workdir"},
    "main": {
        *(
            "checkpoint",
            "cli",
            "goodput",
            "objectives",
            "probe",
            "processes",
            "recipe",
            "schema",
            "start",
            "stop",
        ),
        *("training", "watchdog", "workdir"),
    },
    "check": {
        *("checkpoint", "cli", "data", "keys", "normalize", "progress", "recipe", "schema"),
        *("sharding", "sheets", "start", "train", "workdir"),
    },
    "plan": {
        *("cli", "data", "flops", "models", "plan", "progress", "recipe", "schema"),
        *("sharding", "start"),
    },
    "evaluate": {
        *("checkpoint", "cli", "data", "progress", "recipe", "schema", "start", "train"),
        *("transfer", "workdir"),
    },
    "tokenize": {
        *("checkpoint", "cli", "normalize", "progress", "recipe", "schema", "sharding"),
        *("start", "train", "transfer", "workdir"),
    },
    "embed": {
        *(
            "cli",
            "convert",
            "data",
            "normalize",
            "objectives",
            "progress",
            "recipe",
            "schema",
            "sharding",
        ),
        *("start", "transfer", "workdir"),
    },
    "pictures": {
        *("attend", "checkpoint", "cli", "convert", "data", "embed", "models", "normalize"),
        *("objectives", "optim", "recipe", "schema", "sheets", "workdir"),
    },
    "runs": {"cli", "workdir"},
    "report": {
        *("checkpoint", "cli", "goodput", "normalize", "pictures", "recipe", "report", "runs"),
        *("schema", "sharding", "sheets", "start", "workdir"),
    },
    "__init__": {"embed", "experiment"},
}
MUST_NOT_IMPORT = {  # packages, by module
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
OBJECTIVES = {path.stem for path in (ROOT / "mim_jax" / "objectives").glob("[a-z]*.py")}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_rules(path):
    module = path.relative_to(ROOT / "mim_jax").parts[0].removesuffix(".py")
    names = imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("mim_jax.")}
    ours -= {"UserError", "__version__"}
    assert ours <= MAY_IMPORT[module]
    assert not {name.split(".")[0] for name in names} & MUST_NOT_IMPORT.get(module, set())


def test_configs_import_only_configs():
    for path in config_files.files():
        assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections", ""}
        assert len(path.read_text().splitlines()) <= 70


def test_shared_code_names_no_objective():
    """Only objectives and conversion, which has a layout for each, may name one of them."""
    for path in FILES:
        module = path.relative_to(ROOT / "mim_jax").parts[0].removesuffix(".py")
        if module in ("objectives", "convert", "models"):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        named = strings & OBJECTIVES
        # optim.warmup_and_decay distinguishes the schedules of MAE's and BEiT's code.
        assert not named - ({"mae", "beit"} if module in ("optim", "schema") else set()), path


def test_the_reading_path_is_short():
    """The loop, one objective and the encoder can be read in one sitting, docstrings aside."""
    lines = 0
    for name in ("train.py", "objectives/mae.py", "models/vit.py"):
        text = (ROOT / "mim_jax" / name).read_text()
        lines += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            if isinstance(node, kinds) and ast.get_docstring(node):
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    assert lines <= 380


def test_functions_are_short():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                # Signatures with annotated keys do not count.
                lines -= node.body[0].lineno - node.lineno
                assert lines <= 65, f"{path}: {node.name} has {lines} lines"


def test_names_and_docstrings():
    for path in FILES:
        assert not re.search(r"util|common|misc|helper|base|registry|types|constants", path.stem)
        text = path.read_text()
        assert not re.search(r"cfg|\.pmap\(|flax\.training|import clu", text), path
        assert "fmt: skip" not in text, path
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_torch_is_imported_only_where_it_is_needed():
    for path in FILES:
        if not path.name.startswith("torch_"):
            packages = {name.split(".")[0] for name in imports(path)}
            assert not packages & {"torch", "timm", "torchvision"}, path


def test_the_wheel_has_all_packages():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in FILES}
    packages = {".".join(folder.parts) for folder in folders} | {"mim_jax.configs"}
    assert set(settings["packages"]) == packages
