r"""Probes the features of an encoder: k-NN, a linear classifier per layer, and their rank.

    mim-jax probe runs/mae_base --data=folder:photos
    mim-jax probe mae_pretrain_vit_base.pth --data=emoji --images=1000

The source is a run, converted weights, a file of weights, a Hugging Face folder or a model in the
Hub's local cache. Features are the means of the patch tokens after each block, computed for central
crops without masking. Classifiers are trained on the first --images images of the training split
and tested on as many of the evaluation split; the linear one is ridge regression on standardized
features. Without labels only the rank is printed (RankMe, Garrido et al., 2023). Compare only
encoders of the same method: MAE's and BEiT's features do not cluster like those of contrastive
methods. Exit codes: 0 done, 2 user error.
"""

import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError, cli, data
from mim_jax.convert import files
from mim_jax.embed import statistics_of
from mim_jax.models.vit import ViT
from mim_jax.normalize import normalize
from mim_jax.probe import linear, neighbors, rank
from mim_jax.progress import images_in, track


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("probe", __doc__)
    parser.add_argument("source", help="a run directory, weights, or a model's name")
    parser.add_argument("--data", required=True, help="as data.name: folder:PATH, emoji, ...")
    parser.add_argument("--split", default="train", help="the training split")
    parser.add_argument("--evaluation-split", default="validation")
    parser.add_argument("--data-dir", default="", help="where TFDS prepared the data set")
    parser.add_argument(
        "--labels", default="", help="as data.labels: folder, cls, json:KEY or a file"
    )
    parser.add_argument("--images", type=int, default=2000, help="images of each split; 0: all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--heads", type=int, default=0, help="if the weights do not record it")
    options = parser.parse_args(argv)
    if options.images < 0 or options.batch_size < 1:
        parser.error("--images must be at least 0, --batch-size at least 1")
    return cli.exit_code(lambda: probe(options), "")


def probe(options) -> int:
    """Prints a table with a row for each layer, and returns the exit code."""
    params, network, _ = files.load_weights(options.source, heads=options.heads, encoder_only=True)
    if "encoder" not in params:
        raise UserError(f"{options.source} holds a tokenizer, not an encoder.")
    dataset = data.make(
        name=options.data,
        size=network.size,
        channels=network.channels,
        split=options.split,
        evaluation_split=options.evaluation_split,
        data_dir=options.data_dir,
        labels=options.labels,
    )
    dataset.require_one_size()
    statistics = statistics_of(options.source, network.metadata)
    encoder = network.encoder.clone(dtype="float32")
    weights = jax.tree.map(jnp.asarray, params["encoder"])
    splits = [
        features(encoder, weights, dataset, options, statistics, of_training)
        for of_training in (True, False)
    ]
    (train, train_labels), (test, labels) = splits
    labeled = dataset.num_labels > 0 and min(train_labels.min(), labels.min()) >= 0
    print(f"{options.source}: {train.shape[1]:,} images of {options.split}", end="")
    print(f", {len(labels):,} of {options.evaluation_split}, {dataset.num_labels} classes")
    print("layer     rank" + ("    k-NN  linear" if labeled else ""))
    if not labeled and options.data.startswith("folder:") and not options.labels:
        print("without labels, only the rank is computed: pass --labels=folder", file=sys.stderr)
    for layer, (x, y) in enumerate(zip(train, test, strict=True), start=1):
        row = f"{layer:5d} {rank(x):8.1f}"
        if labeled:
            scores = (
                np.mean(predict(x, train_labels, y) == labels) for predict in (neighbors, linear)
            )
            row += "".join(f" {score:7.2%}" for score in scores)
        print(row)
    return 0


def features(
    encoder: ViT, params: dict, dataset: data.Data, options, statistics: dict, of_training: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features (layers, n, d) of the images of a split, and their labels (n,)."""

    @jax.jit
    def encode(images):
        images = normalize(images, **statistics)
        layers = encoder.apply({"params": params}, images, layers=tuple(range(encoder.depth)))
        return jnp.stack([tokens[:, 1:].mean(1) for tokens in layers])

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        batches = dataset.evaluation_batches(
            options.batch_size, limit=options.images, of_training=of_training
        )
        for batch in track(batches, "encoding", unit="images", count=images_in):
            valid = batch["valid"] > 0
            labels = batch.get("label", np.full(len(valid), -1))
            yield np.asarray(encode(batch["image"]))[:, valid], labels[valid]

    parts, labels = zip(*rows(), strict=True)
    return np.concatenate(parts, axis=1), np.concatenate(labels)


if __name__ == "__main__":
    cli.exit_with(main)
