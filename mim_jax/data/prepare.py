"""Prepares a data set: converts a folder, or a TFDS data set, to files with random access.

    mim-jax prepare folder:/photos --to=/data/photos
    mim-jax prepare imagenet2012 --manual_dir=/tars --data_dir=/data/tfds

A folder or a tar file (see folder.py) is packed without decoding and without TensorFlow: many small
files become a few large ones, for a bucket or a slow disk. Read them with
--config.data.name=tfds:/data/photos or tfds.builder_from_directory. After an interruption, the same
command continues with the next file.

Large images, such as whole slides and orthophotos, are cut into tiles with --tile=SIDE; TIFFs are
read by rows, whatever their size. Tiles of 8 bits with 1 or 3 channels are stored as PNG, all
others as .npy.

Preparing a set of TFDS needs TensorFlow once: pip install 'mim-jax[prepare]'. --manual_dir holds
archives downloaded by hand: ImageNet's two tars, or CIFAR's archive on a machine without network.
Read the set with --config.data.name=imagenet2012 --config.data.data_dir=/data/tfds.

With --beam (pip install 'mim-jax[beam]'), Apache Beam writes the shards; its own options follow,
for example --runner=FlinkRunner. All its workers must have access to the same folders.

Exit codes: 0 done, 2 user error, reported in one sentence.
"""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from mim_jax import UserError, cli
from mim_jax.data.pack import pack
from mim_jax.data.tile import pack_tiles
from mim_jax.progress import track

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SYNSETS, TRAINING_IMAGES, VALIDATION_IMAGES = 1000, 1_281_167, 50_000  # in ILSVRC 2012


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("prepare", __doc__)
    parser.add_argument("source", help="folder:PATH or the name of a TFDS data set")
    parser.add_argument("--to", help="for folder:PATH: the output folder")
    parser.add_argument(
        "--labels", default="", help='for folder:PATH: "folder" or the path of a CSV file'
    )
    parser.add_argument(
        "--shard_mb", type=float, default=256, help="for folder:PATH: approximate size of a file"
    )
    parser.add_argument(
        "--tile", type=int, default=0, help="for folder:PATH: cut images into tiles of this side"
    )
    parser.add_argument(
        "--channels", type=int, default=0, help="channels of tiles; default: those of most images"
    )
    parser.add_argument(
        "--data_dir", help="for TFDS: the output folder; default ~/tensorflow_datasets"
    )
    parser.add_argument("--manual_dir", help="for TFDS: the folder of manual downloads")
    parser.add_argument("--beam", action="store_true", help="run on Apache Beam")
    options, rest = parser.parse_known_args(argv)
    if rest and not options.beam:
        parser.error(f"unknown argument {rest[0]}")

    def command() -> int:
        beam = Beam(rest) if options.beam else None
        if not options.source.startswith("folder:"):
            prepare(options.source, options.data_dir, options.manual_dir, beam)
        elif options.to:
            folder = options.source.removeprefix("folder:")
            settings = dict(labels=options.labels, shard_mb=options.shard_mb)
            settings |= dict(in_parallel=beam) if beam else {}
            if options.tile:
                settings |= dict(side=options.tile, channels=options.channels)
                pack_tiles(folder, options.to, **settings)
            else:
                pack(folder, options.to, **settings)
        else:
            raise UserError("set the output folder, for example --to=/data/my_images.")
        return 0

    return cli.exit_code(command, options.to or options.data_dir or "")


class Beam:
    """Replaces `in_threads` by an Apache Beam pipeline."""

    def __init__(self, options: Sequence[str]):
        if find_spec("apache_beam") is None:
            raise UserError("--beam needs Apache Beam: pip install 'mim-jax[beam]'.")
        from apache_beam.options.pipeline_options import PipelineOptions

        self.options = PipelineOptions(options)

    def __call__(self, function: Callable, items: Sequence, at_once: int) -> Iterator:
        """Calls function(item) for every item, and again if a worker fails. Yields nothing."""
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
    """Prepares a TFDS data set. Raises UserError if it is unknown or its files are missing."""
    if find_spec("tensorflow") is None:
        raise UserError("preparing a TFDS set needs TensorFlow: pip install 'mim-jax[prepare]'.")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"TFDS has no data set {name!r}; for a folder use folder:PATH.") from error
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
            f"{name} cannot be downloaded or its archive is not the expected one: set --manual_dir "
            f"to the folder of its archive ({str(error).splitlines()[0]})."
        ) from error
    splits = (f"{info.num_examples:,} in {split}" for split, info in builder.info.splits.items())
    where = f" --config.data.data_dir={data_dir}" if data_dir else ""
    print(
        f"{builder.data_path}: {', '.join(splits)}\nread it with --config.data.name={name}{where}"
    )


def check_imagenet(folder: Path) -> None:
    """Raises UserError if ImageNet's tars lack images, which TFDS accepts with wrong labels."""
    for file in (TRAIN, VALIDATION):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} has no {file}: download it from image-net.org (ILSVRC 2012) and set "
                "--manual_dir to its folder."
            )
    names = {f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, VALIDATION_IMAGES + 1)}
    try:
        stored = set(members(folder / VALIDATION))
        if stored != names:
            raise UserError(
                f"{folder / VALIDATION} lacks {len(names - stored):,} of the {len(names):,} images "
                "of the validation set or has others: download it again."
            )
        synsets, images = synsets_and_images(folder / TRAIN)
    except tarfile.TarError as error:
        raise UserError(f"a tar in {folder} is incomplete ({error}): download it again.") from error
    if (synsets, images) != (SYNSETS, TRAINING_IMAGES):
        raise UserError(
            f"{folder / TRAIN} has {images:,} images of {synsets:,} synsets, not "
            f"{TRAINING_IMAGES:,} of {SYNSETS:,}: download it again."
        )


def members(path: Path) -> list[str]:
    """Returns the base names of the files in a tar."""
    with tarfile.open(path, "r:") as tar:
        return [Path(member.name).name for member in tar if member.isfile()]


def synsets_and_images(path: Path) -> tuple[int, int]:
    """Returns the number of tars in a tar, and the number of files in them."""
    counts = []
    with tarfile.open(path, "r:") as tar:
        for synset in track(tar, "counting ImageNet's images", unit="synsets"):
            with tarfile.open(fileobj=tar.extractfile(synset), mode="r:") as images:
                counts.append(sum(image.isfile() for image in images))
    return len(counts), sum(counts)


if __name__ == "__main__":
    cli.exit_with(main)
