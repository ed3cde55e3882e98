"""Sources of images: random access to the encoded images of a data set and their labels."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.json_format import ParseError

from mim_jax import UserError
from mim_jax.data.arrow import Rows, Table
from mim_jax.data.decode import MODES, BadImageError
from mim_jax.data.folder import Folder, select
from mim_jax.data.manifest import printable
from mim_jax.storage import MAX_JSON, in_bucket, is_file, open_path, read_json, require_access

BUILTIN = {"emoji": Path(__file__).parent / "builtin" / "emoji" / "1.0.0"}
ONE_AT_A_TIME = threading.Lock()


class Source(NamedTuple):
    """`examples[i]` is {"image": encoded bytes, "label": int, where there are labels}."""

    examples: Any
    num_labels: int
    fingerprint: dict  # name, version, split and number of examples; equal for equal examples
    mode: str  # mode of most images, as in decode.Header
    name_of: Callable[[int], str]  # origin of example i, for messages
    unread: Sequence[tuple[str, str]] = ()  # names and reasons of files that are not used
    class_names: Sequence[str] = ()  # in the order of the labels
    classes: Any = None  # masks.Classes, the classes of pixels, if there are masks
    sizes: np.ndarray | None = None  # height and width of each image (n, 2), if known


def open_sources(
    name: str, splits: Sequence[str], data_dir: str = "", labels: str = ""
) -> list[Source]:
    """Opens the splits of a data set. Nothing is decoded, and TensorFlow is not imported.

    Args:
        name: `emoji` is built in; `folder:PATH` is any tree of images, or a tar file (see
            folder.py); `tfds:PATH` a folder that TFDS or `mim_jax.data.prepare` wrote; any other
            name a data set that TFDS prepared in array_record files in `data_dir`. Paths may be
            local or gs://.
        splits: "validation" is replaced by "test" if there is none, as in CIFAR's data sets.
        labels: of a folder: "folder", or the path of a CSV file, or "" for none.
    """
    if name in ("", "folder:", "tfds:", "hf:"):
        raise UserError(f"data.name = {name!r} has no path: set folder:PATH, tfds:PATH or hf:PATH.")
    if name.startswith("folder:"):
        folder = Folder(name.removeprefix("folder:"), labels)
        return [of_folder(folder, split) for split in splits]
    if name.startswith("hf:"):
        table = Table(name.removeprefix("hf:"), labels)
        return [of_table(table, split) for split in splits]
    if labels:
        raise UserError(
            f"data.labels = {labels!r} is for data.name=folder:PATH; {name!r} has its own labels."
        )
    builder = builder_of(name, data_dir)
    if "image" not in builder.info.features:
        has = ", ".join(builder.info.features)
        raise UserError(f"data set {name!r} has no images; its features are {has}.")
    return [of_tfds(builder, name, split) for split in splits]


def of_folder(folder: Folder, split: str) -> Source:
    """Returns a split of a folder."""
    examples = folder.examples(split)
    return Source(
        examples,
        num_labels=len(folder.label_names),
        fingerprint=dict(
            name="folder", version=examples.digest(), split=split, examples=len(examples)
        ),
        mode=folder.mode,
        name_of=lambda i: printable(examples.name(i)),
        unread=[(printable(name), reason) for name, reason in folder.unread],
        class_names=folder.label_names,
    )


def of_table(table: Table, split: str) -> Source:
    """Returns a split of a folder of Parquet or Arrow files."""
    rows = Rows(table, select(table.splits(), split, table.root))
    return Source(
        rows,
        num_labels=len(table.class_names),
        fingerprint=dict(name="hf", version=rows.digest(), split=split, examples=len(rows)),
        mode=rows.mode(),
        name_of=rows.name,
        unread=[(printable(name), reason) for name, reason in table.unread],
        class_names=table.class_names,
    )


class Records:
    """Image and label of the examples that TFDS prepared in `place`, a folder or a bucket."""

    def __init__(self, records: Sequence[dict], labeled: bool, place: str):
        self.records, self.labeled, self.place = records, labeled, place

    def __len__(self) -> int:
        return len(self.records)

    def read(self, i: int) -> dict:
        """Reads record i.

        Raises:
            BadImageError: if it, or the file that it is in, is damaged.
            UserError, BucketError: if it is in a bucket that is forbidden, or fails.
        """
        try:
            return self.records[i]
        except (RuntimeError, ValueError, OSError) as error:
            require_access(self.place, error)
            reason = str(error).split(";")[0].split(" (")[0]
            raise BadImageError(f"its record cannot be read: {reason}") from error

    def __getitem__(self, i: int) -> dict:
        record = self.read(i)
        example = {"image": record["image"]}
        return example | {"label": np.int32(record["label"])} if self.labeled else example


def of_tfds(builder: tfds.core.DatasetBuilder, name: str, split: str) -> Source:
    """Returns a split of a prepared data set."""
    features, splits = builder.info.features, builder.info.splits
    if split == "validation" and "validation" not in splits and "test" in splits:
        split = "test"
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UserError(
            f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}."
        ) from error
    if count < 1:
        raise UserError(f"split {split!r} of data set {name!r} is empty.")
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    labeled = "label" in features
    examples = Records(records, labeled=labeled, place=str(builder.data_path))

    def name_of(i: int) -> str:
        with contextlib.suppress(BadImageError):
            if file := examples.read(i).get("file_name", b""):
                return printable(os.fsdecode(file))
        return f"{split}, example {i}"

    name, version, note = builder.name, str(builder.version), builder.info.metadata or {}
    if "digests" in note:  # prepared from a folder, with its examples in the same order
        name, version = "folder", note["digests"].get(split, "+".join(note["digests"].values()))
    label = features["label"] if labeled else None
    return Source(
        examples,
        num_labels=label.num_classes if label else 0,
        fingerprint=dict(name=name, version=version, split=split, examples=count),
        mode=note["mode"] if "mode" in note else mode_of(features["image"]),
        name_of=name_of,
        class_names=label.names if label else (),
    )


def mode_of(image: tfds.features.Image) -> str:
    """Returns the mode of a feature's images, as in decode.Header."""
    dtype, channels = np.dtype(image.np_dtype), image.shape[-1] or 3
    return MODES[channels] if dtype == "uint8" and channels in MODES else f"{dtype} x {channels}"


