"""Scans a folder or a tar file for images, by the content of its files, and caches the result.

The root may be in a bucket, whose objects are read by range requests.

The first scan reads the header of every file, in threads. Its result is kept under
`~/.cache/mim_jax/manifests` and reused if the modification times are the same: of all folders
(which change when a file is added, removed or renamed), of tar files, of files that could not be
read, and of the images that can be checked within VERIFY seconds, whose sizes are compared too. A
new scan opens only files that are new or changed.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import stat
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mim_jax import UserError
from mim_jax.data.arrays import LARGEST
from mim_jax.data.decode import BadImageError, header
from mim_jax.data.tars import is_hidden, is_tar, list_tar
from mim_jax.data.tiff import STARTS
from mim_jax.progress import Bar
from mim_jax.storage import in_bucket, objects, open_path, storage_of

FORMAT = 3  # version of the cached files; others are ignored
ROW = np.dtype(
    [
        *(("tar", "i4"), ("offset", "i8"), ("bytes", "i8"), ("changed", "i8")),
        *(("width", "i4"), ("height", "i4"), ("mode", "i2")),
        *(("cls_offset", "i8"), ("cls_bytes", "i4"), ("json_offset", "i8"), ("json_bytes", "i4")),
    ]
)
HEAD = 2**18  # bytes of a tar's member; enough to read size and mode of nearly all images
VERIFY = 10  # seconds in which images of a cached scan are checked for changes
THREADS = 32  # most of the time is spent waiting for disks
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
COMPANION = 2**24  # bytes of the largest file .cls or .json that is read
COMPANIONS = (".cls", ".json", ".txt")  # files that belong to an image of the same name


class Manifest(NamedTuple):
    """The images under a root, in a pseudorandom order that added images do not change.

    A name is a path from the root. Members of a tar are named as if the tar were unpacked in place:
    into a folder of its name, if they are in no folder or if the tar is named like a split.
    """

    root: str
    names: bytes  # each followed by a zero
    rows: np.ndarray  # (images,) of ROW; `tar` is an index into `tars`, -1 for a file
    modes: list[str]  # `mode` is an index into these, which are those of decode.Header
    tars: list[str]
    unread: list[tuple[str, str]]  # names and reasons of files that are not used
    stamps: dict[str, int]  # modification times of folders, tars and unread files, in ns

    def read(self, i: int, name: str) -> bytes:
        """Reads the bytes of image i, called `name`. Raises BadImageError."""
        row = self.rows[i]
        in_tar = row["tar"] >= 0
        path = self.tars[row["tar"]] if in_tar else name
        try:
            # one byte more of a file, to see whether it has grown
            content = read_part(self.root, path, row["offset"], row["bytes"] + (not in_tar))
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        if len(content) != row["bytes"]:
            raise BadImageError(
                f"changed since the folder was scanned ({len(content):,} bytes, not "
                f"{row['bytes']:,}): start again to scan it"
            )
        return content

    def open(self, i: int, name: str) -> BinaryIO:
        """Opens the file of image i, called `name`. Raises BadImageError."""
        row = self.rows[i]
        if row["tar"] >= 0:
            if row["bytes"] > LARGEST:
                raise BadImageError("too large for a member of a tar: unpack it")
            return io.BytesIO(self.read(i, name))
        try:
            return open_file(self.root, name, row["bytes"])
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error

    def companion(self, i: int, name: str, suffix: str) -> bytes | None:
        """Reads the file .cls or .json next to image i, called `name`; None if there is none.

        Raises ValueError if it is too large.
        """
        row, kind = self.rows[i], suffix.removeprefix(".")
        size = row[f"{kind}_bytes"]
        if not size:
            return None
        if size > COMPANION:
            raise ValueError(f"it has {size:,} bytes")
        in_tar = row["tar"] >= 0
        for path in [self.tars[row["tar"]]] if in_tar else companion_names(name, suffix):
            with contextlib.suppress(FileNotFoundError):
                return read_part(self.root, path, row[f"{kind}_offset"], size)
        return None


class Entry(NamedTuple):
    """A file of the root or a member of a tar, before its header is read."""

    name: str
    bytes: int
    changed: int
    tar: int = -1
    offset: int = 0


def scan(root: str, large: bool = False) -> Manifest:
    """Returns the images in a folder or a tar file. Raises UserError if `root` is neither.

    Args:
        large: include TIFFs that are too large to be decoded whole.
    """
    root = str(root)
    root = str(open_path(root)).rstrip("/") if in_bucket(root) else local_root(root)
    key = hashlib.sha256(os.fsencode(root)).hexdigest()[:20] + ("-large" if large else "")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = cache / "mim_jax" / "manifests" / f"{key}.npz"
    cached = load_cache(path, root)
    if cached and is_current(cached):
        return cached
    manifest = rescan(root, cached, large)
    save_cache(manifest, path)
    return manifest


def local_root(root: str) -> str:
    """Returns the real path of a root. Raises UserError if it is neither a folder nor a tar."""
    root = os.path.realpath(os.path.expanduser(root))
    if not os.path.exists(root):
        raise UserError(f"there is no folder {root}: set data.name=folder:/path/to/images.")
    if os.path.isfile(root) and (root.endswith(COMPRESSED) or not is_tar(root)):
        raise UserError(
            f"{root} is neither a folder nor an uncompressed tar file: unpack it and set data.name "
            "to its folder."
        )
    return root


def open_file(root: str, name: str, size: int) -> BinaryIO:
    """Opens a file of a root, or the root itself if `name` is "". Raises OSError."""
    return storage_of(root).open(os.path.join(root, name).removesuffix("/"), int(size))


def read_part(root: str, name: str, start: int, size: int) -> bytes:
    """Reads some bytes of a file of a root, fewer at its end. Raises OSError."""
    path = os.path.join(root, name).removesuffix("/")
    return storage_of(root).read(path, int(start), int(size))


def is_current(manifest: Manifest) -> bool:
    """Returns whether no change since a scan is detected within VERIFY seconds."""
    root, rows = manifest.root, manifest.rows
    if in_bucket(root):
        return walk(root)[2].items() <= manifest.stamps.items()
    if any(changed(root, name) != at for name, at in manifest.stamps.items()):
        return False
    names = os.fsdecode(manifest.names).split("\0")[:-1]
    known = list(zip(names, rows["bytes"].tolist(), rows["changed"].tolist(), strict=True))
    files = [known[i] for i in np.flatnonzero(rows["tar"] < 0)]

    def same(file: tuple[str, int, int]) -> bool:
        try:
            status = os.stat(f"{root}/{file[0]}")
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == file[1:]

    end = time.monotonic() + VERIFY
    for is_same in in_threads(same, files, at_once=1024):
        if not is_same:
            return False
        if time.monotonic() > end:
            break
    return True


def changed(root: str, name: str) -> int:
    """Returns the modification time of a file or folder in ns; -1 if it does not exist."""
    try:
        return os.stat(os.path.join(root, name).removesuffix("/")).st_mtime_ns
    except OSError:
        return -1


def rescan(root: str, cached: Manifest | None, large: bool) -> Manifest:
    """Scans a root. Files that `cached` knows and that have not changed are not opened."""
    files, unread, stamps = walk(root)
    archives = [file for file in files if file.name.endswith(".tar") or not file.name]
    tars = [tar.name for tar in archives]
    files = [file for file in files if not (file.name.endswith(".tar") or not file.name)]
    with Bar(f"listing the tar files of {root}", len(tars), unit="files") as bar:
        lists = in_threads(lambda tar: list_archive(root, tar), archives, at_once=1)
        for number, (tar, (members, problems)) in enumerate(zip(archives, lists, strict=True)):
            bar.update()
            stamps[tar.name] = tar.changed
            files += [Entry(name, size, tar.changed, number, at) for name, size, at in members]
            unread += problems
    known = {} if cached is None else described_images(cached)

    def described(file: Entry) -> tuple | str:
        return known.get((file.name, file.bytes, file.changed)) or describe(root, tars, file, large)

    companions = {(x.tar, x.name): x for x in files if x.name.lower().endswith(COMPANIONS)}
    images: list[tuple[Entry, int, int, int]] = []  # width, height, index into modes
    modes: dict[str, int] = {}
    with Bar(f"scanning {root}", len(files), unit="files") as bar:

        def look_at(some: list[Entry]) -> None:
            for file, result in zip(some, in_threads(described, some), strict=True):
                bar.update()
                if isinstance(result, str):
                    unread.append((file.name, result))
                    if file.tar < 0:
                        stamps[file.name] = file.changed
                else:
                    images.append((file, *result[:2], modes.setdefault(result[2], len(modes))))

        look_at([file for file in files if (file.tar, file.name) not in companions])
        keys = {(file.tar, key_of(file.name)) for file, *_ in images}
        look_at([x for x in companions.values() if (x.tar, key_of(x.name)) not in keys])
    rows = [row_of(*image, companions=companions) for image in images]
    names = [os.fsencode(file.name) for file, *_ in images]
    order = sorted(range(len(rows)), key=lambda i: (zlib.crc32(names[i]), names[i], rows[i]))
    blob = b"".join(names[i] + b"\0" for i in order)
    array = np.array(rows, ROW)[order]
    return Manifest(root, blob, array, list(modes), tars, sorted(unread), stamps)


def list_archive(root: str, tar: Entry) -> tuple[list, list]:
    """Lists the files in a tar; see tars.list_tar."""
    try:
        with open_file(root, tar.name, tar.bytes) as file:
            return list_tar(file, tar.name)
    except OSError as error:
        return [], [(tar.name, f"not a complete tar file: {error}")]


def row_of(file: Entry, width: int, height: int, mode: int, companions: dict) -> tuple:
    """Returns the row of an image, of type ROW."""
    row = [file.tar, file.offset, file.bytes, file.changed, width, height, mode]
    for suffix in (".cls", ".json"):
        names = companion_names(file.name, suffix)
        places = ((file.tar, name) for name in names)
        companion = next((companions[place] for place in places if place in companions), None)
        row += (companion.offset, companion.bytes) if companion else (0, 0)
    return tuple(row)


def key_of(name: str) -> str:
    """Returns a path up to the first dot of its last part, WebDataset's key of an example."""
    folder, _, file = name.rpartition("/")
    return os.path.join(folder, file.partition(".")[0])


