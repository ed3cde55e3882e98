"""Data sets as TFDS reads them: array_record files, and what is said of them. No TensorFlow."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class SortedWriter(ExampleWriter):
    """Sorts the features of a record, which protobuf orders anew in every process."""

    def write(self, path, examples):
        parse = tf_example_pb2.Example.FromString
        examples = ((k, parse(e).SerializeToString(deterministic=True)) for k, e in examples)
        return super().write(path, examples)


def shard_path(folder: Path, name: str, split: str, number: int, count: int) -> Path:
    """Where shard `number` of `count` of a split lies."""
    return folder / f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_shard(path: Path, features: tfds.features.FeaturesDict, examples: Iterable[dict]) -> None:
    """Writes one array_record file. It is there when it is whole, and not before."""
    serializer = ExampleSerializer(features.get_serialized_info())
    records = (serializer.serialize_example(features.encode_example(e)) for e in examples)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        SortedWriter(tfds.core.FileFormat.ARRAY_RECORD).write(part, enumerate(records))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_info(
    folder: Path,
    name: str,
    features: tfds.features.FeaturesDict,
    splits: Mapping[str, tuple[Sequence[int], int]],
    metadata: Mapping,
    description: str,
) -> None:
    """Writes what TFDS has to know of the files of a folder.

    splits {name: (examples of each shard, bytes)}.
    """
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(lengths),
                num_bytes=size,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=folder,
                    dataset_name=name,
                    split=split,
                    filetype_suffix="array_record",
                    template=TEMPLATE,
                ),
            )
            for split, (lengths, size) in splits.items()
        ],
        filename_template=TEMPLATE,
        check_data=False,  # which would import TensorFlow
        description=description,
        metadata=tfds.core.MetadataDict(metadata),
    )
