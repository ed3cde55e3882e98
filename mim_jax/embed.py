r"""Writes the features of a data set, computed by a trained encoder.

    mim-jax embed runs/mae_base --to=features.npz
    mim-jax embed runs/mae_base --to=train --config.data.evaluation_split=train

--config is a run directory, or a config file that describes the data, with
--config.init_from.encoder=RUN. The evaluation views of the evaluation split are encoded without
masking. The output has `cls` (images, d), the class token; `mean` (images, d), the mean of the
patches; `index` (images,), positions in the split; `file_name`, the name of the file, or of the
example if there are no files; and `label` and `class_name`, if there are labels. If data.size
differs from the encoder's, positions are interpolated. If the weights do not record mean and std of
the images, the config's are used. --to is an .npz file, or a folder for an array_record file, which
`tfds.builder_from_directory` reads. Exit codes: 0 done, 2 user error.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from mim_jax import UserError, cli, recipe, schema, workdir
from mim_jax.convert import files
from mim_jax.convert.fit import encoder_only, resized
from mim_jax.convert.hugging_face import numbers, pair
from mim_jax.data.images import Images, batch_of
from mim_jax.data.records import shard_path, write_info, write_shard
from mim_jax.normalize import MEAN, STD
from mim_jax.objectives import image_encoder
from mim_jax.progress import images_in, track
from mim_jax.sharding import replicated, to_global
from mim_jax.start import source_run
from mim_jax.transfer import encoder_in, require_bands

IMAGENET = dict(mean=MEAN, std=STD)
OTHER_FORMATS = (  # suffixes of files that `embed` does not write
    *(".pt", ".pth", ".safetensors", ".npy", ".csv", ".tsv", ".txt", ".json"),
    *(".parquet", ".arrow", ".h5", ".hdf5", ".pkl"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("embed", __doc__)
    cli.add_config(parser, "a run directory, or a config file")
    parser.add_argument("--to", required=True, help="the .npz file or the folder to write")
    options, overrides = cli.parse(parser, argv, cli.TRAINING_KEYS)
    if (ending := Path(options.to).suffix) in OTHER_FORMATS:
        parser.error(
            f"--to={options.to}: {ending} files are not supported; pass an .npz file or a folder"
        )

    def command() -> int:
        config = schema.load(options.config, overrides, trust_code=options.trust_code)
        return write(options.config, recipe.fit_to_devices(config), options.to)

    return cli.exit_code(command, options.to)


def load(
    source: str | Path,
    *,
    mean: tuple = (),
    std: tuple = (),
    heads: int = 0,
    image_size: int | tuple = 0,
) -> tuple[Callable, dict]:
    """Loads the encoder of a run, a file of weights or a Hugging Face folder::

        encoder, params = load("runs/mae_base")

    encoder(params, images (b, H, W, c)) -> tokens (b, 1 + n, d), the class token first. Images are
    integers in their type's range or floats in [0, 1]. They may also be a list of Pillow images,
    files and arrays (H, W, c) of any size, which are resized by their short side and cropped at the
    center. The final norm is applied if the encoder has one; an encoder that was fine-tuned with
    the mean of the patches has none.

    Args:
        source: a run directory, a file of weights, a Hugging Face folder, or the name of a model
            that is in the local cache of the Hugging Face Hub.
        mean: mean of the images; default: that of the source, or ImageNet's.
        std: standard deviation of the images, with the same default.
        heads: number of attention heads, if the source does not record it.
        image_size: size to which positions are interpolated; default: that of the source, which
            images must then have.

    Raises:
        UserError: if there is no encoder, or images have another size or number of channels.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"load({source!r}): pass the path of a run, of a file of weights or of a Hugging Face "
            "folder."
        )
    params, network, _ = files.load_weights(source, heads=heads, encoder_only=True)
    if "encoder" not in params:
        raise UserError(f"{source} holds a tokenizer, not an encoder: use mim_jax.tokenize.")
    statistics = statistics_of(source, network.metadata, mean, std)
    require_statistics(statistics, network.channels)
    if image_size:
        size = pair("image_size", np.asarray(image_size).tolist())
        if size != network.size:
            params, network = resized(*encoder_only(params, network), size)
    encode, model = image_encoder(network.encoder, **statistics), network.encoder
    any_size = model.positions == model.relative_bias == "none"

    def encoder(params: dict, images: jax.Array | Images | Image.Image | str | Path) -> jax.Array:
        if isinstance(images, Image.Image | str | Path):
            images = [images]
        if isinstance(images, list | tuple):
            if not images:
                raise UserError("there are no images: the list is empty.")
            data = dict(size=network.size, channels=network.channels)
            images = batch_of(images, data)["image"]
        images = array_of(images, network.channels)
        if not any_size and network.grid not in (None, model.grid(images)):
            height, width = images.shape[1:3]
            raise UserError(
                f"the encoder of {source} is for images of {network.size[0]} x {network.size[1]}, "
                f"not {height} x {width}: pass load(..., image_size=({height}, {width}))."
            )
        return encode(params, images)

    return encoder, jax.tree.map(jnp.asarray, params["encoder"])


def array_of(images: Any, channels: int) -> jax.Array:
    """Returns images (b, H, W, channels) as an array of JAX.

    Raises UserError unless they are integers, or floats in [0, 1].
    """
    if isinstance(images, np.ndarray) and np.issubdtype(images.dtype, np.floating):
        low, high = float(images.min(initial=0)), float(images.max(initial=0))
        if not 0 <= low <= high <= 1:  # also NaN
            raise UserError(
                f"float images must be in [0, 1], not {low:g} to {high:g}: pass integers, or "
                "divide by their largest value."
            )
    try:
        array = jnp.asarray(images)
    except (TypeError, ValueError):  # neither an array nor convertible to one
        raise UserError(
            f"images must be an array (b, H, W, {channels}), an image, a file or a list of them, "
            f"not {type(images).__name__}."
        ) from None
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise UserError(f"images must be integers or floats in [0, 1], not {array.dtype}.")
    if array.size == 0:
        raise UserError(f"there are no images: their shape is {array.shape}.")
    if array.ndim != 4 or array.shape[-1] != channels:
        raise UserError(f"images must have the shape (b, H, W, {channels}), not {array.shape}.")
    return array


