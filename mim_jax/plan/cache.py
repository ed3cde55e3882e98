"""A cache of the compiler's results in files, because compiling a large step takes minutes."""

import contextlib
import gzip
import hashlib
import importlib.metadata
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "libtpu")  # a change of their version changes compiled programs


def file_of(folder: str, key: Sequence[str]) -> Path | None:
    """Returns the file of the result for a key, or None without a folder."""
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    return Path(folder).expanduser() / "plan" / f"{name}.gz" if folder else None


def versions() -> list[str]:
    """Returns the versions of the packages that compile."""
    installed = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed.append(f"{name} {importlib.metadata.version(name)}")
    return installed


def read(file: Path | None) -> bytes:
    """Returns the content of a file, or b"" if it is missing or damaged."""
    with contextlib.suppress(OSError, EOFError, zlib.error):
        return gzip.decompress(file.read_bytes()) if file else b""
    return b""


def write(file: Path | None, content: bytes) -> None:
    """Writes a file atomically. A folder that cannot be written is not an error."""
    if not file:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")  # several processes may write it
        part.write_bytes(gzip.compress(content))
        os.replace(part, file)
