"""Prepares data sets: a folder, or one that TFDS knows, becomes files with random access.

    python -m mim_jax.data.prepare folder:/photos --to=/data/photos
    python -m mim_jax.data.prepare imagenet2012 --manual_dir=/tars --data_dir=/data/tfds

A folder or a tar (see folder.py) is packed without decoding and without TensorFlow: many small
files become a few large ones, for a bucket or a slow disk. They are read by
--config.data.name=tfds:/data/photos, and by tfds.builder_from_directory. Interrupted, the same
command goes on with the next file.

A set of TFDS takes TensorFlow, once: pip install -e '.[prepare]'. In --manual_dir lies what is to
be fetched by hand: ImageNet's two tars, or an archive where there is no network (CIFAR's). It is
read by --config.data.name=imagenet2012 --config.data.data_dir=/data/tfds.

With --beam (pip install -e '.[beam]') Apache Beam writes the shards, or what TFDS has for Beam; its
own options follow, as --runner=FlinkRunner. All its workers must see the same folders.

Exit codes: 0 done, 2 a mistake in what was asked for, reported in one sentence.
"""

import argparse
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tqdm import tqdm

from mim_jax import UserError
from mim_jax.data.manifest import in_threads
from mim_jax.data.pack import pack

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SYNSETS, TRAINING_IMAGES, VALIDATION_IMAGES = 1000, 1_281_167, 50_000  # of ILSVRC 2012


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder:PATH, or the name of a data set of TFDS")
    parser.add_argument("--to", help="folder: where to, a folder of its own")
    parser.add_argument("--labels", default="", help='folder: "folder" or the path of a CSV file')
    parser.add_argument("--shard_mb", type=float, default=256, help="folder: about so large a file")
    parser.add_argument("--data_dir", help="TFDS: where to; by default ~/tensorflow_datasets")
    parser.add_argument("--manual_dir", help="TFDS: where lies what was fetched by hand")
    parser.add_argument("--beam", action="store_true", help="prepare on Apache Beam")
    options, rest = parser.parse_known_args(argv)
    if rest and not options.beam:
        parser.error(f"unknown argument {rest[0]}")
    try:
        beam = Beam(rest) if options.beam else None
        if not options.source.startswith("folder:"):
            prepare(options.source, options.data_dir, options.manual_dir, beam)
        elif options.to:
            folder = options.source.removeprefix("folder:")
            settings = dict(labels=options.labels, shard_mb=options.shard_mb)
            pack(folder, options.to, in_parallel=beam or in_threads, **settings)
        else:
            raise UserError("say where to, as --to=/data/my_images.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Beam:
    """What `in_threads` does, on Apache Beam."""

    def __init__(self, options: Sequence[str]):
        if find_spec("apache_beam") is None:
            raise UserError("--beam needs Apache Beam: pip install -e '.[beam]'.")
        from apache_beam.options.pipeline_options import PipelineOptions

        self.options = PipelineOptions(options)

    def __call__(self, function: Callable, items: Sequence, at_once: int) -> Iterator:
        """Calls function(item) for every item, and again where a worker failed. Yields nothing."""
        import apache_beam

        with apache_beam.Pipeline(options=self.options) as pipeline:
            _ = (
                pipeline
                | apache_beam.Create(items)
                | apache_beam.Reshuffle()
                | apache_beam.Map(function)
            )
        return iter(())


def prepare(
    name: str, data_dir: str | None, manual_dir: str | None, beam: Beam | None = None
) -> None:
    """Has TFDS prepare one of its sets."""
    if find_spec("tensorflow") is None:
        raise UserError("a set of TFDS takes TensorFlow to prepare: pip install -e '.[prepare]'.")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"TFDS has no data set {name!r}; a folder is folder:PATH.") from error
    if builder.name == "imagenet2012" and not builder.is_prepared():
        check_imagenet(Path(manual_dir or "."))
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                manual_dir=manual_dir, beam_options=beam and beam.options
            )
        )
    except (tfds.download.DownloadError, NonMatchingChecksumError, OSError) as error:
        raise UserError(
            f"{name} cannot be fetched, or is not what it should be: say with --manual_dir where "
            f"its archive lies ({str(error).splitlines()[0]})."
        ) from error
    splits = (f"{info.num_examples:,} in {split}" for split, info in builder.info.splits.items())
    where = f" --config.data.data_dir={data_dir}" if data_dir else ""
    print(f"{builder.data_path}: {', '.join(splits)}\nread by --config.data.name={name}{where}")


def check_imagenet(folder: Path) -> None:
    """Refuses tars that lack images: TFDS would take them, and give images wrong labels."""
    for file in (TRAIN, VALIDATION):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} has no {file}: get it from image-net.org (ILSVRC 2012), and say with "
                "--manual_dir where it is."
            )
    names = {f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, VALIDATION_IMAGES + 1)}
    try:
        if (found := set(members(folder / VALIDATION))) != names:
            raise UserError(
                f"{folder / VALIDATION} lacks {len(names - found):,} of the {len(names):,} images "
                "of the validation set, or has others: get it again."
            )
        synsets, images = synsets_and_images(folder / TRAIN)
    except tarfile.TarError as error:
        raise UserError(f"a tar in {folder} is not whole ({error}): get it again.") from error
    if (synsets, images) != (SYNSETS, TRAINING_IMAGES):
        raise UserError(
            f"{folder / TRAIN} has {images:,} images of {synsets:,} synsets, not "
            f"{TRAINING_IMAGES:,} of {SYNSETS:,}: get it again."
        )


def members(path: Path) -> list[str]:
    with tarfile.open(path, "r:") as tar:
        return [Path(member.name).name for member in tar if member.isfile()]


def synsets_and_images(path: Path) -> tuple[int, int]:
    """How many tars there are in a tar, and how many files in them."""
    counts = []
    with tarfile.open(path, "r:") as tar:
        for synset in tqdm(tar, "counting ImageNet's images", unit=" synsets", delay=3):
            with tarfile.open(fileobj=tar.extractfile(synset), mode="r:") as images:
                counts.append(sum(image.isfile() for image in images))
    return len(counts), sum(counts)


if __name__ == "__main__":
    sys.exit(main())
