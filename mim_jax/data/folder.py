"""A tree of images, or tar files of them, as a source: its splits and its labels.

Folders called train, validation and test are the splits, in any case and in other common spellings
(see layout.py); if there is no `validation`, `test` takes its place. In any other tree,
`validation` is a twentieth of all images, chosen by a hash of their names, and `train` the rest. As
in TFDS, a split may be a slice or a sum: `train[:1000]`, `train[10%:]`, `train+validation`, `all`.
The order is pseudorandom.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from posixpath import splitext

import numpy as np
import tensorflow_datasets as tfds

from mim_jax import UserError
from mim_jax.data.labels import from_table, label_in, number_labels
from mim_jax.data.layout import layout
from mim_jax.data.manifest import Manifest, in_threads, printable, scan
from mim_jax.storage import in_bucket

MASK_FOLDERS = ("masks", "annotations")  # beside images/
MASK = "it is a mask, which belongs to an image"
NO_FOLDER = -1  # folder number of a file that is not an image


class Folder:
    """A scanned folder: its images, their splits and labels.

    Args:
        root: a folder or a tar file, on a disk or in a bucket.
        labels: the source of the labels. "": no labels; "folder": the first folder below that of
            the split; "cls": a .cls file next to each image, as in WebDataset; "json:KEY": the
            value of KEY in a .json file next to each image; otherwise the path of a CSV file with
            one line per image, its path and its label.
        large: include TIFFs that are too large to be decoded whole.

    Attributes:
        names: names of the images.
        splits: {name: rows of the manifest}.
        labels: (images,), -1 for none, or None without labels.
        label_names: names of the labels.
        unread: names and reasons of files that are not used.
    """

    def __init__(self, root: str, labels: str = "", large: bool = False):
        self.manifest = scan(root, large)
        self.root = self.manifest.root
        given = root if in_bucket(root) else os.path.abspath(os.path.expanduser(root))
        self.names = os.fsdecode(self.manifest.names).split("\0")[:-1]
        self.unread = list(self.manifest.unread)
        if not self.names:
            reason = "it is empty"
            if self.unread:
                most = Counter(text for _, text in self.unread).most_common(1)[0][0]
                reason = f"for most of its {len(self.unread):,} files, the reason is: {most}"
            raise UserError(f"{self.root} holds no image that can be read: {reason}.")
        masks = mask_rows(self.names)
        self.unread += [(self.names[row], MASK) for row in sorted(masks)]
        folders: dict[str, int] = {}
        self.folder_of = [
            NO_FOLDER if row in masks else folders.setdefault(name.rpartition("/")[0], len(folders))
            for row, name in enumerate(self.names)
        ]
        tars = {tar.removesuffix(".tar") for tar in self.manifest.tars}
        self.layout = layout(list(folders), tars)
        self.splits = self.all_splits()
        self.how_labeled = labels
        self.labels: np.ndarray | None = None  # by row, -1 for none
        self.label_names: list[str] = []
        if labels:
            self.set_labels(labels, (self.root, given))

    def all_splits(self) -> dict[str, np.ndarray]:
        """Returns the rows of each split; a missing `validation` is replaced."""
        rows: dict[str, list[int]] = {}
        images = [row for row, folder in enumerate(self.folder_of) if folder != NO_FOLDER]
        for row in images if self.layout.splits else ():
            rows.setdefault(self.layout.splits[self.folder_of[row]], []).append(row)
        for row in rows.pop("", []):
            self.unread.append((self.names[row], "it is not in the folder of a split"))
        splits = {split: np.array(rows[split]) for split in sorted(rows)}
        if "validation" in splits:
            return splits
        if "test" in splits:
            splits["validation"] = splits["test"]
        elif "train" in splits or not splits:
            train = splits.get("train", np.array(images))
            held_out = max(1, len(train) // 20) if len(train) > 1 else 0
            splits["validation"], splits["train"] = train[:held_out], train[held_out:]
        return splits

    def distinct_splits(self) -> dict[str, "Examples"]:
        """Returns the examples of each split, without `validation` if it is the same as `test`."""
        splits = {split: self.examples(split) for split, rows in self.splits.items() if len(rows)}
        if "test" in splits and splits["validation"].digest() == splits["test"].digest():
            del splits["validation"]
        return splits

    def rows(self, split: str) -> np.ndarray:
        """Returns the rows of a split, or of a slice or a sum of splits.

        Raises UserError if there is no such split or it is empty.
        """
        return select(self.splits, split, self.root)

    @property
    def mode(self) -> str:
        """The mode that most images have, as in decode.Header."""
        return self.manifest.modes[np.bincount(self.manifest.rows["mode"]).argmax()]

    def examples(self, split: str) -> "Examples":
        """Returns the examples of a split. Raises UserError if some images lack a label."""
        rows = self.rows(split)
        if self.labels is None:
            return Examples(self.manifest, rows, None)
        labels = self.labels[rows]
        if len(without := rows[labels < 0]):
            raise UserError(
                f"data.labels = {self.how_labeled!r}: {len(without):,} of {len(rows):,} images of "
                f"split {split!r} have no label, or one that does not occur in train; the first is "
                f"{self.names[without[0]]!r}."
            )
        return Examples(self.manifest, rows, labels)

    def set_labels(self, labels: str, roots: Sequence[str]) -> None:
        """Reads the labels of all images."""
        where = f"data.labels = {labels!r}"
        if labels == "folder":
            texts = self.labels_by_folder()
            names = sorted(self.known_labels(texts))
            numbers = {text: number for number, text in enumerate(names)}
        else:
            if labels == "cls" or labels.startswith("json:"):
                texts = self.labels_by_files(labels)
            else:
                texts, missing = from_table(labels, self.names, roots)
                self.unread += [
                    (name, f"{labels} names it, but it is not an image") for name in missing
                ]
            names, numbers = number_labels(where, texts)
        self.label_names = [printable(name) for name in names]
        self.labels = np.array([numbers.get(text, -1) for text in texts], np.int32)

    def known_labels(self, texts: Sequence[str]) -> set[str]:
        """Returns the labels of the images in `train`, or of all images if there is no `train`."""
        splits = self.layout.splits
        if "train" not in splits:
            return set(texts) - {""}
        pairs = zip(texts, self.folder_of, strict=True)
        trained = (text for text, i in pairs if i != NO_FOLDER and splits[i] == "train")
        return set(trained) - {""}

    def labels_by_folder(self) -> list[str]:
        """Returns the label of each image, "" for none."""
        if self.layout.conflict:
            first, second = self.layout.conflict
            raise UserError(
                f"data.labels = 'folder', but in {self.root} folders above and below the splits "
                f"could both be labels, for example {first!r} and {second!r}: set data.labels to "
                "the path of a CSV file."
            )
        if not any(self.layout.labels):
            raise UserError(
                f"data.labels = 'folder', but the images of {self.root} are not in folders that "
                "could be labels (other than splits and numbered shards): set data.labels to '', "
                "'cls', 'json:KEY' or the path of a CSV file."
            )
        labels = self.layout.labels
        return [labels[folder] if folder != NO_FOLDER else "" for folder in self.folder_of]

    def labels_by_files(self, how: str) -> list[str]:
        """Returns the labels in the files next to the images, "" for none."""
        suffix = "." + how.partition(":")[0]

        def read(row: int) -> str:
            try:
                content = self.manifest.companion(row, self.names[row], suffix)
                return "" if content is None else label_in(content, how)
            except ValueError as error:
                raise UserError(
                    f"data.labels = {how!r}: the {suffix} file of {self.names[row]!r} cannot be "
                    f"used: {error}."
                ) from error

        texts = list(in_threads(read, range(len(self.names)), at_once=1024))
        if not any(texts):
            raise UserError(
                f"data.labels = {how!r}, but no image of {self.root} has a {suffix} file next to "
                "it."
            )
        return texts


def mask_rows(names: Sequence[str]) -> set[int]:
    """Returns the rows of masks: masks/a/b.png, or annotations/a/b.png, of images/a/b.jpg.

    One folder may hold everything.
    """
    tops = {name.partition("/")[0] for name in names}
    prefix = f"{tops.pop()}/" if len(tops) == 1 else ""
    parts = [splitext(name.removeprefix(prefix))[0].partition("/") for name in names]
    images = {below for top, _, below in parts if top == "images"}
    return {
        row for row, (top, _, below) in enumerate(parts) if top in MASK_FOLDERS and below in images
    }


def select(splits: dict[str, np.ndarray], split: str, root: str) -> np.ndarray:
    """Returns the rows of a split, or of a slice or a sum of splits, each once.

    Args:
        splits: {name: rows}.

    Raises UserError if there is no such split or it is empty.
    """
    infos = (
        tfds.core.SplitInfo(name=name, shard_lengths=[len(rows)], num_bytes=0)
        for name, rows in splits.items()
    )
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(
            tfds.core.splits.SplitDict(infos)
        )
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{root} has no split {split!r}; it has {', '.join(sorted(splits))}, all, and slices "
            "such as 'train[:1000]' or 'train[10%:]'."
        ) from error
    rows = np.concatenate([splits[part.splitname][part.from_ : part.to] for part in parts])
    rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
    if not len(rows):
        count = len(np.unique(np.concatenate(list(splits.values()))))
        raise UserError(
            f"split {split!r} of {root} is empty: there are {count} images in all; set "
            "--config.data.split=all or --config.data.evaluation_split=all."
        )
    return rows


class Examples:
    """examples[i] is {"image": encoded bytes, "label": int, where there are labels}."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, labels: np.ndarray | None):
        self.manifest, self.rows, self.labels = manifest, rows, labels
        self.ends = np.flatnonzero(np.frombuffer(manifest.names, np.uint8) == 0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        example = {"image": self.manifest.read(self.rows[i], self.name(i))}
        return example if self.labels is None else example | {"label": self.labels[i]}

    def name(self, i: int) -> str:
        """Returns the path of example i from the root."""
        row = self.rows[i]
        start = self.ends[row - 1] + 1 if row else 0
        return os.fsdecode(self.manifest.names[start : self.ends[row]])

    def digest(self) -> str:
        """Returns a digest of names, sizes and labels."""
        digest = hashlib.sha256()
        names = self.manifest.names.split(b"\0")
        digest.update(b"\0".join([names[row] for row in self.rows]))
        digest.update(self.manifest.rows["bytes"][self.rows].tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()[:16]
