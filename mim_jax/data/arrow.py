"""Reads the Parquet and Arrow files of Hugging Face's `datasets` as a source, with pyarrow.

A folder may hold the files of a repository (`data/train-00000-of-00002.parquet`, or one folder per
split), or the output of `save_to_disk`. The names of files and folders determine the splits (see
layout.py). Arrow files are mapped into memory. Parquet files have no random access to single rows:
the whole row group of an image is read, so row groups should be small.
"""

import functools
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from mim_jax import UserError
from mim_jax.data.decode import BadImageError, header
from mim_jax.data.labels import number_labels
from mim_jax.data.layout import SPLITS, split_of
from mim_jax.data.manifest import printable, walk
from mim_jax.storage import in_bucket

SUFFIXES = (".parquet", ".arrow")
PART = re.compile(  # "train-00000-of-00002-<digest>.parquet"
    r"(.*?)[-_.]?(\d{5,})-of-(\d{5,})(?:-[0-9a-f]+)?\.\w+$", re.DOTALL
)
FIRST = 8  # class names in messages
SAMPLE = 32  # images whose headers determine the mode
GROUPS = 8  # row groups of Parquet files that are kept in memory
LARGEST = 2**29  # bytes of the largest row group that is read


class Columns(NamedTuple):
    """The columns of images and labels of a data set."""

    image: str
    label: str  # "" for none
    class_names: list[str]  # names of a ClassLabel, otherwise []


class Table:
    """A folder of Parquet or Arrow files: `files` of each split, `counts` of their rows.

    Args:
        labels: the column of labels; "" for the column "label", or the only one of class labels.
    """

    def __init__(self, root: str, labels: str = ""):
        if find_spec("pyarrow") is None:
            raise UserError("data.name=hf:PATH needs pyarrow: pip install 'mim-jax[arrow]'.")
        if in_bucket(root):
            raise UserError(f"{root} must be local or mounted: mount the bucket with gcsfuse.")
        self.root = os.path.abspath(os.path.expanduser(root))
        paths, self.unread = list_files(self.root)
        self.files: dict[str, list[str]] = {}
        for path in paths:
            self.files.setdefault(split_name(os.path.relpath(path, self.root)), []).append(path)
        if not self.files:
            raise UserError(
                f"{self.root} holds no .parquet or .arrow files: set data.name=hf:PATH."
            )
        self.unread += missing_parts(self.root, paths)
        self.columns = common_columns(paths, labels, self.root)
        self.counts = {path: count_rows(path) for paths in self.files.values() for path in paths}
        self.class_names, self.numbers = self.number_labels()

    def number_labels(self) -> tuple[list[str], dict[Any, int]]:
        """Returns the names of labels, and the numbers of values that are not numbers already."""
        if not self.columns.label or self.columns.class_names:
            return self.columns.class_names, {}
        values = {v for path in self.counts for v in read_column(path, self.columns.label)}
        texts = {v: v.strip() if isinstance(v, str) else str(v) for v in values if not is_null(v)}
        where = f"the column {self.columns.label!r} of {self.root}"
        names, numbers = number_labels(where, texts.values())
        return names, {v: numbers[text] for v, text in texts.items() if text}

    def splits(self) -> dict[str, np.ndarray]:
        """Returns the rows of each split, counted over all files.

        If there is no `validation`, `test` takes its place.
        """
        splits, start = {}, 0
        for split, paths in self.files.items():
            count = sum(self.counts[path] for path in paths)
            splits[split] = np.arange(start, start + count)
            start += count
        if "validation" not in splits and "test" in splits:
            splits["validation"] = splits["test"]
        elif "validation" not in splits and "train" in splits:
            order = np.random.default_rng(0).permutation(splits["train"])  # often sorted by class
            held_out = max(1, len(order) // 20) if len(order) > 1 else 0
            splits["validation"] = np.sort(order[:held_out])
            splits["train"] = np.sort(order[held_out:])
        return splits


class Rows:
    """examples[i] is {"image": encoded bytes, "label": int, where there are labels}."""

    def __init__(self, table: Table, rows: np.ndarray):
        self.table, self.rows = table, rows
        self.paths = [path for paths in table.files.values() for path in paths]
        self.ends = np.cumsum([table.counts[path] for path in self.paths])

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, i: int) -> tuple[str, int]:
        """Returns the file of example i and its row there."""
        row = int(self.rows[i])
        file = int(np.searchsorted(self.ends, row, side="right"))
        return self.paths[file], row - (int(self.ends[file - 1]) if file else 0)

    def __getitem__(self, i: int) -> dict:
        columns = self.table.columns
        record = read_row(*self.place(i), columns.image, columns.label)
        image = record[columns.image]
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            path = image.get("path") if isinstance(image, dict) else None
            raise BadImageError(
                f"the row has no image, only the path {path!r}" if path else "no image"
            )
        if not columns.label:
            return {"image": content}
        return {"image": content, "label": np.int32(self.number_of(record.get(columns.label)))}

    def number_of(self, label: Any) -> int:
        """Returns the number of a label, -1 for none. Raises BadImageError for other values."""
        if is_null(label) or self.table.numbers:
            return self.table.numbers.get(label, -1)
        if isinstance(label, float) and label.is_integer():  # as in pandas' columns with gaps
            label = int(label)
        if isinstance(label, str) and label in self.table.class_names:
            return self.table.class_names.index(label)
        if not isinstance(label, int) or not -1 <= label < 2**31:
            raise BadImageError(f"its label is {label!r}, which is not the number of a class")
        return label

    def name(self, i: int) -> str:
        """Returns the file and the row of example i."""
        path, row = self.place(i)
        return printable(f"{os.path.relpath(path, self.table.root)}, row {row}")

    def mode(self) -> str:
        """Returns the mode of most of a sample of images, as in decode.Header."""
        modes: Counter[str] = Counter()
        for i in np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int):
            try:
                modes[header(BytesIO(self[i]["image"])).mode] += 1
            except BadImageError as error:
                reason = f"{self.name(i)}: {error}"
        if not modes:
            raise UserError(f"{self.table.root} holds no image that can be read; {reason}.")
        return modes.most_common(1)[0][0]

    def digest(self) -> str:
        """Returns a digest of the files' names and sizes and of the rows."""
        digest = hashlib.sha256(self.rows.tobytes())
        for path in self.paths:
            name = os.path.relpath(path, self.table.root)
            digest.update(os.fsencode(f"{name}\0{os.path.getsize(path)}\0"))
        digest.update(self.table.columns.label.encode())
        return digest.hexdigest()[:16]


