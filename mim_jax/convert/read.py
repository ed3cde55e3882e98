"""Reads PyTorch and safetensors files of weights, without executing code in them.

Torch is not needed. The memory that is allocated is bounded by the size of the file.
"""

import functools
import json
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Collection
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from mim_jax import UserError
from mim_jax.convert import pickles
from mim_jax.convert.names import find, printable, unwrap
from mim_jax.convert.pickles import RefusedError, Tensor

LEGACY = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save before 1.6
MAX_PICKLE = 2**26  # bytes
MAX_HEADER = 2**23  # bytes of the JSON in a safetensors file
MAX_ARRAYS = 2**14
MAX_NAME = 256  # characters
FREE = 2**24  # bytes that may be allocated for a file of any size
PER_BYTE = 4  # further bytes per byte of the file, because shared weights are read twice
SAFETENSORS = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "C64": np.complex64},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
}
OTHERS = {  # other formats by their first bytes
    b"\x89HDF": "an HDF5 file, for example of Keras",
    b"\x93NUMPY": "a single NumPy array",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull",
    b"<": "a web page or XML, not a file of weights: download it again",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
}


class UnsupportedError(Exception):
    """A file is intact, but its format is not supported."""


class Contents(NamedTuple):
    """The contents of a file of weights."""

    arrays: dict[str, np.ndarray]  # {"blocks.0.norm1.weight": ..., ...}
    entries: dict[str, Any]  # numbers and texts stored with the weights
    entry: str = ""  # the entry that was chosen of several networks
    left_out: tuple[str, ...] = ()  # names of arrays that were not read


Loaders = dict[str, Callable[[], np.ndarray]]  # functions that load arrays, by name