@contextlib.contextmanager
def only_features_of_tfds() -> Iterator[None]:
    """Makes TFDS refuse features that are not its own.

    The file features.json of a data set names the classes of its features, and TFDS imports the
    modules that it names: a data set of a stranger could execute code.
    """
    connector = tfds.features.FeatureConnector
    find = connector.__dict__["cls_from_name"]

    def find_known(cls: type, name: str) -> type:
        if not str(name).startswith("tensorflow_datasets.core.features."):
            raise UserError(
                f"features.json of the data set names the class {printable(str(name))}, which is "
                "not a feature of TFDS; it is not imported."
            )
        return find.__get__(None, cls)(name)

    with ONE_AT_A_TIME:
        connector.cls_from_name = classmethod(find_known)
        try:
            yield
        finally:
            connector.cls_from_name = find


def require_metadata(folder: epath.Path) -> None:
    """Raises ValueError if files of a prepared data set are not read in bounded time and memory."""
    if in_bucket(folder) or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.exists() and not path.is_dir() and not is_file(path):
            raise ValueError(f"{printable(path.name)} is not a file")
        if path.suffix == ".json":
            content = read_json(path)
            if path.name == "metadata.json":
                require_note(content)
        elif path.suffix == ".txt" and path.stat().length > MAX_JSON:
            raise ValueError(f"{printable(path.name)} is longer than {MAX_JSON / 2**20:.0f} MiB")


def require_note(note: Any) -> None:
    """Raises ValueError if the metadata that `mim-jax prepare` writes have other types."""
    digests = note.get("digests", {}) if isinstance(note, dict) else None
    if not isinstance(digests, dict) or not isinstance(note.get("mode", ""), str):
        raise ValueError("metadata.json has entries of other types")
    if not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError("the digests in metadata.json are not texts")


def builder_of(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a prepared data set."""
    path = BUILTIN.get(name) or (name.startswith("tfds:") and name.removeprefix("tfds:"))
    if path:
        try:
            require_metadata(open_path(path))
            with only_features_of_tfds():
                return tfds.builder_from_directory(open_path(path))
        except (tfds.core.dataset_info.DatasetInfoFileError, FileNotFoundError) as error:
            raise UserError(
                f"{path} is not a data set of TFDS or `mim-jax prepare`: set data.name=tfds:PATH "
                "to a folder with a dataset_info.json."
            ) from error
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, ParseError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the metadata of {path} cannot be read: {reason}.") from error
    command = f"mim-jax prepare {name} --data_dir=FOLDER"
    choices = f"{', '.join(BUILTIN)}, folder:PATH, tfds:PATH, or a data set of TFDS"
    if Path(name).expanduser().exists():
        choices = f"folder:{name} for this path, {choices}"
    if ":" in name:  # a TFDS namespace, whose code would be downloaded
        raise UserError(f"data.name = {name!r} is not a data set: set it to {choices}.")
    try:
        with only_features_of_tfds():
            folder = open_path(data_dir) if data_dir else None
            builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"there is no data set {name!r}: set data.name to {choices}.") from error
    except ValueError as error:
        if "File format is already set" not in str(error):
            raise UserError(
                f"data.name = {name!r} is not a data set: set it to {choices}."
            ) from error
        raise UserError(
            f"data set {name!r} is prepared in a file format without random access: prepare it "
            f"again in another folder, by {command}."
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"data set {name!r} is not prepared in {builder.data_path}: set its folder with "
            f"--config.data.data_dir, or prepare it by {command}."
        )
    return builder
