"""Config files: finding them, loading them, and their descriptions."""

import ast
import difflib
import hashlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from mim_jax import UserError


def folder() -> Path:
    """Returns the folder of the configs that come with the package.

    They are inside the package in a wheel, and next to it in a checkout.
    """
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def files() -> list[Path]:
    """Returns the configs that come with the package."""
    return sorted(file for file in folder().glob("*.py") if file.stem != "__init__")


def names() -> list[str]:
    """Returns the names of these configs: "beit_base", ..."""
    return [file.stem for file in files()]


def find(path: str) -> Path:
    """Returns the file of a config, given its path or the name of one that comes with the package.

    Raises UserError, with similar names, if there is none.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if path in names():
        return folder() / f"{path}.py"
    neighbors = {str(x): x.name for x in file.parent.glob("*.py")} if file.parent.is_dir() else {}
    similar = difflib.get_close_matches(file.name, neighbors.values(), 1)
    hints = [hint for hint, name in neighbors.items() if name in similar]
    hints += difflib.get_close_matches(file.stem, names(), 1)
    hint = f"did you mean {hints[0]}?" if hints else "`mim-jax configs` lists all configs."
    raise UserError(f"there is no config or run {path}: {hint}")


def load(path: str) -> dict:
    """Returns the dict of a config file's get_config().

    The file may import its neighbors: `from . import mae_base`, and the configs that come with the
    package: `from mim_jax.configs import mae_base`.

    Raises UserError if there is no such file or its code fails.
    """
    file = find(path).absolute()
    try:
        get_config = getattr(module_of(file), "get_config", lambda: None)
        config = get_config()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"{path}, {explain(error, str(file))}: a config is a Python file with get_config()."
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} needs a function get_config() that returns a ConfigDict.")
    return config.to_dict()


def module_of(file: Path) -> ModuleType:
    """Executes a config file as a module of a package that consists of its folder."""
    package = "mim_jax_configs_" + hashlib.sha256(str(file.parent).encode()).hexdigest()[:12]
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]  # a notebook's user may have edited the files
    parent = ModuleType(package)
    parent.__path__ = [str(file.parent)]
    sys.modules[package] = parent
    module = ModuleType(f"{package}.{file.stem}")
    module.__package__, module.__file__ = package, str(file)
    exec(compile(file.read_bytes(), file, "exec"), module.__dict__)
    return module


def explain(error: Exception, file: str) -> str:
    """Formats an error with its line in `file` ("": the innermost file)."""
    if isinstance(error, SyntaxError):
        line = f"line {error.lineno}: " if error.lineno else ""  # a binary file has no lines
        return f"{line}{type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file in ("", frame.filename)]
    return f"line {lines[-1] if lines else 1}: {type(error).__name__}: {error}"


def summary(file: Path) -> str:
    """Returns the first line of a config's docstring, without executing the file."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ")
