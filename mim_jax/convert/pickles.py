"""Reads PyTorch's pickles with bounded work, and without executing code.

A pickle is a program: it can call any function, and a few hundred bytes can make Python's unpickler
allocate gigabytes or run for years. This interpreter accepts a fixed list of names and replaces
each by a container, a tensor or an inert object. Every opcode does a constant amount of work, so
the limit on the number of opcodes bounds time and memory.
"""

import math
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

MAX_OPCODES = 2**20
MAX_NODES = 2**19  # entries of nested containers
MAX_DEPTH = 64  # depth of nested containers
MAX_CHARACTERS = 2**26  # total length of all names

DTYPES = {  # NumPy dtypes by PyTorch's names
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("complex64", "complex128"),
    )
}
STORAGES = {  # others are bytes of any dtype
    **{"torch.DoubleStorage": "float64", "torch.FloatStorage": "float32"},
    **{"torch.HalfStorage": "float16", "torch.BFloat16Storage": "bfloat16"},
    **{"torch.LongStorage": "int64", "torch.IntStorage": "int32", "torch.ShortStorage": "int16"},
    **{"torch.CharStorage": "int8", "torch.ByteStorage": "uint8", "torch.BoolStorage": "bool"},
    **{"torch.ComplexFloatStorage": "complex64", "torch.ComplexDoubleStorage": "complex128"},
}


class RefusedError(Exception):
    """A pickle refers to a name that is not allowed, or exceeds a limit."""


class Inert:
    """Replaces an object of any class: it keeps the state and does nothing."""

    def __init__(self, name: str):
        self.name = name
        self.state: Any = {}


class Storage(NamedTuple):
    """A named block of bytes in the file."""

    key: str
    dtype: np.dtype | None


class Tensor(NamedTuple):
    """A view of a storage whose values are not read yet."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, content: bytes) -> np.ndarray:
        """Returns the array. Raises ValueError if it is not within the storage's content."""
        values = np.frombuffer(content, self.dtype)
        ends = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        if math.prod(self.shape) and self.offset + sum(ends) >= len(values):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [stride * values.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides)
        return view if view.flags.c_contiguous and view.size == len(values) else np.array(view)


def is_sizes(value: Any) -> bool:
    """Returns whether a value is a tuple of numbers that an array's shape can have."""
    is_short = isinstance(value, tuple) and len(value) <= 64
    return is_short and all(isinstance(x, int) and 0 <= x < 2**48 for x in value)


def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Tensor | Inert:
    """Returns a tensor: torch's _rebuild_tensor, v2, and v3, whose `more` has a dtype."""
    valid = isinstance(storage, Storage) and is_sizes((offset,))
    if not (valid and is_sizes(shape) and is_sizes(strides) and len(shape) == len(strides)):
        raise RefusedError("it has a tensor of unknown form")
    dtype = more[2] if len(more) > 2 else storage.dtype
    known = isinstance(dtype, np.dtype)  # others, such as float4, have no type in NumPy
    return Tensor(storage, dtype, offset, shape, strides) if known else Inert("torch.Tensor")


def first(*values: Any) -> Any:
    """Returns the first argument, as a copy of a container or the content of a wrapper."""
    return values[0] if values else None


def mapping(pairs: Any = ()) -> dict:
    """Replaces OrderedDict and Counter: returns a dict of the pairs, or the dict itself."""
    if isinstance(pairs, dict):
        return pairs
    mapping: dict = {}
    for key, value in pairs:
        set_item(mapping, key, value)
    return mapping


def set_item(target: dict, key: Any, value: Any) -> None:
    """Sets an item of a dict. Keys that are not scalars are replaced: hashing them may be slow."""
    is_scalar = key is None or isinstance(key, bool | int | float | str | bytes)
    target[key if is_scalar else object()] = value


