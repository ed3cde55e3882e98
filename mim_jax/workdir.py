"""The run directory, local or in a bucket: its files, and the record in its config.json.

    config.json       the complete config, versions, devices, and the trajectory
    metrics.jsonl     one JSON object per record (log.py)
    events.jsonl      starts, warnings and ends of processes (log.py)
    evaluation.json   the newest evaluation, with results by class (log.py)
    bad_files.jsonl   files that could not be used (log.py)
    pictures/         sheets of images
    checkpoints/      states by Orbax (checkpoint/)

The trajectory is everything that determines what a run learns; a run continues only if it is the
same. A directory of converted weights also has a config.json, but no trajectory to continue. In a
bucket, a JSON Lines file has several parts, such as metrics-00003-000.jsonl: number and process.
"""

import contextlib
import json
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from etils import epath

from mim_jax import UserError, __version__
from mim_jax.storage import (
    Lines,
    in_bucket,
    is_file,
    open_path,
    parse_json,
    read_json,
    storage_of,
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
OBJECTS = ("config", "trajectory", "data", "versions", "git")  # entries of a record
BLOCKS = ("objective", "data", "optimizer", "model", "tokenizer")  # of a config
CONVERTED = "converted from"  # the only key in the trajectory of converted weights


def is_run(workdir: str | epath.PathLike) -> bool:
    """Returns whether a path is a run directory, or one of converted weights."""
    return is_file(open_path(workdir) / "config.json")


def read(workdir: str | epath.PathLike) -> dict[str, Any]:
    """Returns the record in config.json, {} if there is none. Raises UserError if it is damaged."""
    path = open_path(workdir) / "config.json"
    if not is_file(path):
        return {}
    record = None
    try:
        record = read_json(path)
        return checked(record)
    except ValueError as error:
        if isinstance(record, dict) and "model_type" in record:  # in all of Hugging Face's
            raise UserError(
                f"{workdir} is a Hugging Face folder, not a run directory: convert it first: "
                f"mim-jax convert {workdir} RUN --to=mim_jax."
            ) from None
        raise UserError(f"{path} is damaged: {error}.") from None


def checked(record: Any) -> dict[str, Any]:
    """Returns a record if its parts are of the types that are read. Raises ValueError."""
    if not isinstance(record, dict) or not {"config", "trajectory"} <= record.keys():
        raise ValueError("it has no config or no trajectory")
    wrong = [name for name in OBJECTS if not isinstance(record.get(name, {}), dict)]
    if not wrong:
        blocks = record["config"]
        wrong = [name for name in BLOCKS if not isinstance(blocks.get(name, {}), dict)]
    if wrong:
        raise ValueError(f"its {wrong[0]} is not an object")
    if not isinstance(record.get("data", {}).get("class_names", []), list):
        raise ValueError("its class_names are not a list")
    return record


def write(workdir: str | epath.PathLike, record: Mapping[str, Any]) -> None:
    """Writes config.json."""
    write_text(open_path(workdir) / "config.json", json.dumps(record, indent=2) + "\n")


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically, because other processes may read it at any moment."""
    storage_of(path).write_text(path, text)


def is_locked(workdir: str | epath.PathLike) -> bool | None:
    """Returns whether a process is writing to a run directory, None if that is unknown."""
    folder = open_path(workdir) / "checkpoints"
    return storage_of(folder).locked(folder)


def free_bytes(workdir: str | epath.PathLike) -> float:
    """Returns the free bytes of the storage of a run directory."""
    path = open_path(workdir)
    return storage_of(path).free(path)


def create(path: str | epath.PathLike) -> None:
    """Creates an empty file, and its folder, unless it exists. Raises OSError if that fails."""
    path = open_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(b"")


def fetched(path: str | epath.PathLike) -> Path:
    """Returns a local file or folder with the contents of `path`."""
    path = open_path(path)
    return storage_of(path).fetched(path)


def staged(
    folder: str | epath.PathLike,
) -> contextlib.AbstractContextManager[Path]:
    """Returns a context with a local folder, whose files are copied to `folder` at the end."""
    path = open_path(folder)
    return storage_of(path).staged(path)


def append_to(path: epath.Path, process: int = 0) -> Lines:
    """Opens a JSON Lines file, to which process number `process` of a run appends objects."""
    storage, parts = storage_of(path), parts_of(path)
    if not storage.appends or set(parts) - {path}:  # a copy of a run in a bucket has parts, too
        path = path.with_name(f"{path.stem}-{len(parts):05d}-{process:03d}{path.suffix}")
    return storage.lines(path)


def parts_of(path: str | epath.PathLike) -> list[epath.Path]:
    """Returns the files that hold the lines of a JSON Lines file, in the order of the lines."""
    path = open_path(path)
    if not path.parent.is_dir():
        return []
    part = re.compile(rf"{re.escape(path.stem)}(-\d{{5}}.*)?{re.escape(path.suffix)}")
    parts = [file for file in path.parent.iterdir() if part.fullmatch(file.name)]
    parts = [file for file in parts if in_bucket(file) or is_file(file)]
    return sorted(parts, key=lambda file: (file.name != path.name, file.name))


def read_lines(path: str | epath.PathLike) -> list[dict[str, Any]]:
    """Returns the objects of a JSON Lines file, [] if there is none.

    Lines that are not JSON objects, such as those of a killed process, are left out.
    """
    return [record for part in parts_of(path) for record in read_part(part)]


def read_part(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the objects of one part of a JSON Lines file."""
    records = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            records.append(parse_json(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def keep_lines(
    path: str | epath.PathLike, keep: Callable[[Mapping[str, Any]], bool] = bool
) -> list[dict[str, Any]]:
    """Keeps only the objects of a JSON Lines file for which `keep` is true, and returns them."""
    remaining = []
    for part in parts_of(path):
        kept = [record for record in read_part(part) if keep(record)]
        if len(kept) < len(part.read_bytes().splitlines()):
            write_text(part, "".join(json.dumps(record) + "\n" for record in kept))
        remaining += kept
    return remaining


def record_of(
    config: Mapping[str, Any],
    trajectory: Mapping[str, Any],
    devices: str,
    code: str,
) -> dict[str, Any]:
    """Returns the record of a run, which is also stored in its checkpoints.

    `code` is the file of an objective outside the package, "" otherwise.
    """
    versions = {"python": platform.python_version(), "mim-jax": __version__}
    versions |= {name: version(name) for name in PACKAGES}
    record = dict(config=config, trajectory=trajectory, versions=versions, devices=devices)
    return record | (dict(code=code) if code else {})


def git_state() -> dict[str, str | bool]:
    """Returns the commit of the checkout that mim_jax runs from, {} if there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if git("ls-files", Path(__file__).name) == "":  # an installed package in another checkout
            return {}
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain") != ""}
    except (OSError, subprocess.CalledProcessError):
        return {}


def record_of_converted(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Returns the record of weights that were converted from another library's layout."""
    return dict(config=config, trajectory={CONVERTED: layout})


def class_names_of(record: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes of a run's data set in the order of its labels, or []."""
    return record.get("data", {}).get("class_names", [])


def is_converted(record: Mapping[str, Any]) -> bool:
    """Returns whether a record is of converted weights."""
    return CONVERTED in record.get("trajectory", {})
