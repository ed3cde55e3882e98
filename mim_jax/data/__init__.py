"""What there is to see: batches of images as a function of the seed and the step, nothing else."""

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import grain
import numpy as np
from absl import flags

from mim_jax import UserError
from mim_jax.data.bad_files import BadFiles, usable
from mim_jax.data.decode import BadImageError, channels_of, suits, type_of
from mim_jax.data.sources import Source, open_sources
from mim_jax.data.transforms import EvaluationView, Interpolation, TrainingView


class Data(NamedTuple):
    """A data set as a run sees it."""

    examples: int  # in the training split
    views: dict[str, tuple]  # {"image": (height, width, channels)}, and "tokenizer_image"
    dtype: str  # of the images in a batch: the source's own, uint8, uint16 or float32
    num_labels: int  # 0 without labels
    evaluation_labelled: bool  # not so where they are all -1, as of ImageNet's test images
    fingerprint: dict
    unread: Sequence[tuple[str, str]]  # name and reason of files that are no images
    # Iterators over this process's rows of the global batches, as dicts of numpy arrays. `on_bad`
    # gets the name and the reason of each file that turns out to be unusable.
    training_batches: Callable  # (batch_size, *, seed, start, stop, on_bad) -> steps start..stop
    # (batch_size, *, limit, of_training, on_bad) -> each example of the evaluation split once, or
    # of the training split in the same views, and padding.
    evaluation_batches: Callable