FUNCTIONS: dict[str, Callable] = {
    "collections.OrderedDict": mapping,
    "collections.Counter": mapping,
    "torch.Size": first,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": tensor,
    "torch._utils._rebuild_parameter": first,
    "torch._utils._rebuild_parameter_with_state": first,
    "torch.nn.parameter.Parameter": first,
}
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # calls the first of its arguments
INERT = (  # read by torch's weights_only or common in checkpoints; never part of the weights
    *("builtins.set", "builtins.bytearray", "builtins.complex"),
    *(FROM_TYPE, "_codecs.encode", "argparse.Namespace", "torch.device"),
    *("torch.serialization._get_layout", "torch.storage.UntypedStorage"),
    *("torch.storage.TypedStorage",),
    *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar"),
    *("numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
    *("numpy._core.multiarray._reconstruct",),
)
INERT_TORCH = re.compile(r"torch\.((sparse\.)?\w+(Tensor|Storage)|(q?u?int|float|bits|per_)\w+)")
INERT_PREFIXES = ("dall_e.", "torch.nn.modules.", "torch._utils._rebuild_")


def find(name: str) -> Any:
    """Returns the replacement of a name. Raises RefusedError if the name is not allowed."""
    name = name.replace("torch.cuda.", "torch.").replace("__builtin__.", "builtins.")
    module, _, attribute = name.rpartition(".")
    if module == "torch" and attribute in DTYPES:
        return DTYPES[attribute]
    if (
        name in (*FUNCTIONS, *INERT)
        or name.startswith(INERT_PREFIXES)
        or INERT_TORCH.fullmatch(name)
    ):
        return Inert(name)
    raise RefusedError(f"it refers to {name}")


def storage(reference: Any) -> Any:
    """Returns the object of a persistent id: a storage, or the class of a module."""
    if isinstance(reference, tuple) and len(reference) > 1 and reference[0] == "module":
        return reference[1]
    if isinstance(reference, tuple) and len(reference) > 2 and reference[0] == "storage":
        kind, key, view = reference[1], reference[2], reference[5:]
        if isinstance(kind, Inert) and isinstance(key, str) and view in ((), (None,)):
            return Storage(key, DTYPES.get(STORAGES.get(kind.name, "")))
    raise RefusedError("it refers to an unknown storage")


CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


class Machine:
    """The stack and the memo of a pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.work = 0  # number of items that calls have read

    def call(self, function: Any, values: Any) -> Any:
        """Calls the replacement of a function or class with a tuple of arguments."""
        if not isinstance(function, Inert) or not isinstance(values, tuple):
            raise RefusedError("it calls something that is not a function")
        self.work += len(values) + sum(len(x) for x in values if isinstance(x, list | tuple))
        if self.work > MAX_OPCODES:
            raise RefusedError(f"its calls read more than {MAX_OPCODES:,} items")
        if function.name == FROM_TYPE:
            return self.call(values[0], values[2])
        if function.name not in FUNCTIONS:
            return Inert(function.name)
        return FUNCTIONS[function.name](*values)

    def pop_mark(self) -> list:
        """Pops and returns the items above the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def set_items(self, target: Any, items: list) -> None:
        """Sets items of a dict: keys and values in turn."""
        if not isinstance(target, dict):
            raise RefusedError("it sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(target, key, value)

    def extend(self, target: Any, values: list) -> None:
        """Appends values to a list."""
        if not isinstance(target, list):
            raise RefusedError("it appends to something that is not a list")
        target.extend(values)

    def step(self, name: str, value: Any) -> None:
        """Runs one opcode."""
        stack, push = self.stack, self.stack.append
        if name in VALUES:
            if isinstance(value, int) and value.bit_length() > 4096:
                raise RefusedError("it has a number of more than 4096 bits")
            push(value)
        elif name in CONSTANTS:
            push(CONSTANTS[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            push(self.memo[value])
        elif name in ("TUPLE", "LIST"):
            push((tuple if name == "TUPLE" else list)(self.pop_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            values = tuple(stack[-count:])
            del stack[-count:]
            push(values)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self.set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if name == "APPEND" else self.pop_mark()
            self.extend(stack[-1], values)
        elif name == "DICT":
            target: dict = {}
            self.set_items(target, self.pop_mark())
            push(target)
        elif name == "GLOBAL":
            push(find(value.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            push(find(f"{module}.{attribute}" if isinstance(module, str) else ""))
        elif name in ("REDUCE", "NEWOBJ"):
            values = stack.pop()
            push(self.call(stack.pop(), values))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert) and isinstance(state, dict):
                stack[-1].state = state
        elif name == "BINPERSID":
            push(value := storage(stack.pop()))
            if isinstance(value, Storage):
                self.storages[value.key] = value
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"it uses the opcode {name}")


def unpickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle of bytes in memory. Returns its object and the storages that it refers to.

    Raises RefusedError for names that are not allowed and for too many opcodes, and other
    exceptions for damaged bytes.
    """
    machine = Machine()
    for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
        if count > MAX_OPCODES:
            raise RefusedError(f"it has more than {MAX_OPCODES:,} opcodes")
        if opcode.name == "STOP":
            return machine.stack.pop(), machine.storages
        machine.step(opcode.name, value)
    raise ValueError("it has no end")


def tensors(tree: Any) -> dict[str, Tensor]:
    """Returns the tensors of nested dicts and modules, by their names joined with dots.

    Raises RefusedError if there are too many names: containers may contain others repeatedly.
    """
    named, nodes, characters = {}, 0, 0
    stack = [("", 0, tree)]
    while stack:
        prefix, depth, node = stack.pop()
        if isinstance(node, Tensor):
            named[prefix] = node
            continue
        items = [item for part in parts_of(node) for item in part.items()]
        nodes, characters = nodes + 1 + len(items), characters + len(prefix)
        if nodes > MAX_NODES or depth > MAX_DEPTH or characters > MAX_CHARACTERS:
            raise RefusedError("its containers are nested too deeply or have too many entries")
        for name, value in reversed(items):
            if isinstance(value, dict | Tensor | Inert) and isinstance(name, str | int):
                stack.append((f"{prefix}.{name}" if prefix else str(name), depth + 1, value))
    return named


def parts_of(tree: Any) -> list[dict]:
    """Returns the dicts whose entries belong to a dict or a module."""
    if isinstance(tree, Inert):
        names = ("_parameters", "_buffers", "_modules")
        return [part for name in names if isinstance(part := tree.state.get(name), dict)]
    return [tree] if isinstance(tree, dict) else []
