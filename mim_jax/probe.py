"""What the features of an encoder are good for, asked while it is trained.

Features are of clean, whole images, the evaluation views: nothing is hidden, nothing drawn. They
are the mean of the patches' tokens, of training and of evaluation images alike.

What to expect on ImageNet: of MAE's ViT-B after 100 epochs 46 % by a linear probe, 11 % by k-NN,
81 % fine-tuned (lightly's benchmarks); of BEiT's last layer some 20 % and 5 %, though it fine-tunes
well. Few right neighbours are no fault: compare runs of one method.

Shapes: n images to learn from, m to predict, d width, k classes.
"""

from collections.abc import Callable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from mim_jax.data import Data
from mim_jax.sharding import replicated, to_global, whole
from mim_jax.train import TrainState


class Probe:
    """Asks the encoder of a run's state about the first `images` images of each split.

    encoder(params, images (b, H, W, c)) -> tokens (b, 1 + n, d).
    """

    def __init__(self, encoder: Callable, data: Data, mesh: Mesh, *, batch_size: int, images: int):
        self.data, self.mesh = data, mesh
        self.batch_size, self.images = batch_size, images

        def look(params, batch):
            tokens = encoder(params, batch.pop("image"))
            return batch | {"features": tokens[:, 1:].mean(1)}

        self.look = jax.jit(look, out_shardings=replicated(mesh))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """-> {"probe_rank": ..., and where there are labels "probe_knn", "probe_linear"}."""
        # What of a classifier's encoder is frozen lies among the buffers.
        parts = (flatten_dict(x.get("encoder", {})) for x in (state.buffers, state.averaged))
        params = whole(unflatten_dict({k: x for part in parts for k, x in part.items()}), self.mesh)
        known, asked = (self.features(params, training) for training in (True, False))
        found = {"probe_rank": rank(known["features"])}
        if all("label" in x and x["label"].min() >= 0 for x in (known, asked)):  # -1: it has none
            train, labels, test = known["features"], known["label"], asked["features"]
            for name, predict in (("knn", neighbours), ("linear", linear)):
                found[f"probe_{name}"] = np.mean(predict(train, labels, test) == asked["label"])
        return found

    def features(self, params: dict, training: bool) -> dict[str, np.ndarray]:
        """-> {"features": (n, d), "label": (n,)} of all processes' images."""
        rows, names = [], ("image", "label", "mask")
        limits = dict(limit=self.images, of_training=training)
        for batch in self.data.evaluation_batches(self.batch_size, **limits):
            batch = to_global({name: batch[name] for name in names if name in batch}, self.mesh)
            seen = jax.tree.map(np.asarray, self.look(params, batch))
            counts = seen.pop("mask") > 0
            rows.append({name: x[counts] for name, x in seen.items()})
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def neighbours(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """The votes of the `k` nearest by cosine, weighed by exp(cosine / temperature) -> labels (m,).

    train (n, d), labels (n,), test (m, d) (Wu et al., 2018; k and temperature of DINO).
    """
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (train, test))
    votes = np.zeros((len(test), labels.max() + 1))
    for i, row in enumerate(test):
        near = train @ row
        best = np.argsort(-near)[:k]
        np.add.at(votes[i], labels[best], np.exp(near[best] / temperature))
    return votes.argmax(1)


def linear(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """A linear classifier, by ridge regression, which needs no search -> labels (m,)."""
    center, spread = train.mean(0), train.std(0).clip(1e-6)
    train, test = ((x.astype(np.float64) - center) / spread for x in (train, test))
    targets = np.eye(labels.max() + 1)[labels]
    shares = targets.mean(0)
    covariance = train.T @ train / len(train) + 0.1 * np.eye(train.shape[1])
    weights = np.linalg.solve(covariance, train.T @ (targets - shares) / len(train))
    return (test @ weights + shares).argmax(1)


def rank(features: np.ndarray) -> float:
    """How many directions features (n, d) take: RankMe (Garrido et al., 2023), needs no labels."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))
