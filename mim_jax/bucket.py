"""Buckets of Google Cloud Storage: connection, errors, logs, checksums and the lock of a run.

Paths in a bucket (etils.epath) are read and written by gcsfs, checkpoints by Orbax and TensorStore,
and what needs conditions or checksums by Google's own client.
"""

import atexit
import base64
import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

from etils import epath

from mim_jax import UserError

INTERVAL = 30.0  # seconds between two uploads of a log
LEASE = 60.0  # seconds without a renewal after which a lock may be taken over
TIMEOUT = 60.0  # seconds in which a small request must succeed, with its repetitions
READ_AHEAD = 2**23  # bytes that are read at a time where an object is read from start to end
LIBRARIES = ("aiohttp", "gcsfs", "google.api_core", "google.auth", "google.cloud")


class BucketError(Exception):
    """A bucket failed that could be used before: the same command continues later."""


def connect(url: str) -> None:
    """Prepares the use of a path in a bucket.

    Raises:
        UserError: if it is not in Google Cloud Storage, or the bucket is missing or forbidden.
        BucketError: if the bucket does not respond.
    """
    scheme, _, rest = url.partition("://")
    if scheme != "gs":
        raise UserError(f"{url}: only buckets of Google Cloud Storage, gs://, are supported.")
    name = rest.partition("/")[0]
    if not name or set("[]*?#") & set(rest):
        raise UserError(f"{url} must be gs://BUCKET/PATH, without any of [ ] * ? #.")
    check_access_once(name)


@functools.cache
def client() -> Any:
    """Returns the client of Google Cloud Storage, and sets up gcsfs for epath."""
    try:
        import aiohttp
        import fsspec
        import gcsfs  # noqa: F401 - imported by fsspec
        from google.cloud import storage
    except ImportError:
        raise UserError("a path in a bucket needs gcsfs: pip install 'mim-jax[gcs]'.") from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of every failure
    fsspec.config.conf["gs"] = {
        "use_listings_cache": False,  # other processes and TensorStore write, too
        "session_kwargs": {"timeout": aiohttp.ClientTimeout(total=TIMEOUT, sock_connect=10)},
    } | fsspec.config.conf.get("gs", {})
    with failures():
        return storage.Client(project=None)


@functools.cache
def file_system() -> Any:
    """Returns gcsfs, which reads parts of objects, also from several threads."""
    client()
    import fsspec

    return fsspec.filesystem("gs")


def check_access(name: str) -> None:
    """Lists objects of a bucket. Raises UserError or BucketError if that is not possible."""
    with failures(f"gs://{name}"):
        next(iter(client().list_blobs(name, max_results=1, **patience())), None)


check_access_once = functools.cache(check_access)


def require_access(url: str, error: Exception) -> None:
    """Raises UserError or BucketError if `error` is of the bucket, see storage.require_access."""
    place = bucket_of(url).root.rstrip("/")
    if "Retry policy exhausted" in str(error):  # of Google's client in array_record
        raise explain(error, place) from error
    check_access(place.removeprefix("gs://"))


def bucket_of(url: str) -> "Bucket":
    """Returns the bucket of a path, which is "gs://BUCKET/PATH"."""
    return Bucket(url.removeprefix("gs://").partition("/")[0])


def patience() -> dict[str, Any]:
    """Returns the options of a small request that limit its time."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return dict(timeout=TIMEOUT / 4, retry=DEFAULT_RETRY.with_timeout(TIMEOUT))


@contextlib.contextmanager
def failures(place: str = "the bucket") -> Iterator[None]:
    """Raises UserError for a bucket that is missing or forbidden, BucketError if it fails.

    `place` names the bucket in messages.
    """
    try:
        yield
    except (UserError, BucketError):
        raise
    except Exception as error:
        for cause in (error, error.__cause__):
            if cause is not None and is_of_bucket(cause):
                raise explain(cause, place) from error
        raise


def is_of_bucket(error: BaseException) -> bool:
    """Returns whether an error was raised by a library that accesses buckets."""
    trace, modules = error.__traceback__, [type(error).__module__]
    while trace is not None:
        modules.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    of_tensorstore = isinstance(error, ValueError) and (
        "gs://" in str(error) or "retry attempts failed" in str(error)
    )
    return of_tensorstore or any(module.startswith(LIBRARIES) for module in modules)


def explain(error: BaseException, place: str) -> UserError | BucketError:
    """Returns the error of a bucket in one sentence."""
    kind, text = type(error).__name__, " ".join(str(error).split())[:200]
    code = getattr(error, "code", None)
    if kind in ("NotFound", "FileNotFoundError") or code == 404:
        return UserError(f"{place} does not exist, or an object in it ({text}).")
    if kind in ("Forbidden", "Unauthorized") or code in (401, 403) or text.startswith("Forbidden"):
        return UserError(
            f"access to {place} is denied: the account needs the roles Storage Object User and "
            f"Storage Legacy Bucket Reader ({text})."
        )
    if kind in ("DefaultCredentialsError", "RefreshError"):
        return UserError(
            f"{place} needs credentials: run `gcloud auth application-default login`, or set "
            f"GOOGLE_APPLICATION_CREDENTIALS ({text})."
        )
    return BucketError(
        f"{place} does not respond or fails: run the same command again later; a run continues "
        f"from its newest checkpoint ({kind}: {text})."
    )


def checksum_of(file: IO[bytes], kind: str) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits, or "crc32c:..." as buckets give it."""
    if kind == "sha256":
        return hashlib.file_digest(file, kind).hexdigest()  # type: ignore[arg-type]
    try:
        import google_crc32c
    except ImportError:
        raise UserError(
            "the checkpoint comes from a bucket; its verification needs google-crc32c: "
            "pip install 'mim-jax[gcs]'."
        ) from None
    checksum = google_crc32c.Checksum()
    while part := file.read(1 << 20):
        checksum.update(part)
    return f"crc32c:{base64.b64encode(checksum.digest()).decode()}"


