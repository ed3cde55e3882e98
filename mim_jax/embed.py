r"""Writes what a trained encoder makes of a data set: features for whatever comes next.

    python -m mim_jax.embed --config=runs/mae_base --to=features.npz
    python -m mim_jax.embed --config=runs/mae_base --to=train --config.data.evaluation_split=train

--config is the folder of a run, or a config file, whose data are meant, with
--config.init_from.encoder=RUN. Written are, for the evaluation views of its evaluation split,
nothing hidden: `cls` (images, d), the class token; `mean` (images, d), of the patches; `index`
(images,), their places in the split; `label`, where there are labels. For a data.size of its own
positions are interpolated. What the weights do not say, the images' mean and std, is the config's.
--to is an .npz, or a folder: there they lie in an array_record file, which
`tfds.builder_from_directory` reads. Exit codes: 0 done, 2 a mistake in what was asked for.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from mim_jax import UserError, command, recipe
from mim_jax.convert import files
from mim_jax.convert.fit import encoder_only, resized
from mim_jax.data.records import shard_path, write_info, write_shard
from mim_jax.normalize import MEAN, STD
from mim_jax.objectives import whole_images
from mim_jax.sharding import replicated, to_global
from mim_jax.transfer import config_of, facts

IMAGENET = dict(mean=MEAN, std=STD)


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.embed", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the folder of a run, or a config file")
    parser.add_argument("--to", required=True, help="the .npz or the folder to write")
    options, overrides = command.parse(parser, argv)
    return command.exit_code(lambda: write(options.config, overrides, options.to), options.to)


def load(
    source: str | Path,
    *,
    mean: tuple = (),
    std: tuple = (),
    heads: int = 0,
    image_size: int | tuple = 0,
) -> tuple[Callable, dict]:
    """The encoder of a run, a file of weights or a folder of Hugging Face.

    encoder(params, images (b, H, W, c)) -> tokens (b, 1 + n, d), the class token first. Images are
    integers in their type's range or floats in [0, 1]. Tokens are normalised where the encoder has
    a last norm; one that was fine-tuned with the mean of the patches has none. What the source does
    not say can be given: mean and std of the images (otherwise ImageNet's), the number of heads.
    Images are of the size that the source was trained on, or, of another, of the `image_size` that
    its positions are interpolated to.

        encoder, params = load("runs/mae_base")
    """
    params, about, _ = files.load(source, heads=heads)
    if "encoder" not in params:
        raise UserError(f"{source} holds a tokenizer, not an encoder: say mim_jax.tokenize.")
    said = {name: value for name, value in (("mean", mean), ("std", std)) if value}
    statistics = IMAGENET | {k: about.facts[k] for k in IMAGENET if k in about.facts} | said
    if missing := [name for name in IMAGENET if name not in (about.facts | said)]:
        unknown = " and ".join(missing)
        print(f"{source} does not say its images' {unknown}: ImageNet's are used", file=sys.stderr)
    if image_size:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if size != about.size:
            params, about = resized(*encoder_only(params, about), size)
    encode, network = whole_images(about.encoder, **statistics), about.encoder
    anywhere = network.positions == network.relative_bias == "none"

    def encoder(params: dict, images: jax.Array) -> jax.Array:
        if images.ndim != 4 or images.shape[-1] != about.channels:
            raise UserError(
                f"images are (b, H, W, {about.channels}), these are {tuple(images.shape)}."
            )
        if not anywhere and about.grid not in (None, network.grid(images)):
            height, width = images.shape[1:3]
            raise UserError(
                f"the encoder of {source} is for images of {about.size[0]} x {about.size[1]}, "
                f"these are {height} x {width}: say load(..., image_size=({height}, {width}))."
            )
        return encode(params, images)

    return encoder, jax.tree.map(jnp.asarray, params["encoder"])


def write(run: str, overrides: list[str], to: str) -> int:
    """Writes the features of the evaluation split."""
    config = command.here(recipe.load(run, overrides))
    this = recipe.build(config)
    source = command.trained(run, config, "encoder")
    asked, said = facts(config)._asdict(), facts(config_of(source))._asdict()
    unsaid = {name: asked[name] for name in ("mean", "std", "heads") if not said[name]}
    size = this.data.views["image"][:2]
    encoder, params = load(source, image_size=size, **{k: x for k, x in unsaid.items() if x})
    params = jax.device_put(params, replicated(this.mesh))

    def pooled(images):
        tokens = encoder(params, images)
        return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}

    pooled = jax.jit(pooled, out_shardings=replicated(this.mesh))

    def rows() -> Iterator[dict[str, np.ndarray]]:
        """Batch after batch, those that count."""
        for batch in this.data.evaluation_batches(this.rows):
            images = to_global({"image": batch["image"]}, this.mesh)["image"]
            features = jax.tree.map(np.asarray, pooled(images))
            notes = {name: batch[name] for name in ("index", "label") if name in batch}
            counts = batch["mask"] > 0
            yield {name: x[counts] for name, x in (features | notes).items()}

    save = save_npz if to.endswith(".npz") else save_records
    count, width = save(Path(to), rows(), config.data.evaluation_split)
    print(f"{to}: {count:,} images, {width} numbers each")
    return 0


def save_npz(path: Path, rows: Iterator[dict], split: str) -> tuple[int, int]:
    """Writes rows in one file. -> how many there are, and their width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # before the work, which is lost if this cannot be
        batches = list(rows)
        found = {name: np.concatenate([row[name] for row in batches]) for name in batches[0]}
        np.savez_compressed(file, **found)
    return found["cls"].shape


def save_records(folder: Path, rows: Iterator[dict], split: str) -> tuple[int, int]:
    """The same as a data set of TFDS, row by row."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: say another --to.")
    batch = next(rows)
    features = tfds.features.FeaturesDict(
        {name: tfds.features.Tensor(shape=x.shape[1:], dtype=x.dtype) for name, x in batch.items()}
    )
    split, count = "".join(c if c.isalnum() else "_" for c in split).strip("_"), 0

    def examples() -> Iterator[dict]:
        nonlocal count
        for part in itertools.chain([batch], rows):
            for values in zip(*part.values(), strict=True):
                yield dict(zip(part, values, strict=True))
                count += 1

    path = shard_path(folder, "features", split, 0, 1)
    write_shard(path, features, examples())
    infos = {split: ([count], path.stat().st_size)}
    write_info(folder, "features", features, infos, {}, "Features of whole, clean images.")
    return count, batch["cls"].shape[1]


if __name__ == "__main__":
    sys.exit(main())