def companion_names(name: str, suffix: str) -> list[str]:
    """Returns the names that the file .cls or .json next to an image may have, by preference.

    WebDataset ignores the case of suffixes. It does not support names with other dots, which other
    programs write.
    """
    stems = (os.path.splitext(name)[0], key_of(name))
    return [stem + ending for stem in stems for ending in (suffix, suffix.upper())]


def walk(root: str) -> tuple[list[Entry], list[tuple[str, str]], dict[str, int]]:
    """Returns all files by name, names and reasons of unreadable ones, and modification times.

    Links are followed. Hidden files and folders of operating systems are skipped. In a bucket, the
    generations of objects serve as times, and one checksum of all of them as that of the folders.
    """
    if in_bucket(root):
        shown = [x for x in sorted(objects(root)) if not any(map(is_hidden, x[0].split("/")))]
        listing = hashlib.sha256(repr(shown).encode()).digest()
        return list(itertools.starmap(Entry, shown)), [], {"/": int.from_bytes(listing[:7])}
    if os.path.isfile(root):
        status = os.stat(root)
        return [Entry("", status.st_size, status.st_mtime_ns)], [], {}
    files, unread, stamps, seen = [], [], {}, set()
    folders: list[str] = [""]
    links: list[str] = []  # links last, so that a folder keeps its own name
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                unread.append((folder, "a link to a folder that is scanned already"))
                continue
            seen.add((status.st_dev, status.st_ino))
            stamps[folder] = status.st_mtime_ns
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda x: x.name)
        except OSError as error:
            unread.append((folder, f"cannot be read: {error.strerror}"))
            stamps[folder] = 0  # to try again in the next scan
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if is_hidden(entry.name):
                continue
            try:
                status = entry.stat()
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
                unread.append((name, "a broken link" if entry.is_symlink() else reason))
                stamps[name] = -1  # as for a missing file
                continue
            if stat.S_ISDIR(status.st_mode):
                (links if entry.is_symlink() else folders).append(name)
            elif stat.S_ISREG(status.st_mode):
                files.append(Entry(name, status.st_size, status.st_mtime_ns))
            else:
                unread.append((name, "not a regular file"))
    return sorted(files), unread, stamps