def make(
    *,
    name: str,
    size: int | tuple,
    tokenizer_size: int | tuple = 0,
    split: str = "train",
    evaluation_split: str = "validation",
    data_dir: str = "",
    labels: str = "",
    channels: int = 3,
    crop_scale: tuple = (0.2, 1.0),
    clip_crop: bool = False,
    flip: bool = True,
    color_jitter: float = 0.0,
    randaugment: tuple = (),
    fill: tuple = (124, 116, 104),
    interpolation: Interpolation = "bicubic",
    evaluation_interpolation: Interpolation = "bicubic",
    resizer: Literal["pillow", "simd"] = "pillow",
    crop_fraction: float = 0.875,
    max_bad_fraction: float = 0.05,
    threads: int = 0,
    workers: int = 0,
    labelled: bool = False,
    process: int = 0,
    processes: int = 1,
) -> Data:
    """Opens a data set (see sources.py) for process `process` of `processes`.

    An image that cannot be used is replaced by the next one in training, and does not count in
    evaluation; if there are more of them than `max_bad_fraction` of a split, batches end in a
    UserError. So they do, in training, where the data is `labelled` and a label is none of the data
    set's.

    Training views are random resized crops of `crop_scale` of the area (with `clip_crop` not drawn
    again where they do not fit), flipped half of the time, of images whose brightness, contrast and
    saturation vary by `color_jitter`; then `randaugment` of a magnitude and its deviation, which
    fills with `fill`, 255 x the data's mean. Evaluation views are central crops of `crop_fraction`
    of the short side. With `tokenizer_size`, batches have the same crop at that size too, resized
    by Lanczos: `tokenizer_image` (BEiT). The `resizer` may be Pillow's, or simd (extra `[simd]`),
    faster, a few of whose pixels differ by one.

    Images are decoded in `threads` (0: one a core) or, where these do not keep up, in so many
    `workers` (processes), with `threads` in each.
    """
    sizes = [(s, s) if isinstance(s, int) else s for s in (size, tokenizer_size)]
    how = dict(size=sizes[0], tokenizer_size=sizes[1] if tokenizer_size else None)
    how |= dict(channels=channels, resizer=resizer)
    augment = TrainingView(
        **how,
        interpolation=interpolation,
        crop_scale=crop_scale,
        clip_crop=clip_crop,
        flip=flip,
        color_jitter=color_jitter,
        randaugment=randaugment,
        fill=fill,
    )
    view = EvaluationView(
        **how, interpolation=evaluation_interpolation, crop_fraction=crop_fraction
    )
    splits = (split, evaluation_split)
    train, evaluation = open_sources(name, splits, data_dir=data_dir, labels=labels)
    if not suits(train.mode, channels):
        raise UserError(
            f"data.channels = {channels}, but the images of {name} have {channels_of(train.mode)} "
            f"({train.mode}): say --config.data.channels={channels_of(train.mode)}."
        )
    dtype = type_of(train.mode)
    augment, view = (dataclasses.replace(view, dtype=dtype) for view in (augment, view))
    bad_in_training, bad_in_evaluation = (
        BadFiles(source, channels, dtype, max_bad_fraction) for source in (train, evaluation)
    )

    def stream(dataset, first: int, batches: int, batch_size: int) -> Iterator[dict]:
        """Global batches first, first + 1, ... of a dataset of rows; of each, our block of rows."""
        ours = batch_size // processes
        rows = grain.MapDataset.range(first * ours, (first + batches) * ours)
        rows = rows.map(lambda i: dataset[i // ours * batch_size + process * ours + i % ours])
        count = threads or -(-os.cpu_count() // max(1, workers))  # each makes a batch of its own
        options = grain.ReadOptions(count, prefetch_buffer_size=max(4, count))
        rows = rows.batch(ours).to_iter_dataset(options)
        if workers:
            flags.FLAGS.mark_as_parsed()  # Grain asks them when it starts a worker
            options = grain.MultiprocessingOptions(workers)
            rows = rows.mp_prefetch(options, functools.partial(end_with, os.getpid()))
        return iter(rows)

    def training_batches(
        batch_size: int, *, seed: int, start: int, stop: int, on_bad: Callable = ignore
    ) -> Iterator[dict]:
        # Shuffled and augmented by global position, before any process takes its share.
        dataset = grain.MapDataset.range(len(train.examples)).seed(seed).shuffle().repeat()

        def row(i: int, rng: np.random.Generator) -> dict:
            return usable(lambda example: augment.random_map(example, rng), train.examples, i)

        dataset = dataset.random_map(row)
        dataset = dataset.map_with_index(lambda i, row: row | {"index": np.int32(i % batch_size)})
        batches = stream(dataset, start, stop - start, batch_size)
        batches = bad_in_training.noted(batches, on_bad)
        return known(batches, split, train.num_labels) if labelled else batches

    def evaluation_batches(
        batch_size: int, *, limit: int = 0, of_training: bool = False, on_bad: Callable = ignore
    ) -> Iterator[dict]:
        source, bad_files = evaluation, bad_in_evaluation
        if of_training:
            source, bad_files = train, bad_in_training
        count = min(limit or len(source.examples), len(source.examples))
        batches = -(-count // batch_size)

        def row(i: int) -> dict:
            example = usable(view.map, source.examples, min(i, count - 1))
            counts = i < count and example["bad"] < 0
            return example | {"index": np.int32(i), "mask": np.float32(counts)}

        dataset = grain.MapDataset.range(batches * batch_size).map(row)
        return bad_files.noted(stream(dataset, 0, batches, batch_size), on_bad)

    return Data(
        examples=len(train.examples),
        views={name: (*size, channels) for name, (size, _) in view.sizes().items()},
        dtype=dtype,
        num_labels=train.num_labels,
        evaluation_labelled=has_labels(evaluation),
        fingerprint=train.fingerprint,
        unread=train.unread,
        training_batches=training_batches,
        evaluation_batches=evaluation_batches,
    )


def has_labels(source: Source) -> bool:
    """Whether a split has labels, as its first image shows."""
    try:
        return source.num_labels > 0 and bool(source.examples[0]["label"] >= 0)
    except BadImageError:  # it will be counted among the bad ones
        return True


def known(batches: Iterator[dict], split: str, num_labels: int) -> Iterator[dict]:
    """The batches, whose labels are none but 0 to num_labels - 1."""
    for batch in batches:
        for label in (batch["label"].min(), batch["label"].max()) if num_labels else ():
            if not 0 <= label < num_labels:
                raise UserError(
                    f"an image of {split} has the label {label}, none of 0 to {num_labels - 1}: "
                    "choose another data.split; some have no labels."
                )
        yield batch


def ignore(name: str, reason: str) -> None:
    """What is done about a bad file where nothing is asked for."""


def end_with(parent: int, worker: int, workers: int) -> None:
    """Lets a worker process end when its parent is no more, even if that was killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
