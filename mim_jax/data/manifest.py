"""What images lie under a folder or in a tar file: found by their content, and remembered.

The first scan reads the header of every file, in threads. Its result is kept under
`~/.cache/mim_jax/manifests`, and is good as long as no folder's time of change is another (a file
that is added, removed or renamed changes it), nor that of a tar file or of a file that could not be
read. After that, files that were known before are not opened again.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mim_jax import UserError
from mim_jax.data.decode import BadImageError, header

FORMAT = [1, find_spec("tifffile") is not None]  # of what is kept; of another, nothing is believed
ROW = [("tar", "i4"), ("offset", "i8"), ("bytes", "i8"), ("changed", "i8")]
ROW = np.dtype([*ROW, ("width", "i4"), ("height", "i4"), ("mode", "i2")])
HEAD = 2**18  # bytes of a tar's member: enough to read size and mode of nearly all
THREADS = 32  # they wait for disks, most of the time
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
SPLITS = {"train": "train", "validation": "validation", "val": "validation"}
SPLITS |= {"valid": "validation", "test": "test"}  # folder -> split


class Manifest(NamedTuple):
    """The images under a root, in an order as good as random, which growth does not change.

    A name is a path from the root. Members of a tar have it as if the tar were unpacked where it
    lies; into a folder of its name, if they lie in no folder, or if it is named as a split.
    """

    root: str
    names: bytes  # each with a zero after it
    rows: np.ndarray  # (images,) of ROW; `tar` counts in `tars`, -1: a file
    modes: list[str]  # what `mode` counts in, as decode.header says them
    tars: list[str]
    unread: list[tuple[str, str]]  # name and reason of files that are no images, or broken ones
    stamps: dict[str, int]  # when folders, tars and unread files changed, in ns

    def read(self, i: int, name: str) -> bytes:
        """The bytes of image i, which has that name. Raises BadImageError."""
        row = self.rows[i]
        path = os.path.join(self.root, self.tars[row["tar"]] if row["tar"] >= 0 else name)
        try:
            with open(path.removesuffix("/"), "rb") as file:
                file.seek(row["offset"])
                return file.read(row["bytes"] if row["tar"] >= 0 else -1)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error


class Found(NamedTuple):
    """A file of the root or a member of a tar, before it is known what it is."""

    name: str
    bytes: int
    changed: int
    tar: int = -1
    offset: int = 0


def scan(root: str) -> Manifest:
    """The images under a folder, or in a tar file. Raises UserError if there is no such thing."""
    if "://" in str(root):
        raise UserError(
            f"{root} must be local, or mounted: pack it where it is, by mim_jax.data.prepare, and "
            "read it by data.name=tfds:gs://..."
        )
    root = os.path.realpath(os.path.expanduser(root))
    if not os.path.exists(root):
        raise UserError(f"there is no folder {root}: say data.name=folder:/path/to/images.")
    if os.path.isfile(root) and (root.endswith(COMPRESSED) or not tarfile.is_tarfile(root)):
        raise UserError(
            f"{root} is neither a folder nor a plain tar file: unpack it, and say its folder."
        )
    key = hashlib.sha256(os.fsencode(root)).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    kept = cache / "mim_jax" / "manifests" / f"{key}.npz"
    before = load(kept, root)
    if before and all(changed(root, name) == at for name, at in before.stamps.items()):
        return before
    manifest = look(root, before)
    save(manifest, kept)
    return manifest


def changed(root: str, name: str) -> int:
    """When a file or folder changed last, in ns; -1 if it is gone."""
    try:
        return os.stat(os.path.join(root, name).removesuffix("/")).st_mtime_ns
    except OSError:
        return -1


def look(root: str, before: Manifest | None) -> Manifest:
    """Scans; opens no file that `before` knows and that has not changed since."""
    files, unread, stamps = walk(root)
    tars = [file.name for file in files if file.name.endswith(".tar") or not file.name]
    files = [file for file in files if not (file.name.endswith(".tar") or not file.name)]
    for i, tar in enumerate(tars):
        stamps[tar] = changed(root, tar)
        members, reason = members_of(root, tar, i)
        files += members
        unread += [(tar, reason)] if reason else []
    known = {} if before is None else known_of(before)
    rows, names, modes = [], [], {}

    def described(file: Found):
        seen = known.get((file.name, file.bytes, file.changed))
        return seen or describe(root, tars, file)

    progress = tqdm(total=len(files), unit=" files", desc=f"looking through {root}", delay=3)
    for file, found in zip(files, in_threads(described, files), strict=True):
        progress.update()
        if isinstance(found, str):
            unread.append((file.name, found))
            if file.tar < 0:
                stamps[file.name] = file.changed
            continue
        width, height, mode = found
        mode = modes.setdefault(mode, len(modes))
        rows.append((file.tar, file.offset, file.bytes, file.changed, width, height, mode))
        names.append(os.fsencode(file.name))
    progress.close()
    order = sorted(range(len(rows)), key=lambda i: (zlib.crc32(names[i]), names[i], rows[i]))
    blob = b"".join(names[i] + b"\0" for i in order)
    rows = np.array(rows, ROW)[order]
    return Manifest(root, blob, rows, list(modes), tars, sorted(unread), stamps)


def walk(root: str) -> tuple[list[Found], list[tuple[str, str]], dict[str, int]]:
    """All files, by name; folders that cannot be read; when each folder changed.

    Links are followed. What is hidden does not count.
    """
    if os.path.isfile(root):
        return [Found("", 0, 0)], [], {}
    files, unread, stamps, seen, ahead = [], [], {}, set(), [""]
    while ahead:
        folder = ahead.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back
                continue
            seen.add((status.st_dev, status.st_ino))
            stamps[folder] = status.st_mtime_ns
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            unread.append((folder, f"cannot be read: {error.strerror}"))
            stamps[folder] = 0  # so that it is tried again
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            name = os.path.join(folder, entry.name)
            if entry.is_dir():
                ahead.append(name)
            elif entry.is_file():
                with contextlib.suppress(FileNotFoundError):  # just gone
                    status = entry.stat()
                    files.append(Found(name, status.st_size, status.st_mtime_ns))
    return sorted(files), unread, stamps


def members_of(root: str, tar: str, number: int) -> tuple[list[Found], str]:
    """The files in a tar, and what is wrong with it, if anything is."""
    path = os.path.join(root, tar).removesuffix("/")
    found, whole, at = [], os.path.getsize(path), changed(root, tar)
    try:
        with tarfile.open(path, "r:") as file:
            for name, size, offset in files_in(file):
                if offset + size > whole:
                    return found, "the tar file is cut off"
                name = unpacked(tar.removesuffix(".tar"), name)
                found.append(Found(name, size, at, number, offset))
    except (tarfile.TarError, OSError) as error:
        return found, f"not a whole tar file: {error}"
    return found, ""


def files_in(file: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    """Name, size and offset of the files in a tar, and in the tars in it, as ImageNet has them."""
    for member in file:
        name = os.path.normpath(member.name)
        if not member.isfile() or os.path.basename(name).startswith("."):
            continue
        if not name.endswith(".tar"):
            yield name, member.size, member.offset_data
            continue
        with tarfile.open(fileobj=file.extractfile(member), mode="r:") as inner:
            for below, size, offset in files_in(inner):
                name_below = unpacked(name.removesuffix(".tar"), below)
                yield name_below, size, member.offset_data + offset


def unpacked(tar: str, name: str) -> str:
    """Where a member of a tar would lie, whose path without `.tar` is given; see Manifest."""
    place, _, stem = tar.rpartition("/")
    in_place = "/" in name and (stem not in SPLITS or name.startswith(f"{stem}/"))
    return os.path.join(place, "" if in_place else stem, name)


def known_of(manifest: Manifest) -> dict[tuple, tuple]:
    """What a manifest says of its images, by name, size and time of change."""
    names = map(os.fsdecode, manifest.names.split(b"\0"))
    rows = manifest.rows[["bytes", "changed", "width", "height", "mode"]].tolist()
    return {
        (name, size, at): (width, height, manifest.modes[mode])
        for name, (size, at, width, height, mode) in zip(names, rows, strict=False)
    }


def describe(root: str, tars: list[str], file: Found) -> tuple | str:
    """Width, height and mode of an image, or why it is none."""
    try:
        if file.tar < 0:
            with open(os.path.join(root, file.name), "rb") as opened:
                return header(opened)
        with open(os.path.join(root, tars[file.tar]).removesuffix("/"), "rb") as opened:
            opened.seek(file.offset)
            start = opened.read(min(file.bytes, HEAD))
            try:
                return header(io.BytesIO(start))
            except BadImageError:
                if len(start) == file.bytes:
                    raise
            return header(io.BytesIO(start + opened.read(file.bytes - len(start))))
    except BadImageError as error:
        if file.name.endswith(COMPRESSED):
            return "compressed: unpack it, or make it a plain .tar"
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def in_threads(function: Callable, items: Sequence, at_once: int = 64) -> Iterator:
    """map(function, items) in threads. An interruption does not wait for what is ahead."""
    parts = [items[i : i + at_once] for i in range(0, len(items), at_once)]
    pool = ThreadPoolExecutor(THREADS)
    try:
        for part in pool.map(lambda part: [function(item) for item in part], parts):
            yield from part
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def save(manifest: Manifest, path: Path) -> None:
    """Keeps a manifest; where that cannot be, the next scan is as long as this one."""
    rest = [FORMAT, manifest.modes, manifest.tars, manifest.unread, manifest.stamps]
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            names = np.frombuffer(manifest.names, np.uint8)
            np.savez(file, names=names, rows=manifest.rows, rest=json.dumps(rest))
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()


def load(path: Path, root: str) -> Manifest | None:
    """The manifest kept in a file, if it is there and whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            form, modes, tars, unread, stamps = json.loads(str(kept["rest"]))
            if form != FORMAT or kept["rows"].dtype != ROW:
                return None
            unread = [tuple(pair) for pair in unread]
            names = kept["names"].tobytes()
            return Manifest(root, names, kept["rows"], modes, tars, unread, stamps)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
