"""Any tree of images, or tar files of them, as a source: its splits and its labels.

With a folder `train/` beside `validation/` (or `val/`, `valid/`) or `test/`, these are the splits;
`test` is `validation` too where there is no other. In any other tree `validation` is a twentieth of
all, drawn by the names, and `train` the rest. TFDS's way to ask for parts and sums holds here too:
`train[:1000]`, `train[10%:]`, `train+validation`, `all`; a slice is as drawn, too.
"""

import csv
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from mim_jax import UserError
from mim_jax.data.manifest import SPLITS, Manifest, scan

HEADERS = ("path", "file", "filename", "file_name", "image", "name")  # of a CSV's first column
MANY_LABELS = 100_000  # in numbers, more are dates or keys by mistake


class Folder:
    """A scanned folder: `splits` {name: rows of the manifest}, and the labels of all rows.

    labels: "folder", which is the first one below the split's that an image lies in, or the path of
        a CSV file, a line an image: its path from the root, its label; or "" for none.
    """

    def __init__(self, root: str, labels: str = ""):
        self.manifest = scan(root)
        self.root = self.manifest.root
        self.names = os.fsdecode(self.manifest.names).split("\0")[:-1]
        if not self.names:
            why, files = "it is empty", self.manifest.unread
            if files:
                most = Counter(reason for _, reason in files).most_common(1)[0][0]
                why = f"of {len(files):,} files most are not because: {most}"
            raise UserError(f"{self.root} holds no image that can be read: {why}.")
        tops = {name[: name.find("/")] for name in self.names if "/" in name}
        self.split = "train" in tops and (len(tops) == 1 or len(tops & set(SPLITS)) > 1)
        self.splits = self.by_folder() if self.split else {}
        if "validation" not in self.splits:
            ours = self.splits.get("train", np.arange(len(self.names)))
            test = self.splits.get("test")
            held_out = max(1, len(ours) // 20) if len(ours) > 1 else 0
            self.splits["validation"] = ours[:held_out] if test is None else test
            self.splits["train"] = ours[held_out:] if test is None else ours
        self.how_labelled, self.labels, self.label_names = labels, None, []
        if labels:
            named = self.named_by_folder() if labels == "folder" else self.named_by_csv(labels)
            number = {name: number for number, name in enumerate(self.label_names)}
            self.labels = np.array([number.get(name, -1) for name in named], np.int32)

    def by_folder(self) -> dict[str, np.ndarray]:
        rows = {}
        for row, name in enumerate(self.names):
            top, _, below = name.partition("/")
            if below and top.isidentifier():  # so that TFDS's way to ask for it is clear
                rows.setdefault(SPLITS.get(top, top), []).append(row)
        return {split: np.array(rows[split]) for split in sorted(rows)}

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split, or of a slice or sum of splits."""
        infos = (
            tfds.core.SplitInfo(name=name, shard_lengths=[len(rows)], num_bytes=0)
            for name, rows in self.splits.items()
        )
        try:
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(
                tfds.core.splits.SplitDict(infos)
            )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"{self.root} has no split {split!r}; it has {', '.join(sorted(self.splits))}, "
                "all, and slices as 'train[:1000]' or 'train[10%:]'."
            ) from error
        rows = np.concatenate([self.splits[part.splitname][part.from_ : part.to] for part in parts])
        rows = rows[np.sort(np.unique(rows, return_index=True)[1])]  # each once
        if not len(rows):
            raise UserError(
                f"split {split!r} of {self.root} is empty: of {len(self.names)} images in all, say "
                "which, as data.split=all or data.evaluation_split=all."
            )
        return rows

    @property
    def mode(self) -> str:
        """The mode that most images have."""
        return self.manifest.modes[np.bincount(self.manifest.rows["mode"]).argmax()]

    def examples(self, split: str) -> "Examples":
        """The examples of a split. Raises UserError where one should have a label and has none."""
        rows = self.rows(split)
        if self.labels is None:
            return Examples(self.manifest, rows, None)
        labels = self.labels[rows]
        if len(without := rows[labels < 0]):
            raise UserError(
                f"data.labels = {self.how_labelled!r} gives {len(without):,} of {len(rows):,} "
                f"images of split {split!r} no label that train has; the first is "
                f"{self.names[without[0]]!r}."
            )
        return Examples(self.manifest, rows, labels)

    def named_by_folder(self) -> list[str]:
        """The label's name of every row, "" for none."""
        level = int(self.split)
        parts = (name.split("/", level + 1) for name in self.names)
        named = [part[level] if len(part) > level + 1 else "" for part in parts]
        known = [named[row] for row in self.splits["train"]] if self.split else named
        self.label_names = sorted(set(known) - {""})
        if not self.label_names:
            raise UserError(
                f"data.labels = 'folder', but the images of {self.root} lie in no folders that "
                'could be labels: say data.labels="" or the path of a CSV file.'
            )
        return named

    def named_by_csv(self, path: str) -> list[str]:
        try:
            with open(Path(path).expanduser(), newline="", encoding="utf-8-sig") as file:
                lines = [line for line in csv.reader(file) if line]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"data.labels = {path!r} cannot be read ({error}): say '', 'folder' or the path of "
                "a CSV file."
            ) from error
        if lines and lines[0][0].strip().lower() in HEADERS:
            del lines[0]
        for line in lines:
            if len(line) < 2 or not line[1].strip():
                raise UserError(
                    f"data.labels = {path!r}: {','.join(line)!r} is not a path, a comma, a label."
                )
        of = {}
        for name, label, *_ in lines:
            name, label = os.path.normpath(name.strip()), label.strip()
            if of.setdefault(name, label) != label:
                raise UserError(
                    f"data.labels = {path!r}: {name!r} has two labels, {of[name]!r} and {label!r}."
                )
        named = [of.get(name, of.get(os.path.join(self.root, name), "")) for name in self.names]
        names = sorted(set(of.values()))
        if all(name.isdecimal() for name in names):  # numbers are labels as they stand
            largest = max(map(int, names), default=-1)
            if largest > max(MANY_LABELS, 10 * len(names)):
                raise UserError(
                    f"data.labels = {path!r}: numbers are labels as they stand, and the largest is "
                    f"{largest}, but there are {len(names)}: write 0, 1, 2, ... or names."
                )
            names = [str(number) for number in range(largest + 1)]
            named = [name and str(int(name)) for name in named]
        if not any(named):
            raise UserError(
                f"data.labels = {path!r} names none of the images of {self.root}: write paths from "
                f"there, as {self.names[0]!r}."
            )
        self.label_names = names
        return named


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
        """The path of example i, from the root."""
        row = self.rows[i]
        start = self.ends[row - 1] + 1 if row else 0
        return os.fsdecode(self.manifest.names[start : self.ends[row]])

    def digest(self) -> str:
        """A number that is another one if names, sizes or labels are others."""
        digest = hashlib.sha256()
        names = self.manifest.names.split(b"\0")
        digest.update(b"\0".join([names[row] for row in self.rows]))
        digest.update(self.manifest.rows["bytes"][self.rows].tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()[:16]
