"""Packs a folder of images into array_record shards that TFDS reads; the files are unchanged."""

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from mim_jax import UserError
from mim_jax.data.decode import BadImageError, type_of
from mim_jax.data.folder import Examples, Folder
from mim_jax.data.manifest import in_threads, printable
from mim_jax.data.records import shard_path, write_info, write_shard
from mim_jax.progress import Bar
from mim_jax.storage import in_bucket


def pack(
    root: str,
    to: str,
    *,
    labels: str = "",
    shard_mb: float = 256,
    in_parallel: Callable = in_threads,
) -> None:
    """Packs the splits of a folder into `to`, in shards of about `shard_mb` megabytes.

    Examples keep the folder's order, so both sources give the same batches, and a run can continue
    with the packed data. An interrupted call continues with the first missing shard.

    Args:
        root: a folder or a tar file, see folder.py.
        labels: as data.labels.
        in_parallel: a function like `in_threads`: in_parallel(write, shards, at_once=1) returns an
            iterator over write(shard), in any order.

    Raises UserError if `to` is remote or contains anything other than shards of the same images.
    """
    if in_bucket(to):
        raise UserError(
            f"--to={to} must be a local or mounted folder; copy it to the bucket after packing."
        )
    folder, to = Folder(root, labels), Path(to).expanduser().resolve()
    splits = folder.distinct_splits()
    sizes = {
        split: folder.manifest.rows["bytes"][examples.rows] for split, examples in splits.items()
    }
    counts_of = {split: shards(x, int(shard_mb * 1_000_000)) for split, x in sizes.items()}
    plan = dict(
        mode=folder.mode,
        digests={split: examples.digest() for split, examples in splits.items()},
        shards=counts_of,
    )
    claim(to, plan)
    name = set_name(to)
    is_image = " " not in folder.mode and type_of(folder.mode) == "uint8"
    features = features_of(is_image, folder.label_names)

    def write(shard: tuple[str, int]) -> int:
        split, number = shard
        counts = counts_of[split]
        path = shard_path(to, name, split, number, len(counts))
        if not path.exists():
            first = sum(counts[:number])
            rows = range(first, first + counts[number])
            write_shard(path, features, records(splits[split], rows, is_image))
        return counts[number]

    todo = [(split, i) for split, counts in counts_of.items() for i in range(len(counts))]
    total = sum(len(examples) for examples in splits.values())
    with Bar(f"packing {to}", total, unit="images") as bar:
        for count in in_parallel(write, todo, at_once=1):
            bar.update(count)
    lengths = {split: (counts_of[split], int(sizes[split].sum())) for split in splits}
    write_info(to, name, features, lengths, plan, f"The images of {folder.root}.")
    report(to, folder, {split: len(examples) for split, examples in splits.items()})


def report(to: Path, folder: Folder, counts: Mapping[str, int]) -> None:
    """Prints the number of examples in each split, and of files that are not used."""
    if folder.unread:
        name, reason = folder.unread[0]
        print(f"{len(folder.unread):,} files are not used; the first: {printable(name)}: {reason}")
    listed = ", ".join(f"{count:,} in {split}" for split, count in counts.items())
    print(f"{to}: {listed}\nread it with --config.data.name=tfds:{to}")


def set_name(to: Path) -> str:
    """Turns the name of a folder into a valid TFDS name of a data set."""
    name = re.sub(r"[^a-z0-9]+", "_", to.name.lower()).strip("_")
    return name if name[:1].isalpha() else f"images_{name}"


def shards(sizes: np.ndarray, most: int) -> list[int]:
    """Returns the number of examples in each shard, for shards of about `most` bytes.

    Args:
        sizes: bytes of each example, in order.
    """
    count = min(len(sizes), -(-int(sizes.sum()) // most))
    ends = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, count + 1) / count) + 1
    return [int(n) for n in np.diff([0, *ends[:-1], len(sizes)]) if n > 0]


def claim(to: Path, plan: dict) -> None:
    """Creates the folder for a plan's shards, or checks that it was created for the same plan."""
    to.mkdir(parents=True, exist_ok=True)
    note = to / "prepare.json"
    if note.exists():
        if json.loads(note.read_text()) != plan:
            raise UserError(f"{to} holds other images or shards: choose another --to.")
    elif any(to.iterdir()):
        raise UserError(f"{to} is not empty: choose another --to.")
    else:
        note.write_text(json.dumps(plan))


def features_of(is_image: bool, labels: list[str]) -> tfds.features.FeaturesDict:
    """Returns the features of a packed set.

    Files that TFDS cannot decode as images (.npy, 16 bits) are stored as bytes.
    """
    image = tfds.features.Image(shape=(None, None, None)) if is_image else tfds.features.Text()
    features = {"image": image, "file_name": tfds.features.Text()}
    return tfds.features.FeaturesDict(
        features | ({"label": tfds.features.ClassLabel(names=labels)} if labels else {})
    )


def records(examples: Examples, rows: range, is_image: bool) -> Iterator[dict]:
    """Yields examples in the form that TFDS encodes."""
    for i in rows:
        name = examples.name(i)
        try:
            example = examples[i]
        except BadImageError as error:
            raise UserError(f"{name!r} changed during packing ({error}): start again.") from error
        if is_image:
            example["image"] = io.BytesIO(example["image"])  # TFDS needs TensorFlow for arrays
        yield example | {"file_name": os.fsencode(name)}
