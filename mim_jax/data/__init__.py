"""Data sets: batches of images as a function of the seed and the step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import grain
import numpy as np

from mim_jax import UserError
from mim_jax.data.bad_files import BadFiles, usable
from mim_jax.data.batches import stream
from mim_jax.data.class_names import renumber
from mim_jax.data.decode import BadImageError, type_of
from mim_jax.data.described import PREFIX, open_described
from mim_jax.data.examine import require_bands, require_channels
from mim_jax.data.fields import Field, fields_of
from mim_jax.data.pairs import open_masked
from mim_jax.data.segmentation import SegmentationEvaluationView, SegmentationTrainingView
from mim_jax.data.sources import Source, open_sources
from mim_jax.data.transforms import EvaluationView, TrainingView
from mim_jax.keys import FREE, NOT_NEGATIVE, POSITIVE, SHARE, Range, Smoke

Photographic = Literal["bilinear", "bicubic", "lanczos"]


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set of a run: batches for training and for evaluation.

    Batches are dicts of NumPy arrays (b, ...) with the data set's fields. Iterators yield the rows
    of this process. `on_bad(name, reason)` is called for each file that cannot be used.
    """

    train: Source
    evaluation: Source
    fields: tuple[Field, ...]
    num_labels: int  # 0 without labels
    bands: tuple[str, ...]  # names of the channels, () if they have none
    training_view: TrainingView | SegmentationTrainingView
    evaluation_view: EvaluationView | SegmentationEvaluationView
    labeled: bool  # whether labels must be valid
    split: str
    max_bad_fraction: float
    loading: dict  # process, processes, threads and workers, as for `stream`

    @property
    def examples(self) -> int:
        """Number of examples in the training split."""
        return len(self.train.examples)

    @property
    def fingerprint(self) -> dict:
        """A description of the training split, which changes if its examples change."""
        return self.train.fingerprint

    @property
    def unread(self) -> Sequence[tuple[str, str]]:
        """Names and reasons of files that are not images."""
        return self.train.unread

    @property
    def image(self) -> Field:
        """The field `image`."""
        return self.fields[0]

    @property
    def legend(self) -> dict[str, tuple[int, int, int]]:
        """The classes of pixels: {name: color}."""
        return dict(zip(self.segmentation_classes, self.segmentation_colors, strict=True))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of training images."""
        return self.image.size

    @property
    def image_fields(self) -> tuple[Field, ...]:
        """The fields that are images, not masks."""
        return tuple(field for field in self.fields if len(field.shape) == 3)

    @property
    def segmentation_classes(self) -> tuple[str, ...]:
        """Names of the classes of pixels, () without masks."""
        return self.train.classes.names if self.train.classes else ()

    @property
    def segmentation_colors(self) -> tuple[tuple[int, int, int], ...]:
        """Colors of the classes of pixels, from 0 to 255."""
        return self.train.classes.colors if self.train.classes else ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of images or of pixels, () without labels."""
        return self.segmentation_classes or tuple(self.train.class_names)

    def require_one_size(self) -> None:
        """Raises UserError if evaluation images differ in size, as images with masks do."""
        if self.segmentation_classes:
            raise UserError(
                "images with masks are evaluated at their own sizes, but features need a single "
                "size: use a config of another objective for the same images."
            )

    @property
    def evaluation_labeled(self) -> bool:
        """Returns whether the evaluation images have labels; ImageNet's test images have none."""
        try:
            return self.num_labels > 0 and bool(self.evaluation.examples[0]["label"] >= 0)
        except BadImageError:  # counted with the bad files later
            return True

    def training_batches(
        self, batch_size: int, *, seed: int, start: int, stop: int, on_bad: Callable | None = None
    ) -> Iterator[dict]:
        """Yields the batches of the steps start to stop - 1."""
        # Shuffled and augmented by global position, before each process takes its share.
        source, view = self.train, self.training_view
        dataset = grain.MapDataset.range(len(source.examples)).seed(seed).shuffle().repeat()

        def row(i: int, rng: np.random.Generator) -> dict:
            return usable(lambda example: self.row(example, view(example, rng)), source.examples, i)

        def place(i: int, row: dict) -> dict:
            return row | {"index": np.int32(i % batch_size), "valid": np.float32(1)}

        dataset = dataset.random_map(row).map_with_index(place)
        steps = dict(first=start, count=stop - start, batch_size=batch_size)
        batches = self.report(stream(dataset, **steps, **self.loading), source, on_bad)
        return self.check_labels(batches) if self.labeled else batches

    def training_names(self, batch_size: int, *, seed: int, step: int) -> list[str]:
        """Returns the names of the images in the batch after `step` updates, over all processes."""
        order = grain.MapDataset.range(self.examples).seed(seed).shuffle().repeat()
        places = range(step * batch_size, (step + 1) * batch_size)
        return [self.train.name_of(int(order[i])) for i in places]

    def evaluation_batches(
        self,
        batch_size: int,
        *,
        limit: int = 0,
        of_training: bool = False,
        on_bad: Callable | None = None,
    ) -> Iterator[dict]:
        """Yields batches with each of the first `limit` examples (0: all) once, and padding.

        Examples come from the evaluation split, or with `of_training` from the training split. They
        are in order, unless their views differ in shape: then each batch has views of one shape.
        """
        source = self.train if of_training else self.evaluation
        count = min(limit or len(source.examples), len(source.examples))
        order, valid, views = [], [], []  # one view for each batch
        for indices, view in self.evaluation_view.groups(source.sizes, count):
            padding = -len(indices) % batch_size
            order.append(np.pad(indices, (0, padding), mode="edge"))
            valid.append(np.arange(len(indices) + padding) < len(indices))
            views += [view] * (len(order[-1]) // batch_size)
        order, valid = np.concatenate(order), np.concatenate(valid)

        def row(k: int) -> dict:
            view = views[k // batch_size]
            see = lambda example: self.row(example, view(example))  # noqa: E731
            example = usable(see, source.examples, int(order[k]))
            good = np.float32(valid[k] and example["bad"] < 0)
            return example | {"index": np.int32(order[k]), "valid": good}

        dataset = grain.MapDataset.range(len(order)).map(row)
        steps = dict(first=0, count=len(views), batch_size=batch_size)
        rows = stream(dataset, **steps, **self.loading)
        return self.report(rows, source, on_bad)

    def row(self, example: dict, views: dict) -> dict:
        """Returns the fields of an example, given its images."""
        sources = {field.name: field.source for field in self.fields if field.source}
        return views | {name: example[key] for name, key in sources.items() if name not in views}

    def report(self, batches: Iterator[dict], source: Source, on_bad) -> Iterator[dict]:
        """Yields batches and reports bad files. Raises UserError if there are too many."""
        bad_files = BadFiles(source, self.image.shape[2], self.image.dtype, self.max_bad_fraction)
        return bad_files.noted(batches, on_bad or (lambda name, reason: None))

    def check_labels(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yields batches. Raises UserError for a label outside 0 to num_labels - 1."""
        for batch in batches:
            for label in (batch["label"].min(), batch["label"].max()) if self.num_labels else ():
                if not 0 <= label < self.num_labels:
                    raise UserError(
                        f"an image of {self.split} has the label {label}, outside 0 to "
                        f"{self.num_labels - 1}: choose another data.split."
                    )
            yield batch


def views_of(
    segmented: bool,
) -> tuple[
    type[TrainingView | SegmentationTrainingView], type[EvaluationView | SegmentationEvaluationView]
]:
    """Returns the classes of the training view and the evaluation view."""
    if segmented:
        return SegmentationTrainingView, SegmentationEvaluationView
    return TrainingView, EvaluationView


def make(
    *,
    name: Annotated[
        str, FREE, Smoke("emoji"), "emoji, folder:PATH, hf:PATH, tfds:PATH, or a TFDS name"
    ],
    size: Annotated[
        int | tuple, Range(1, 2**16), "side of the images in pixels, or (height, width)"
    ],
    tokenizer_size: Annotated[
        int | tuple, NOT_NEGATIVE, "the same for the tokenizer's images; 0: no such images"
    ] = 0,
    split: Annotated[
        str, Smoke("train"), "training split, or a part such as train[:1000]"
    ] = "train",
    evaluation_split: Annotated[
        str, FREE, Smoke("validation"), "split for evaluations"
    ] = "validation",
    data_dir: Annotated[str, FREE, Smoke(""), "folder in which TFDS prepared the data set"] = "",
    labels: Annotated[
        str,
        FREE,
        Smoke(""),
        "source of labels: folder, cls, json:KEY, a CSV file, or a column of hf:PATH; '': none",
    ] = "",
    classes: Annotated[
        str, FREE, Smoke(""), "CSV file of the classes in masks; '': the one in the folder"
    ] = "",
    channels: Annotated[int, POSITIVE, Smoke(3), "channels of the images"] = 3,
    bands: Annotated[
        tuple, Smoke(()), "names of the channels, for example ('red', 'nir'); (): none"
    ] = (),
    interpolation: Annotated[Photographic, "interpolation of training images"] = "bicubic",
    evaluation_interpolation: Annotated[
        Photographic, FREE, "interpolation of evaluation images"
    ] = "bicubic",
    max_bad_fraction: Annotated[
        float, SHARE, FREE, "share of unusable images above which a run stops"
    ] = 0.05,
    threads: Annotated[int, NOT_NEGATIVE, FREE, "number of decoding threads; 0: one per core"] = 0,
    workers: Annotated[
        int, NOT_NEGATIVE, FREE, "number of decoding processes, each with threads; 0: none"
    ] = 0,
    labeled: bool = False,
    segmented: bool = False,
    class_names: Sequence[str] = (),
    process: int = 0,
    processes: int = 1,
    **views: Any,
) -> Data:
    """Opens a data set. The annotations describe the arguments that are config keys.

    An image that cannot be used is replaced by the next one in training, and is not valid in
    evaluation.

    Args:
        labeled: whether labels outside the classes are an error.
        segmented: whether every image has a mask, see pairs.py.
        class_names: names that labels are indices into; (): those of the data set.
        process: index of this process.
        processes: number of processes that share the batches.
        views: arguments of the views that `views_of(segmented)` returns.

    Raises:
        UserError: if the data set cannot be opened. Iterators of batches raise it if more than
            `max_bad_fraction` of a split cannot be used, or for labels outside the classes.
    """
    splits = (split, evaluation_split)
    if segmented:
        for key, value in dict(labels=labels, tokenizer_size=tokenizer_size).items():
            if value:
                raise UserError(f"data.{key} = {value!r} must not be set: masks are the labels.")
    if name.startswith(PREFIX):
        train, evaluation = open_described(name, splits, channels, segmented)
    elif segmented:
        train, evaluation = open_masked(name, splits, classes, channels)
    else:
        train, evaluation = open_sources(name, splits, data_dir=data_dir, labels=labels)
    if class_names:
        train, evaluation = (renumber(x, class_names, name) for x in (train, evaluation))
    require_channels(name, train, channels)
    require_bands(bands, channels)
    declared = functools.partial(
        fields_of,
        size=size,
        tokenizer_size=tokenizer_size,
        channels=channels,
        dtype=type_of(train.mode),
        labeled=train.num_labels > 0,
        segmentation=train.classes.dtype.name if train.classes else "",
    )
    fields = declared(interpolation=interpolation)
    evaluation_fields = declared(interpolation=evaluation_interpolation)
    training_view, evaluation_view = views_of(segmented)
    views |= dict(classes=train.classes)
    return Data(
        train=train,
        evaluation=evaluation,
        fields=fields,
        num_labels=train.num_labels,
        bands=tuple(bands),
        training_view=training_view.configured(fields, views),
        evaluation_view=evaluation_view.configured(evaluation_fields, views),
        labeled=labeled,
        split=split,
        max_bad_fraction=max_bad_fraction,
        loading=dict(process=process, processes=processes, threads=threads, workers=workers),
    )
