"""Reads weights that others wrote, PyTorch's files too, and runs nothing that stands in them.

A pickle is a program: it may name any function there is and have it called. Here it gets a short
list of names, each of which stands for something inert, and is refused at the first other one.
Torch is not needed.
"""

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from mim_jax import UserError

STORAGES = {  # by their names in torch
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
SAFETENSORS = dict(
    zip(
        ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"),
        STORAGES.values(),
        strict=True,
    )
)
WRAPPERS = ("model", "state_dict", "module", "weights")  # under which others keep the weights
LEGACY = 0x1950A86A20F9469CFC6C  # how torch before 1.6 begins


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> arrays {"blocks.0.norm1.weight": ..., ...}, and the numbers and texts beside them.

    Takes .safetensors and whatever torch.save wrote of weights: a state dict, alone or as the entry
    `model`, `state_dict`, `module` or `weights` of a checkpoint, or a module, as DALL-E's
    encoder.pkl. Raises UserError for all else, for what is cut off, and for what wants a call.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            file.seek(0)
            if start.startswith(b"PK"):
                arrays, metadata = from_zip(file)
            elif start[8:9] == b"{":
                arrays, metadata = from_safetensors(file)
            elif start.startswith(b"\x80"):
                arrays, metadata = from_stream(file)
            else:
                raise UserError(f"{path} is not a file of weights: it begins with {start!r}.")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except RefusedError as error:
        raise UserError(f"{path} is refused, and nothing in it was run: {error}.") from error
    except UserError:
        raise
    except Exception as error:  # whatever broken bytes bring about
        raise UserError(f"{path} is damaged or cut off: {error}.") from error
    if not arrays:
        raise UserError(f"{path} holds no weights.")
    return arrays, metadata


class RefusedError(Exception):
    """A pickle names what is not on the list."""


class Inert:
    """Stands for an object of whatever class: it keeps what it is given, and does nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)


class Tensor(NamedTuple):
    """A view of a storage whose values may not be read yet."""

    storage: str  # its key
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, values: np.ndarray) -> np.ndarray:
        """This view of the storage's values, which it must not leave."""
        ends = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        if min(self.offset, *self.shape, *self.strides, 0) < 0 or (
            math.prod(self.shape) and self.offset + sum(ends) >= len(values)
        ):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [stride * values.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides)
        return np.array(view)


class Unpickler(pickle.Unpickler):
    """Builds containers, storages and tensors, of modules an inert image, and nothing else."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.dtypes = {}  # of the storages, by key
        self.names = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "__builtin__.set": set,
            "torch.Size": tuple,
            "torch.device": lambda *place: ":".join(map(str, place)),
            "argparse.Namespace": type("Namespace", (Inert,), {}),
            "torch._utils._rebuild_tensor_v2": lambda *view: Tensor(*view[:4]),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        self.names |= {f"torch.{name}": dtype for name, dtype in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Callable:
        full = f"{module}.{name}"
        if full not in self.names and full.startswith(("dall_e.", "torch.nn.modules.")):
            self.names[full] = type(name, (Inert,), {})
        if full not in self.names:
            raise RefusedError(f"it asks for {full}")
        return self.names[full]

    def persistent_load(self, pid: tuple) -> Any:
        if pid[0] == "module":  # a class, and its source
            return pid[1]
        kind, dtype, key, _place, _count, *view = pid
        if kind != "storage" or dtype not in STORAGES.values() or any(view):
            raise RefusedError(f"it refers to {pid}")
        self.dtypes[str(key)] = np.dtype(dtype)
        return str(key)


def from_zip(file: BinaryIO) -> tuple[dict, dict]:
    """torch.save since 1.6: a zip of a pickle and of the storages' bytes."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        [root] = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its bytes are not in little-endian order")
        with archive.open(f"{root}data.pkl") as stream:
            unpickler = Unpickler(stream)
            tree = unpickler.load()

        def values(key: str) -> np.ndarray:
            return np.frombuffer(archive.read(f"{root}data/{key}"), unpickler.dtypes[key])

        return weights(tree, values)


def from_stream(file: BinaryIO) -> tuple[dict, dict]:
    """torch.save before 1.6: pickles one after the other, then the storages' bytes."""
    if Unpickler(file).load() != LEGACY:
        raise RefusedError("it is a pickle, but not one of torch's")
    for _ in ("version", "system"):
        Unpickler(file).load()
    unpickler = Unpickler(file)
    tree, stored = unpickler.load(), {}
    for key in Unpickler(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        dtype = unpickler.dtypes[key]
        stored[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    return weights(tree, stored.__getitem__)


def from_safetensors(file: BinaryIO) -> tuple[dict, dict]:
    """A header in JSON, then the arrays' bytes."""
    (size,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(size))
    metadata, arrays, content = header.pop("__metadata__", {}), {}, file.read()
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(content[begin:end], SAFETENSORS[entry["dtype"]])
        arrays[name] = values.reshape(entry["shape"])
    return arrays, metadata


def weights(tree: Any, values: Callable[[str], np.ndarray]) -> tuple[dict, dict]:
    """-> the arrays of an unpickled state dict, checkpoint or module, and what lies beside them."""
    beside = tree if isinstance(tree, dict) else {}
    tree = next((tree[key] for key in WRAPPERS if isinstance(beside.get(key), dict | Inert)), tree)
    metadata = {k: v for k, v in beside.items() if isinstance(v, bool | int | float | str)}
    return {name: tensor.array(values(tensor.storage)) for name, tensor in named(tree)}, metadata


def named(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts and modules, by their names joined with dots."""
    if isinstance(tree, Inert):
        parts = (vars(tree).get(part) or {} for part in ("_parameters", "_buffers", "_modules"))
        tree = {name: value for part in parts for name, value in part.items()}
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from named(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(tree, Tensor):
        yield prefix, tree