class Bucket:
    """A bucket of Google Cloud Storage; see storage.Storage."""

    appends = False
    checksum = "crc32c"

    def __init__(self, name: str):
        self.root = f"gs://{name}/"
        self.bucket = client().bucket(name)

    def absolute(self, path: epath.Path) -> epath.Path:
        return path

    def free(self, folder: epath.Path) -> float:
        return math.inf

    def write_text(self, path: epath.Path, text: str) -> None:
        path.write_text(text)

    def lines(self, path: epath.Path) -> "UploadedLines":
        return UploadedLines(self.blob(path), path.name)

    def fetched(self, path: epath.Path) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="mim_jax-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        name = str(path).removeprefix(self.root)
        missing = True
        for blob in self.bucket.list_blobs(prefix=name, **patience()):
            inside = blob.name.removeprefix(name)
            if (not inside or inside.startswith("/")) and not inside.endswith("/"):
                missing = False
                local = folder / (path.name + inside)
                local.parent.mkdir(parents=True, exist_ok=True)
                blob.download_to_filename(local, timeout=TIMEOUT)
        if missing:
            raise UserError(f"{path} does not exist.")
        return folder / path.name

    def objects(self, path: str) -> list[tuple[str, int, int]]:
        """Returns name, size and generation of objects, see storage.objects."""
        prefix = path.removeprefix(self.root).rstrip("/")
        fields = "items(name,size,generation),nextPageToken"
        with failures(path):
            blobs = list(self.bucket.list_blobs(prefix=prefix, fields=fields, **patience()))
        inside = ((blob.name.removeprefix(prefix), blob.size, blob.generation) for blob in blobs)
        return [
            (name.removeprefix("/"), size, generation)
            for name, size, generation in inside
            if not name.endswith("/") and (not prefix or not name or name.startswith("/"))
        ]

    def read(self, path: str, start: int, size: int) -> bytes:
        if not size:
            return b""
        try:
            with failures(path):
                return file_system().cat_file(path, start, start + size)
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "it does not exist", path) from error
            raise

    def open(self, path: str, size: int) -> BinaryIO:
        return io.BufferedReader(ObjectFile(self, path, size), READ_AHEAD)

    def blob(self, path: epath.Path) -> Any:
        """Returns the object of a path, which need not exist."""
        return self.bucket.blob(str(path).removeprefix(self.root))

    def checksums(self, folder: epath.Path, kind: str, but: Collection[str]) -> dict[str, str]:
        prefix = str(folder).removeprefix(self.root) + "/"
        blobs = {
            blob.name.removeprefix(prefix): blob
            for blob in self.bucket.list_blobs(prefix=prefix, **patience())
            if blob.name.rpartition("/")[2] not in ("", *but)
        }
        if kind == self.checksum:  # the bucket has computed it
            return {name: f"crc32c:{blob.crc32c}" for name, blob in blobs.items()}

        def checksum(blob: Any) -> str:
            with blob.open("rb") as file:
                return checksum_of(file, kind)

        with ThreadPoolExecutor() as pool:
            return dict(zip(blobs, pool.map(checksum, blobs.values()), strict=True))

    def lock(self, folder: epath.Path) -> "Lease":
        return Lease(self.blob(folder / "lock"), str(folder.parent))

    def locked(self, folder: epath.Path) -> bool | None:
        lock = self.bucket.get_blob(self.blob(folder / "lock").name, **patience())
        return lock is not None and time.time() - lock.updated.timestamp() < LEASE

    @contextlib.contextmanager
    def staged(self, folder: epath.Path) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mim_jax-") as local:
            yield Path(local)
            for path in Path(local).rglob("*"):
                if path.is_file():
                    name = folder / str(path.relative_to(local))
                    self.blob(name).upload_from_filename(path, timeout=TIMEOUT)


class ObjectFile(io.RawIOBase):
    """An object of a bucket as a file."""

    def __init__(self, bucket: Bucket, path: str, size: int):
        self.bucket, self.path, self.size, self.at = bucket, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        content = self.bucket.read(self.path, self.at, count)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