def require_statistics(statistics: dict[str, tuple], channels: int) -> None:
    """Raises UserError unless mean and std have a number per channel, or one for all."""
    for name, value in statistics.items():
        if len(value) not in (1, channels):
            raise UserError(
                f"{name} = {value} must have one number, or one per channel: {channels}."
            )
    mean, std = statistics["mean"], statistics["std"]
    if not (np.isfinite(mean).all() and min(std) > 0):
        raise UserError(f"mean = {mean} must be finite, and std = {std} positive.")


def statistics_of(
    source: str | Path, metadata: dict, mean: tuple = (), std: tuple = ()
) -> dict[str, tuple]:
    """Returns mean and std of images: the given ones, else those of the source, else ImageNet's.

    Raises UserError if they are not numbers.
    """
    given = {name: value for name, value in (("mean", mean), ("std", std)) if np.size(value)}
    known = {name: metadata[name] for name in IMAGENET if name in metadata} | given
    if missing := " and ".join(name for name in IMAGENET if name not in known):
        print(f"{source} does not record {missing} of images: using ImageNet's", file=sys.stderr)
    known = {name: tuple(numbers(name, np.ravel(x).tolist())) for name, x in known.items()}
    return IMAGENET | known


def write(path: str, config: ConfigDict, to: str) -> int:
    """Writes the features of the evaluation split."""
    run = recipe.build(config)
    run.data.require_one_size()
    source = source_run(path, config, "encoder")
    encoder, params = load_for(run, config, source)
    params = jax.device_put(params, replicated(run.mesh))

    def pooled(images):
        tokens = encoder(params, images)
        return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}

    pooled = jax.jit(pooled, out_shardings=replicated(run.mesh))

    def rows() -> Iterator[dict[str, np.ndarray]]:
        """Yields the valid rows of each batch."""
        count = len(run.data.evaluation.examples)
        batches = run.data.evaluation_batches(run.rows)
        for batch in track(batches, "embedding", count, unit="images", count=images_in):
            images = to_global({"image": batch["image"]}, run.mesh)["image"]
            features = jax.tree.map(np.asarray, pooled(images))
            notes = {name: batch[name] for name in ("index", "label") if name in batch}
            valid = batch["valid"] > 0
            notes |= names_of(run, batch)
            yield {name: x[valid] for name, x in (features | notes).items()}

    save = save_npz if to.endswith(".npz") else save_records
    count, width = save(workdir.open_path(to), rows(), config.data.evaluation_split)
    print(f"{to}: {count:,} images, {width} numbers each")
    return 0


def names_of(run: recipe.Run, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the file name and the class name of each image of a batch."""
    source, classes = run.data.evaluation, run.data.class_names
    names = {"file_name": np.array([source.name_of(int(i)) for i in batch["index"]])}
    if "label" in batch and classes:
        labels = batch["label"].tolist()
        names["class_name"] = np.array([classes[x] if x >= 0 else "" for x in labels])
    return names


def load_for(run: recipe.Run, config: ConfigDict, source: str) -> tuple[Callable, dict]:
    """Loads the encoder of `source` for the images of a run, with mean and std from its config."""
    ours, theirs = encoder_in(config.to_dict()), encoder_in(workdir.read(source).get("config", {}))
    require_bands(ours, theirs, source)
    missing: dict[str, Any] = {
        k: x for k, x in ours.statistics.items() if k not in theirs.statistics
    }
    if ours.model and not (theirs.model and theirs.model.heads):
        missing["heads"] = ours.model.heads
    return load(source, image_size=run.data.image.size, **missing)


def save_npz(path: epath.Path, rows: Iterator[dict], split: str) -> tuple[int, int]:
    """Writes all rows to one file -> the number of images and the width of a feature."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # opened early, so that no work is lost if it cannot be written
        batches = list(rows)
        arrays = {name: np.concatenate([row[name] for row in batches]) for name in batches[0]}
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return arrays["cls"].shape


def save_records(folder: epath.Path, rows: Iterator[dict], split: str) -> tuple[int, int]:
    """Writes the rows as a data set that TFDS reads; see `save_npz`."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and any(folder.iterdir()):  # folders of a bucket are never empty
        raise UserError(f"{folder} is not empty: choose another --to.")
    batch = next(rows)
    features = tfds.features.FeaturesDict(
        {
            name: tfds.features.Text()
            if x.dtype.kind == "U"
            else tfds.features.Tensor(shape=x.shape[1:], dtype=x.dtype)
            for name, x in batch.items()
        }
    )
    split, count = "".join(c if c.isalnum() else "_" for c in split).strip("_"), 0

    def examples() -> Iterator[dict]:
        nonlocal count
        for part in itertools.chain([batch], rows):
            for values in zip(*part.values(), strict=True):
                yield dict(zip(part, values, strict=True))
                count += 1

    with workdir.staged(folder) as local:
        path = shard_path(local, "features", split, 0, 1)
        write_shard(path, features, examples())
        infos = {split: ([count], path.stat().st_size)}
        write_info(local, "features", features, infos, {}, "Features of whole, clean images.")
    return count, batch["cls"].shape[1]


if __name__ == "__main__":
    cli.exit_with(main)
