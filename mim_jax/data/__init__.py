"""What there is to see: batches of images as a function of the seed and the step, nothing else."""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from mim_jax import UserError
from mim_jax.data.decode import MODES
from mim_jax.data.sources import open_source
from mim_jax.data.transforms import EvaluationView, TrainingView


class Data(NamedTuple):
    """A data set as a run sees it."""

    examples: int  # in the training split
    views: dict[str, tuple]  # {"image": (height, width, channels)}, and "tokenizer_image"
    num_labels: int  # 0 without labels
    fingerprint: dict
    # Iterators over this process's rows of the global batches, as dicts of numpy arrays.
    training_batches: Callable  # (batch_size, *, seed, start, stop) -> batches of steps start..stop
    evaluation_batches: Callable  # (batch_size, *, limit) -> every example once, and padding


def make(
    *,
    name: str,
    size: int | tuple,
    tokenizer_size: int | tuple = 0,
    split: str = "train",
    evaluation_split: str = "validation",
    data_dir: str = "",
    channels: int = 3,
    crop_scale: tuple = (0.2, 1.0),
    clip_crop: bool = False,
    flip: bool = True,
    color_jitter: float = 0.0,
    randaugment: tuple = (),
    fill: tuple = (124, 116, 104),
    interpolation: str = "bicubic",
    crop_fraction: float = 0.875,
    threads: int = 0,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Data:
    """Opens a data set for process `process` of `processes`.

    Training views are random resized crops of `crop_scale` of the area (with `clip_crop` not drawn
    again where they do not fit), flipped half of the time, of images whose brightness, contrast and
    saturation vary by `color_jitter`; then `randaugment` of a magnitude and its deviation, which
    fills with `fill`, 255 x the data's mean. Evaluation views are central crops of `crop_fraction`
    of the short side. With `tokenizer_size`, batches have the same crop at that size too, resized
    by Lanczos: `tokenizer_image` (BEiT). Images are decoded in
    `threads` (0: one a core) or, where these do not keep up, in so many `workers` (processes).
    """
    if channels not in MODES:
        raise UserError(f"data.channels = {channels}: there are {', '.join(map(str, MODES))}.")
    sizes = [(s, s) if isinstance(s, int) else s for s in (size, tokenizer_size)]
    how = dict(size=sizes[0], tokenizer_size=sizes[1] if tokenizer_size else None)
    how |= dict(channels=channels, interpolation=interpolation)
    augment = TrainingView(
        **how,
        crop_scale=crop_scale,
        clip_crop=clip_crop,
        flip=flip,
        color_jitter=color_jitter,
        randaugment=randaugment,
        fill=fill,
    )
    view = EvaluationView(**how, crop_fraction=crop_fraction)
    train, evaluation = (open_source(name, s, data_dir) for s in (split, evaluation_split))
    keys = ("image", "label") if train.num_labels else ("image",)
    pick = PickFeatures(keys)

    def stream(dataset, first: int, batches: int, batch_size: int) -> Iterator[dict]:
        """Global batches first, first + 1, ... of a dataset of rows; of each, our block of rows."""
        ours = batch_size // processes
        rows = grain.MapDataset.range(first * ours, (first + batches) * ours)
        rows = rows.map(lambda i: dataset[i // ours * batch_size + process * ours + i % ours])
        options = grain.ReadOptions(threads or os.cpu_count(), prefetch_buffer_size=4)
        rows = rows.batch(ours).to_iter_dataset(options)
        if workers:
            flags.FLAGS.mark_as_parsed()  # Grain asks them when it starts a worker
            rows = rows.mp_prefetch(grain.MultiprocessingOptions(workers))
        return iter(rows)

    def training_batches(batch_size: int, *, seed: int, start: int, stop: int) -> Iterator[dict]:
        # Shuffled and augmented by global position, before any process takes its share.
        dataset = grain.MapDataset.source(train.examples).seed(seed).map(pick).shuffle().repeat()
        dataset = dataset.random_map(augment)
        dataset = dataset.map_with_index(lambda i, row: row | {"index": np.int32(i % batch_size)})
        return stream(dataset, start, stop - start, batch_size)

    def evaluation_batches(batch_size: int, *, limit: int = 0) -> Iterator[dict]:
        count = min(limit or len(evaluation.examples), len(evaluation.examples))
        batches = -(-count // batch_size)

        def row(i: int) -> dict:
            example = view.map(pick.map(evaluation.examples[min(i, count - 1)]))
            return example | {"index": np.int32(i), "mask": np.float32(i < count)}

        dataset = grain.MapDataset.range(batches * batch_size).map(row)
        return stream(dataset, 0, batches, batch_size)

    return Data(
        examples=len(train.examples),
        views={name: (*size, channels) for name, (size, _) in view.sizes().items()},
        num_labels=train.num_labels,
        fingerprint=train.fingerprint,
        training_batches=training_batches,
        evaluation_batches=evaluation_batches,
    )


class PickFeatures(grain.transforms.Map):
    """Leaves of an example what a batch is made of."""

    def __init__(self, names):
        self.names = names

    def map(self, example: dict) -> dict:
        picked = {name: example[name] for name in self.names}
        if "label" in picked:
            picked["label"] = np.int32(picked["label"])
        return picked