def is_null(label: Any) -> bool:
    """Returns whether a value stands for no label: None or NaN."""
    return label is None or label != label


def is_arrow(path: str) -> bool:
    """Returns whether a file is named as an Arrow file, not as a Parquet file."""
    return path.lower().endswith(".arrow")


def list_files(root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the Parquet and Arrow files below a folder that are not hidden.

    Also returns names and reasons of those that cannot be read, such as broken links.
    """
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}: set data.name=hf:/path/to/files.")
    files, unread, _ = walk(root)
    paths = [
        os.path.join(root, file.name) for file in files if file.name.lower().endswith(SUFFIXES)
    ]
    return [path for path in paths if not os.path.basename(path).startswith("cache-")], unread


def missing_parts(root: str, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the starts of names of which numbered parts are missing, and how many.

    Raises UserError if files are parts of two divisions of the same split.
    """
    counts: dict[str, tuple[int, str]] = {}  # start of the names: number of parts, first path
    numbers: dict[str, set[int]] = defaultdict(set)
    for path in paths:
        if part := PART.match(os.path.relpath(path, root)):
            count, first = counts.setdefault(part[1], (int(part[3]), path))
            if count != int(part[3]):
                raise UserError(
                    f"{printable(first)} and {printable(path)} are parts of different divisions of "
                    "the same split: remove the files of one of them."
                )
            numbers[part[1]].add(int(part[2]))
    return [
        (printable(start), f"{count - len(numbers[start]):,} of {count:,} parts are missing")
        for start, (count, _) in counts.items()
        if len(numbers[start]) < count
    ]


def split_name(path: str) -> str:
    """Returns the split that the name of a file, or of its innermost folder, contains."""
    *folders, file = path.split(os.sep)
    part = PART.match(file)
    stem = part[1] if part else file.rpartition(".")[0]
    for name in (stem, *reversed(folders)):
        if word := split_of(name):
            return SPLITS[word]
    name = re.sub(r"\W", "_", folders[-1] if stem == "data" and folders else stem)
    return "train" if name in ("data", "default", "") or name.isdecimal() else name


def features_in(schema: Any) -> dict[str, dict]:
    """Returns the features in a schema's metadata, {column: feature}, {} if there are none."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored["info"]["features"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return {name: x for name, x in features if isinstance(x, dict) and name in schema.names}


def common_columns(paths: Sequence[str], labels: str, root: str) -> Columns:
    """Finds the columns of images and labels of several files; some may have no labels.

    Raises UserError if the files have other columns or classes than each other.
    """
    columns = {path: columns_of(schema_of(path), labels, root) for path in paths}
    first = next((path for path in paths if columns[path].label), paths[0])
    if labels and not columns[first].label:
        names = ", ".join(schema_of(first).names)
        raise UserError(f"data.labels = {labels!r} is not a column of {root}; it has {names}.")
    for path, (image, label, class_names) in columns.items():
        if image == columns[first].image and (not label or columns[path] == columns[first]):
            continue
        raise UserError(
            f"{printable(path)} and {printable(first)} have other columns or classes than each "
            f"other: images in {image!r} and {columns[first].image!r}, labels in {label!r} and "
            f"{columns[first].label!r}, classes {class_names[:FIRST]} and "
            f"{columns[first].class_names[:FIRST]}."
        )
    return columns[first]


def columns_of(schema: Any, labels: str, root: str) -> Columns:
    """Finds the columns of images and labels by the features of the schema's metadata."""
    features = features_in(schema)
    images = [name for name, x in features.items() if x.get("_type") == "Image"]
    images = images or [name for name in ("image", "img") if name in schema.names]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        problem = "several columns of images" if images else "no column of images"
        raise UserError(f"{root} has {problem}; its columns are {', '.join(schema.names)}.")
    classes = [name for name, x in features.items() if x.get("_type") == "ClassLabel"]
    if labels and labels not in schema.names:
        return Columns(images[0], "", [])
    if not labels and len(classes) > 1 and "label" not in classes:
        raise UserError(
            f"{root} has several columns of labels: set data.labels to one of {classes}."
        )
    label = labels or ("label" if "label" in schema.names else "".join(classes))
    if label and nested(schema.field(label).type):
        if not labels:
            return Columns(images[0], "", [])
        raise UserError(
            f"data.labels = {labels!r} is a column of {schema.field(label).type} in {root}, not of "
            "one label for each image: set it to another column."
        )
    names = features.get(label, {}).get("names")
    names = [printable(str(name)) for name in names] if isinstance(names, list) else []
    return Columns(images[0], label, names)


def nested(kind: Any) -> bool:
    """Returns whether a type of pyarrow is that of lists or records."""
    import pyarrow as pa

    return pa.types.is_nested(kind)


def schema_of(path: str) -> Any:
    """Returns the schema of a Parquet or Arrow file. Raises UserError if it cannot be read."""
    import pyarrow as pa

    try:
        return opened(path).schema if is_arrow(path) else opened(path).schema_arrow
    except UnicodeEncodeError as error:
        raise UserError(f"{printable(path)} cannot be read: its name is not UTF-8.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{printable(path)} cannot be read: {error}.") from error


@functools.cache
def opened(path: str) -> Any:
    """Returns an open ParquetFile, or the mapped table of an Arrow file; once per process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not is_arrow(path):
        return pq.ParquetFile(path)
    file = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(file).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(file).read_all()


def count_rows(path: str) -> int:
    """Returns the number of rows of a file. Raises UserError if it cannot be read."""
    schema_of(path)
    return opened(path).num_rows if is_arrow(path) else opened(path).metadata.num_rows


def read_column(path: str, column: str) -> Sequence:
    """Returns the values of a column of a file."""
    if column not in schema_of(path).names:
        return []
    table = opened(path) if is_arrow(path) else opened(path).read([column])
    return table[column].to_pylist()


def read_row(path: str, row: int, *columns: str) -> dict:
    """Returns the values of those columns that a file has in a row. Raises BadImageError."""
    names = [name for name in columns if name]
    try:
        if is_arrow(path):
            table = opened(path)
            return {x: table[x][row].as_py() for x in names if x in table.column_names}
        starts = group_starts(path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        size = opened(path).metadata.row_group(group).total_byte_size
        if size > LARGEST:
            raise BadImageError(f"its row group has {size:,} bytes: write smaller row groups")
        table = read_group(path, group, tuple(names))
        place = row - int(starts[group])
        return {x: table[x][place].as_py() for x in names if x in table.column_names}
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        raise BadImageError(f"cannot be read: {error}") from error


@functools.cache
def group_starts(path: str) -> np.ndarray:
    """Returns the first row of each row group of a Parquet file."""
    metadata = opened(path).metadata
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return np.cumsum([0, *counts[:-1]])


@functools.lru_cache(maxsize=GROUPS)
def read_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    """Reads a row group of a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:  # threads do not share a reader
        return file.read_row_group(group, columns=list(columns))
