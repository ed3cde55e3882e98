"""What images there are. A source gives random access to encoded images and their labels."""

from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from mim_jax import UserError

BUILTIN = {"emoji": Path(__file__).parent / "builtin" / "emoji" / "1.0.0"}


class Source(NamedTuple):
    """`examples[i]` is {"image": encoded bytes, "label": int, where there are labels}."""

    examples: Any
    num_labels: int
    fingerprint: dict  # equal where the examples are: name, version, split, how many


def open_source(name: str, split: str, data_dir: str = "") -> Source:
    """`emoji` is built in; any other name is a data set prepared by TFDS, in array_record files.

    Nothing is decoded, and TensorFlow is not imported. `data_dir` may be local or gs://.
    """
    builder = builder_of(name, data_dir)
    features, splits = builder.info.features, builder.info.splits
    if "image" not in features:
        raise UserError(f"data set {name!r} has no images; its features are {', '.join(features)}.")
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UserError(
            f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}."
        ) from error
    if not count:
        raise UserError(f"split {split!r} of data set {name!r} is empty.")
    examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return Source(
        examples,
        num_labels=features["label"].num_classes if "label" in features else 0,
        fingerprint=dict(
            name=builder.name, version=str(builder.version), split=split, examples=count
        ),
    )


def builder_of(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a prepared data set."""
    if name in BUILTIN:
        return tfds.builder_from_directory(BUILTIN[name])
    how = f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"there is no data set {name!r}: say {', '.join(BUILTIN)}, or a data set of TFDS."
        ) from error
    except ValueError as error:
        if "File format is already set" not in str(error):
            raise
        raise UserError(
            f"data set {name!r} is prepared in a file format without random access: prepare it "
            f"again in another folder, by {how}."
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"data set {name!r} is not prepared in {builder.data_path}: say where it is with "
            f"--config.data.data_dir, or prepare it by {how}."
        )
    return builder