def described_images(manifest: Manifest) -> dict[tuple, tuple]:
    """Returns {(name, size, modification time): (width, height, mode)} of a manifest's images."""
    names = map(os.fsdecode, manifest.names.split(b"\0"))
    rows = manifest.rows[["bytes", "changed", "width", "height", "mode"]].tolist()
    return {
        (name, size, at): (width, height, manifest.modes[mode])
        for name, (size, at, width, height, mode) in zip(names, rows, strict=False)
    }


def describe(root: str, tars: list[str], file: Entry, large: bool = False) -> tuple | str:
    """Returns width, height and mode of an image, or the reason why a file is not one."""
    try:
        if file.tar < 0 and not in_bucket(root):
            with open(os.path.join(root, file.name), "rb") as opened:
                return header(opened, large=large)
        path = tars[file.tar] if file.tar >= 0 else file.name
        start = read_part(root, path, file.offset, min(file.bytes, HEAD))
        if start[:4] not in STARTS:  # the pages of a TIFF may lie anywhere
            try:
                return header(io.BytesIO(start))
            except BadImageError:
                if len(start) == file.bytes:
                    raise
        if file.tar < 0:
            with open_file(root, path, file.bytes) as opened:
                return header(opened, large=large)
        rest = read_part(root, path, file.offset + len(start), file.bytes - len(start))
        return header(io.BytesIO(start + rest))
    except BadImageError as error:
        if file.name.endswith(COMPRESSED):
            return "compressed: unpack it or make it an uncompressed .tar"
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def in_threads(
    function: Callable, items: Sequence, at_once: int = 64, threads: int | None = THREADS
) -> Iterator:
    """Yields function(item) for each item, in order, from threads.

    Args:
        at_once: items per task. Abandoning the iterator does not wait for the remaining items.
    """
    parts = [items[i : i + at_once] for i in range(0, len(items), at_once)]
    pool = ThreadPoolExecutor(threads)
    try:
        for part in pool.map(lambda part: [function(item) for item in part], parts):
            yield from part
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def printable(name: str) -> str:
    """Returns a name with escaped control characters and bytes that are not UTF-8."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def save_cache(manifest: Manifest, path: Path) -> None:
    """Caches a manifest, if that is possible."""
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


def load_cache(path: Path, root: str) -> Manifest | None:
    """Returns the manifest cached in a file, None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as cached:
            form, modes, tars, unread, stamps = json.loads(str(cached["rest"]))
            if form != FORMAT or cached["rows"].dtype != ROW:
                return None
            unread = [tuple(pair) for pair in unread]
            names = cached["names"].tobytes()
            return Manifest(root, names, cached["rows"], modes, tars, unread, stamps)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
