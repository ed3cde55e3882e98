"""The folders and files of checkpoints: steps, checksums, corrupt files."""

import atexit
import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mim_jax import UserError
from mim_jax.storage import MAX_JSON, in_bucket, open_path, read_json, storage_of

COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint in a bucket
UNSIGNED = ("digests.json", "_CHECKPOINT_METADATA", COMMITTED)  # files that are written last
STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # names of the folders of checkpoints
DATA = "d"  # folders of files with arrays; all other files are short


def folder_of(workdir: str) -> epath.Path:
    """Returns the folder of a run's checkpoints."""
    path = open_path(workdir)
    return storage_of(path).absolute(path) / "checkpoints"


def steps_in(folder: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in increasing order."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(int(path.name) for path in paths if ocp.utils.is_checkpoint_finalized(path))


def has_checkpoints(workdir: str) -> bool:
    """Returns whether a run has saved a checkpoint."""
    return bool(steps_in(folder_of(workdir)))


def sign(folder: epath.Path) -> None:
    """Writes digests.json into a checkpoint after its other files, before Orbax commits it."""
    for path in folder.iterdir():
        step, _, temporary = path.name.partition(".orbax-checkpoint-tmp")
        if step.isdigit() and not ocp.utils.is_checkpoint_finalized(path):
            table = digests(path, storage_of(path).checksum)
            (path / "digests.json").write_text(json.dumps(table, indent=1) + "\n")
            if temporary:  # Orbax renames it when complete; a copy in a bucket needs the mark
                (path / COMMITTED).write_text("")


def digests(folder: epath.Path, kind: str) -> dict[str, str]:
    """Returns {"state/d/0123": checksum, ...} of the files in a checkpoint."""
    return storage_of(folder).checksums(folder, kind, but=UNSIGNED)


def find_fault(folder: epath.Path) -> str:
    """Returns what is wrong with a checkpoint, or "" if it is intact."""
    if not in_bucket(folder) and (reason := find_unusual(Path(folder))):
        return reason
    try:
        saved = read_json(folder / "digests.json")
    except (OSError, ValueError):
        return "digests.json cannot be read"
    if not isinstance(saved, dict):
        return "digests.json is not a table of digests"
    from_bucket = any(str(checksum).startswith("crc32c:") for checksum in saved.values())
    now = digests(folder, "crc32c" if from_bucket else "sha256")
    changed = sorted(name for name in saved.keys() | now if saved.get(name) != now.get(name))
    return f"{changed[0]} has changed since it was written" if changed else ""


def find_unusual(folder: Path) -> str:
    """Returns which file of a checkpoint on a disk must not be read, and why, or "" if all may be.

    Reading a pipe or a device may never end, and a file with holes may be longer than the disk.
    """
    disk = shutil.disk_usage(folder).total  # 0 if unknown
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file():
            return f"{name} is not a file"
        size = path.stat().st_size
        if path.parent.name != DATA and size > MAX_JSON:
            return f"{name} is longer than {MAX_JSON / 2**20:.0f} MiB"
        if 0 < disk < size:
            return f"{name} is longer than the disk"
    return ""


def newest(folder: epath.Path, set_aside: bool = False, before: float = math.inf) -> int | None:
    """Returns the newest intact step in a folder of checkpoints, or None if there is no checkpoint.

    Process 0 verifies the checkpoints and tells the others the result. It reports corrupt ones on
    stderr.

    Args:
        folder: the folder of checkpoints.
        set_aside: rename corrupt checkpoints.
        before: consider only earlier steps.

    Raises:
        UserError: if every checkpoint is corrupt.
    """
    intact, corrupt = -1, {}
    if jax.process_index() == 0:
        for step in reversed([step for step in steps_in(folder) if step < before]):
            if not (reason := find_fault(folder / str(step))):
                intact = step
                break
            corrupt[step] = reason
        for step, reason in corrupt.items() if intact >= 0 else ():
            print(
                f"checkpoint {step} in {folder} is corrupt: {reason}. Using step {intact}.",
                file=sys.stderr,
            )
            if set_aside:
                (folder / str(step)).rename(folder / f"{step}.corrupt-{time.time():.0f}")
    verdict = np.array([intact, len(corrupt)], np.int32)
    intact, count = (int(n) for n in multihost_utils.broadcast_one_to_all(verdict))
    if count and intact < 0:
        raise UserError(
            f"every checkpoint in {folder} is corrupt: delete the folder to start from step 0."
        )
    return None if intact < 0 else intact


@contextlib.contextmanager
def disk_errors(folder: epath.Path) -> Iterator[None]:
    """Converts Orbax's errors about the disk, which it raises in its next call, to OSError."""
    try:
        yield
    except ValueError as error:  # of tensorstore, for example: ... [os_error_code='28']
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(code[1])
        elif "No space left" in str(error):
            number = errno.ENOSPC
        else:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def without_wildcards(folder: epath.Path) -> epath.Path:
    """Returns a path to the folder without [ ] * ?, which Orbax would expand; makes a link."""
    if not set("[]*?") & set(str(folder)):
        return folder
    links = Path(tempfile.mkdtemp(prefix="mim_jax-"))
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    link = links / folder.name
    link.symlink_to(folder)
    return epath.Path(link)
