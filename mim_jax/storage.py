"""Storage of run directories: a disk, or a bucket of Google Cloud Storage.

    path = open_path("gs://bucket/runs/mae_base")  # reads and writes like a pathlib.Path
    storage_of(path).lock(path)

`Disk` has the operations that a path lacks, and `bucket.Bucket` the same ones for a bucket, which
can neither append to a file, nor rename one, nor lock it.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

from etils import epath

from mim_jax import UserError, bucket

MAX_JSON = 2**24  # bytes of a file with one JSON object


class Lines(Protocol):
    """A file of JSON objects, one per line."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds an object to the end of the file."""

    def flush(self) -> None:
        """Returns when all objects are stored, or a failure has been printed."""


class Lock(Protocol):
    """An exclusive lock on a folder: one process at a time may write to it."""

    def check(self) -> None:
        """Raises UserError if another process has taken over the folder."""

    def close(self) -> None:
        """Releases the folder."""


class Storage(Protocol):
    """Operations on files that differ between disks and buckets."""

    appends: bool  # whether lines can be added to an existing file
    checksum: str  # the kind of checksum that needs the least work

    def absolute(self, path: epath.Path) -> epath.Path:
        """Returns the path from the root."""

    def free(self, folder: epath.Path) -> float:
        """Returns the number of free bytes."""

    def write_text(self, path: epath.Path, text: str) -> None:
        """Writes a file so that other processes read its old text, or its new one."""

    def lines(self, path: epath.Path) -> Lines:
        """Opens a file of JSON objects to append to it, or to create it."""

    def checksums(self, folder: epath.Path, kind: str, but: Collection[str]) -> dict[str, str]:
        """Returns {"d/0123": checksum, ...} of the files in a folder, except those named in `but`.

        `kind` is sha256 or crc32c.
        """

    def lock(self, folder: epath.Path) -> Lock:
        """Locks a folder. Raises UserError if another process has locked it."""

    def locked(self, folder: epath.Path) -> bool | None:
        """Returns whether a process has locked a folder, None if that is unknown."""

    def fetched(self, path: epath.Path) -> Path:
        """Returns a file or a folder on the disk, with the contents of `path`."""

    def staged(self, folder: epath.Path) -> contextlib.AbstractContextManager[Path]:
        """Returns a context with a folder on the disk, whose files are in `folder` afterwards."""

    def open(self, path: str, size: int) -> BinaryIO:
        """Opens a file of a size to read it. Raises OSError, also if there is no such file."""

    def read(self, path: str, start: int, size: int) -> bytes:
        """Returns some bytes of a file, fewer at its end. Raises OSError."""


def open_path(path: str | epath.PathLike) -> epath.Path:
    """Returns a path on a disk or in a bucket; "~" is the home directory.

    Raises:
        UserError: if it is in a bucket that cannot be used.
    """
    text = os.fspath(path)
    if in_bucket(text):
        bucket.connect(text)
    return epath.Path(text).expanduser()


def storage_of(path: str | epath.Path) -> Storage:
    """Returns the storage that holds a path."""
    return bucket.bucket_of(str(path)) if in_bucket(path) else Disk()


def in_bucket(path: str | epath.Path) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in str(path)


def is_file(path: epath.Path) -> bool:
    """Returns whether there is a regular file, not a pipe or device, whose reading may not end."""
    return path.is_file() if in_bucket(path) else Path(path).is_file()


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file. Raises ValueError if it is damaged, too large or nested too deeply."""
    path = open_path(path)
    if not is_file(path):
        raise ValueError("it is not a file")
    if path.stat().length > MAX_JSON:
        raise ValueError(f"it is longer than {MAX_JSON / 2**20:.0f} MiB")
    return parse_json(path.read_text())


def parse_json(text: str) -> Any:
    """Parses JSON. Raises ValueError, also for deep nesting and integers of over 20 digits."""
    try:
        return json.loads(text, parse_int=integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def integer(text: str) -> int:
    """Parses an integer of at most 20 digits, because a very large one cannot become a float."""
    if len(text) > 20:
        raise ValueError(f"it has an integer of {len(text):,} digits")
    return int(text)


def require_access(path: str, error: Exception) -> None:
    """Raises UserError or BucketError if a record could not be read because of its bucket.

    Args:
        path: the folder of the records, on a disk or in a bucket.
        error: what array_record raised.
    """
    if in_bucket(path):
        bucket.require_access(path, error)


def objects(path: str) -> list[tuple[str, int, int]]:
    """Returns name, size and generation of the objects below a path in a bucket.

    Names are relative to the path; "" is that of an object at the path itself.
    """
    return bucket.bucket_of(path).objects(path)


class Disk:
    """A disk, local or mounted."""

    appends = True
    checksum = "sha256"

    def absolute(self, path: epath.Path) -> epath.Path:
        return path.resolve()

    def free(self, folder: epath.Path) -> float:
        return shutil.disk_usage(folder).free

    def write_text(self, path: epath.Path, text: str) -> None:
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)  # it may be a link
        part.write_text(text)
        part.replace(path)

    def lines(self, path: epath.Path) -> "AppendedLines":
        return AppendedLines(Path(path))

    def checksums(self, folder: epath.Path, kind: str, but: Collection[str]) -> dict[str, str]:
        root = Path(folder)
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.name not in but)

        def checksum(path: Path) -> str:
            with path.open("rb") as file:
                return bucket.checksum_of(file, kind)

        with ThreadPoolExecutor() as pool:
            names = (str(path.relative_to(root)) for path in files)
            return dict(zip(names, pool.map(checksum, files), strict=True))

    def lock(self, folder: epath.Path) -> "FileLock":
        return FileLock(Path(folder))

    def locked(self, folder: epath.Path) -> bool | None:
        try:
            with (Path(folder) / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                by_this_machine = file.read().endswith(f" on {platform.node()}")
        except BlockingIOError:
            return True
        except OSError:  # there is no lock, or the file system has none
            return None
        return False if by_this_machine else None  # locks of other machines may be invisible

    def fetched(self, path: epath.Path) -> Path:
        return Path(path)

    @contextlib.contextmanager
    def staged(self, folder: epath.Path) -> Iterator[Path]:
        yield Path(folder)

    def open(self, path: str, size: int) -> BinaryIO:
        return open(path, "rb")

    def read(self, path: str, start: int, size: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)


def without_links(path: str, flags: int) -> int:
    """Opens a file that is not a link: a stranger's run must not change files outside it."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class AppendedLines:
    """A file of JSON objects to which every line is appended at once."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        with open(self.path, "a", opener=without_links) as file:
            file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        pass


class FileLock:
    """Locks a folder while the file `lock` is open. The lock of a killed process is released."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "lock"
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is not a regular file: remove it.")
        self.file: IO = open(path, "a+", opener=without_links)  # noqa: SIM115
        try:
            self.acquire()
        except BlockingIOError:
            self.file.seek(0)
            raise UserError(
                f"{folder.parent} is in use by {self.file.read()}: wait until it ends, or stop it."
            ) from None
        except OSError:  # a file system without locks
            pass
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}")
        self.file.flush()

    def acquire(self) -> None:
        """Locks the file. Raises BlockingIOError if another process has locked it."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # `Disk.locked` locks it for a moment
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.file.close()
