"""Writes data sets in TFDS's format: array_record files and metadata, without TensorFlow."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class SortedWriter(ExampleWriter):
    """An ExampleWriter that serializes features in sorted order.

    Protobuf's order differs between processes, but equal inputs should give equal files.
    """

    def write(self, path, examples):
        parse = tf_example_pb2.Example.FromString
        examples = ((k, parse(e).SerializeToString(deterministic=True)) for k, e in examples)
        return super().write(path, examples)


def shard_path(folder: Path, name: str, split: str, number: int, count: int) -> Path:
    """Returns the path of shard `number` of `count` of a split."""
    return folder / f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_shard(path: Path, features: tfds.features.FeaturesDict, examples: Iterable[dict]) -> None:
    """Writes one array_record file under a temporary name, then renames it."""
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
    """Writes TFDS's metadata of the shards in a folder.

    Args:
        splits: {name: (number of examples in each shard, total bytes)}.
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
        check_data=False,  # the check imports TensorFlow
        description=description,
        metadata=tfds.core.MetadataDict(metadata),
    )