class Budget:
    """The bytes that may still be allocated for a file."""

    def __init__(self, size: int, free: int = FREE):
        self.limit = self.left = free + PER_BYTE * size

    def spend(self, count: int) -> None:
        """Reduces the budget. Raises RefusedError if it is exhausted."""
        self.left -= count
        if self.left < 0:
            raise RefusedError(f"its content takes more than {self.limit / 2**20:,.1f} MiB")


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a file and its other entries. See `read_file`."""
    return read_file(path)[:2]


def read_file(path: str | Path, entry: str = "", whole: bool = False, free: int = FREE) -> Contents:
    """Reads a .safetensors file, or one that torch.save wrote.

    The latter may hold a state dict, a checkpoint that contains one under any key, or a module,
    such as DALL-E's encoder.pkl.

    Args:
        entry: the entry to read, if there are several networks.
        whole: whether to read all arrays, for a file that is one of several.
        free: bytes that may be allocated beyond a multiple of the file's size.

    Raises UserError for other files, damaged files, and pickles that call functions.
    """
    name = printable(path)
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise UnsupportedError("a pipe, not a file")
        with open(path, "rb") as file:
            start = file.read(512)
            size = file.seek(0, 2)
            file.seek(0)
            budget = Budget(size, free)
            if start.startswith(b"PK"):
                loaders, entries = from_zip(file, budget)
            elif start[8:9] == b"{":
                loaders, entries = from_safetensors(file)
            elif start.startswith(b"\x80"):
                loaders, entries = from_stream(file, budget, size)
            else:
                raise UnsupportedError(other(start))
            require_usual_names(loaders)
            names = unwrap(loaders)
            prefix, _, entry = ("", "", "") if whole else find(names, entry)
            arrays = {
                short.removeprefix(prefix): loaders[name]()
                for short, name in names.items()
                if short.startswith(prefix)
            }
            left_out = tuple(name for short, name in names.items() if not short.startswith(prefix))
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}.") from error
    except RefusedError as error:
        reason = printable(error)
        raise UserError(f"{name} is refused, and no code in it was executed: {reason}.") from error
    except UnsupportedError as error:
        raise UserError(f"{name} is {printable(error)}.") from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # damaged bytes raise exceptions of many types
        reason = printable(error) or type(error).__name__
        raise UserError(f"{name} is damaged or truncated: {reason}.") from error
    if not arrays:
        raise UserError(f"{name} contains no weights.")
    return Contents(arrays, entries, entry, left_out)


def require_usual_names(names: Collection[str]) -> None:
    """Limits the number and the length of names, because searching them takes time.

    Raises RefusedError.
    """
    if len(names) > MAX_ARRAYS:
        raise RefusedError(f"it has more than {MAX_ARRAYS:,} arrays")
    if long := [name for name in names if len(name) > MAX_NAME]:
        start = printable(long[0], 40)
        raise RefusedError(f"the name {start} is longer than {MAX_NAME} characters")


def other(start: bytes) -> str:
    """Returns the format of a file that begins with these bytes."""
    if not start:
        return "empty"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it"
    begins = f"not a file of weights: it begins with {start[:16]!r}"
    return next((text for magic, text in OTHERS.items() if start.startswith(magic)), begins)


def from_zip(file: BinaryIO, budget: Budget) -> tuple[Loaders, dict]:
    """Reads a file of torch.save 1.6 or later: a zip of a pickle and the bytes of storages."""
    archive = zipfile.ZipFile(file)
    names = set(archive.namelist())
    pickled = [name for name in names if f"/{name}".endswith("/data.pkl")]
    if not pickled and all(name.endswith(".npy") for name in names):
        raise UnsupportedError(
            "a NumPy archive (.npz), as JAX's ViT repositories publish it; only PyTorch's and "
            "safetensors files can be read"
        )
    if len(pickled) != 1:
        raise UnsupportedError("a zip archive, but not one that torch.save wrote: unpack it")
    root = pickled[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        raise UnsupportedError("a TorchScript archive: save its state_dict() with torch.save")
    if f"{root}byteorder" in names and part(archive, f"{root}byteorder", budget) != b"little":
        raise UnsupportedError("a file of a big-endian machine: save it on another machine")
    if archive.getinfo(pickled[0]).file_size > MAX_PICKLE:
        raise RefusedError(f"its pickle is longer than {MAX_PICKLE / 2**20:.0f} MiB")
    tree, _ = pickles.unpickle(BytesIO(part(archive, pickled[0], budget)))
    content = functools.cache(lambda key: part(archive, f"{root}data/{key}", budget))
    return from_tree(tree, content, budget)


def part(archive: zipfile.ZipFile, name: str, budget: Budget) -> bytes:
    """Reads a member of a zip archive, at most as many bytes as its entry states."""
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusedError("it is compressed by another method than deflate")
    budget.spend(entry.file_size)
    with archive.open(entry) as member:
        return member.read(entry.file_size)  # without a size, it would be decompressed to its end


def from_stream(file: BinaryIO, budget: Budget, size: int) -> tuple[Loaders, dict]:
    """Reads a file of torch.save before 1.6: several pickles, then the bytes of storages."""
    stream = BytesIO(file.read(MAX_PICKLE))
    if pickles.unpickle(stream)[0] != LEGACY:
        raise UnsupportedError("a pickle, but not one that torch.save wrote")
    for _ in ("version", "system"):
        pickles.unpickle(stream)
    tree, storages = pickles.unpickle(stream)
    keys, _ = pickles.unpickle(stream)
    places, position = {}, stream.tell()
    for key in keys:
        file.seek(position)
        dtype = storages[key].dtype or np.dtype(np.uint8)
        (count,) = struct.unpack("<q", file.read(8))
        places[key] = position + 8, count * dtype.itemsize
        position += 8 + count * dtype.itemsize
        if count < 0 or position > size:
            raise ValueError("its storages do not fit into it")

    @functools.cache
    def content(key: str) -> bytes:
        start, length = places[key]
        file.seek(start)
        return file.read(length)

    return from_tree(tree, content, budget)


def from_tree(tree: Any, content: Callable[[str], bytes], budget: Budget) -> tuple[Loaders, dict]:
    """Returns loaders of the tensors of an unpickled object, and the scalars stored with them."""

    def load(tensor: Tensor) -> np.ndarray:
        budget.spend(tensor.nbytes)
        return tensor.array(content(tensor.storage.key))

    loaders: Loaders = {
        name: functools.partial(load, x) for name, x in pickles.tensors(tree).items()
    }
    entries = tree if isinstance(tree, dict) else {}
    return loaders, {
        k: v
        for k, v in entries.items()
        if isinstance(k, str | int) and isinstance(v, bool | int | float | str)
    }


def from_safetensors(file: BinaryIO) -> tuple[Loaders, dict]:
    """Reads a safetensors file with its library, which checks that arrays fill the file exactly."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER:
        raise RefusedError(f"its header is longer than {MAX_HEADER / 2**20:.0f} MiB")
    file.seek(0)
    content = file.read()
    views = dict(safetensors.deserialize(content))
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})

    def load(view: dict[str, Any]) -> np.ndarray:
        if view["dtype"] not in SAFETENSORS:
            raise UnsupportedError(f"a file with arrays of type {view['dtype']}, unknown to NumPy")
        return np.frombuffer(view["data"], SAFETENSORS[view["dtype"]]).reshape(view["shape"])

    return {name: functools.partial(load, view) for name, view in views.items()}, metadata