class UploadedLines:
    """Lines in a bucket, which cannot append: the whole object is uploaded every INTERVAL seconds.

    Therefore each process writes an object of its own, a part of the file.
    """

    def __init__(self, blob: Any, name: str):
        self.blob, self.name = blob, name
        self.text = self.stored = ""
        self.uploading = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds an object, which is stored within INTERVAL seconds."""
        if not self.text:
            threading.Thread(target=self.upload_repeatedly, daemon=True).start()
        self.text += json.dumps(record) + "\n"

    def upload_repeatedly(self) -> None:
        while True:
            time.sleep(INTERVAL)
            self.flush()

    def flush(self) -> None:
        """Uploads the lines. A failure is printed; the next call repeats the upload."""
        with self.uploading:
            text = self.text
            if text == self.stored:
                return
            try:
                with failures():
                    self.blob.upload_from_string(text, "application/json", **patience())
                self.stored = text
            except (UserError, BucketError) as error:
                reason = type(error.__cause__ or error).__name__
                print(
                    f"warning: {self.name} could not be uploaded ({reason}): another attempt "
                    f"follows within {INTERVAL:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )


class Lease:
    """A lock in a bucket: an object that its holder writes again every LEASE / 4 seconds.

    Every write is conditional on the generation of the object that the writer has seen, so that two
    processes cannot both succeed. The lock of a process that ended without releasing it is taken
    over: at once if the process was on this machine, otherwise when the object has not changed for
    LEASE seconds.
    """

    def __init__(self, blob: Any, place: str):
        self.blob, self.place = blob, place
        self.holder = {
            "name": f"process {os.getpid()} on {platform.node()}",
            "id": uuid.uuid4().hex,
            "machine": machine(),
            "process": os.getpid(),
        }
        self.lost = False
        with failures():
            self.generation = self.acquire()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.renew, daemon=True)
        self.thread.start()

    def acquire(self) -> int:
        """Writes the object when it is free or abandoned. Returns its generation."""
        generation = self.write(0)
        if generation is None:
            seen, holder = self.read()
            if seen and not has_ended(holder):
                seen = self.wait(seen, holder)
            generation = self.write(seen)
        if generation is None:
            raise self.in_use({})
        return generation

    def wait(self, seen: int, holder: Mapping[str, Any]) -> int:
        """Waits until the object is released or abandoned. Returns the generation to replace."""
        name = holder.get("name", "another process")
        print(f"{self.place} is locked by {name}: waiting for {LEASE:.0f} s at most", flush=True)
        end = time.monotonic() + LEASE
        while time.monotonic() < end:
            time.sleep(LEASE / 30)
            generation, holder = self.read()
            if not generation:
                return 0
            if generation != seen:
                raise self.in_use(holder)
        return seen

    def in_use(self, holder: Mapping[str, Any]) -> UserError:
        name = holder.get("name", "another process")
        return UserError(f"{self.place} is in use by {name}: wait until it ends, or stop it.")

    def read(self) -> tuple[int, dict[str, Any]]:
        """Returns the generation of the object, 0 if there is none, and its holder."""
        blob = self.blob.bucket.get_blob(self.blob.name, **patience())
        if blob is None:
            return 0, {}
        try:
            return blob.generation, json.loads(blob.download_as_bytes(**patience()))
        except Exception as error:
            if type(error).__name__ not in ("NotFound", "JSONDecodeError"):
                raise
            return blob.generation, {}

    def write(self, seen: int) -> int | None:
        """Writes the object if its generation is `seen`. Returns its new generation, or None."""
        from google.api_core.exceptions import PreconditionFailed

        try:
            self.blob.upload_from_string(
                json.dumps(self.holder), if_generation_match=seen, **patience()
            )
        except PreconditionFailed:
            generation, holder = self.read()  # a repeated request may have succeeded before
            return generation if holder.get("id") == self.holder["id"] else None
        return self.blob.generation

    def renew(self) -> None:
        """Writes the object until the lock is released or lost."""
        while not self.ended.wait(LEASE / 4):
            with contextlib.suppress(UserError, BucketError), failures():
                generation = self.write(self.generation)
                if generation is None:
                    self.lost = True
                    return
                self.generation = generation

    def check(self) -> None:
        if self.lost:
            raise UserError(f"{self.place} was taken over by another process: this one stops.")

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        if not self.lost:
            with contextlib.suppress(UserError, BucketError), failures():
                self.blob.delete(if_generation_match=self.generation, **patience())


def machine() -> str:
    """Returns what identifies a running machine and its numbers of processes, "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def has_ended(holder: Mapping[str, Any]) -> bool:
    """Returns whether a process is known to have ended: it was on this machine, or on a disk."""
    if "id" not in holder:  # the lock of a run that was copied from a disk
        return True
    if not machine() or holder.get("machine") != machine():
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
