"""The run directory: its files, and the record in its config.json.

    config.json       the complete config, versions, devices, and the trajectory
    metrics.jsonl     one JSON object per record (log.py)
    events.jsonl      starts, warnings and ends of processes (log.py)
    evaluation.json   the newest evaluation, with results by class (log.py)
    bad_files.jsonl   files that could not be used (log.py)
    pictures/         sheets of images
    checkpoints/      states by Orbax (checkpoint.py)

The trajectory is everything that determines what a run learns: a run continues only if it is equal.
A directory of converted weights has a config.json too, but no trajectory to continue.
"""

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from etils import epath

from mim_jax import UserError, __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
CONVERTED = "converted from"  # the one key in the trajectory of converted weights


def open_path(workdir: str | epath.PathLike) -> epath.Path:
    """Returns a run directory as a path; "~" is the home directory."""
    return epath.Path(workdir).expanduser()


def is_run(workdir: str | epath.PathLike) -> bool:
    """Returns whether a path is a run directory, or one of converted weights."""
    return (open_path(workdir) / "config.json").is_file()


def has_checkpoints(workdir: str | epath.PathLike) -> bool:
    """Returns whether a run has saved a checkpoint."""
    return any(step.name.isdigit() for step in open_path(workdir).glob("checkpoints/*"))


def read(workdir: str | epath.PathLike) -> dict[str, Any]:
    """Returns the record in config.json, {} if there is none. Raises UserError if it is damaged."""
    path = open_path(workdir) / "config.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        if not {"config", "trajectory"} <= record.keys():
            raise ValueError("it has no config or no trajectory")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    return record


def write(workdir: str | epath.PathLike, record: Mapping[str, Any]) -> None:
    """Writes config.json atomically, because other processes may read it at any moment."""
    path = open_path(workdir) / "config.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(path)


def read_lines(path: str | epath.PathLike) -> list[dict[str, Any]]:
    """Returns the objects of a JSON Lines file, [] if there is none.

    Lines that are not JSON objects, such as those of a killed process, are left out.
    """
    path = open_path(path)
    records = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def write_lines(path: str | epath.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON Lines file atomically."""
    path = open_path(path)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.replace(path)


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
