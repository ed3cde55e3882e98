"""Probes of an encoder during training: k-NN, a linear classifier, and the rank of the features.

Features are means of the patch tokens of evaluation views, without masking, for training and
evaluation images.

On ImageNet, lightly's benchmarks report 46 % by a linear probe, 11 % by k-NN and 81 % fine-tuned
for MAE's ViT-B after 100 epochs. BEiT's last layer reaches about 20 % by a linear probe and 5 % by
k-NN, although it fine-tunes well. Compare only runs of the same method.

Shapes: n training images, m evaluation images, d width, k classes.
"""

from collections.abc import Callable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from mim_jax.data import Data
from mim_jax.sharding import all_gather, replicated, to_global
from mim_jax.train import TrainState


class Probe:
    """Probes the encoder of a state on the first `images` images of each split.

    encoder(params, images (b, H, W, c)) -> tokens (b, 1 + n, d).
    """

    def __init__(self, encoder: Callable, data: Data, mesh: Mesh, *, batch_size: int, images: int):
        self.data, self.mesh = data, mesh
        self.batch_size, self.images = batch_size, images

        def features(params, batch):
            tokens = encoder(params, batch.pop("image"))
            return batch | {"features": tokens[:, 1:].mean(1)}

        self.batch_features = jax.jit(features, out_shardings=replicated(mesh))

    def __call__(self, state: TrainState, guard: Callable = iter) -> dict[str, float]:
        """Returns "probe_rank", and with labels "probe_knn" and "probe_linear".

        `guard` is a function batches -> batches that may raise an exception to stop the probe.
        """
        # Frozen parameters of a classifier's encoder are buffers.
        parts = (flatten_dict(x.get("encoder", {})) for x in (state.buffers, state.averaged))
        params = all_gather(
            unflatten_dict({k: x for part in parts for k, x in part.items()}), self.mesh
        )
        train, test = (self.features(params, x, guard) for x in (True, False))
        metrics = {"probe_rank": rank(train["features"])}
        if all("label" in x and x["label"].min() >= 0 for x in (train, test)):  # -1: no label
            for name, predict in (("knn", neighbors), ("linear", linear)):
                predicted = predict(train["features"], train["label"], test["features"])
                metrics[f"probe_{name}"] = np.mean(predicted == test["label"])
        return metrics

    def features(
        self, params: dict, of_training: bool, guard: Callable = iter
    ) -> dict[str, np.ndarray]:
        """Returns {"features": (n, d), "label": (n,)} of the images of all processes."""
        rows, names = [], ("image", "label", "valid")
        batches = self.data.evaluation_batches(
            self.batch_size, limit=self.images, of_training=of_training
        )
        for batch in guard(batches):
            batch = to_global({name: batch[name] for name in names if name in batch}, self.mesh)
            arrays = jax.tree.map(np.asarray, self.batch_features(params, batch))
            valid = arrays.pop("valid") > 0
            rows.append({name: x[valid] for name, x in arrays.items()})
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def neighbors(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """Classifies by the `k` nearest neighbors, weighted by exp(cosine / temperature) -> (m,).

    train (n, d), labels (n,), test (m, d). Wu et al., 2018, with DINO's k and temperature.
    """
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (train, test))
    votes = np.zeros((len(test), labels.max() + 1))
    for i, row in enumerate(test):
        near = train @ row
        best = np.argsort(-near)[:k]
        np.add.at(votes[i], labels[best], np.exp(near[best] / temperature))
    return votes.argmax(1)


def linear(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classifies by ridge regression, which needs no search for a learning rate -> (m,)."""
    center, spread = train.mean(0), train.std(0).clip(1e-6)
    train, test = ((x.astype(np.float64) - center) / spread for x in (train, test))
    targets = np.eye(labels.max() + 1)[labels]
    shares = targets.mean(0)
    covariance = train.T @ train / len(train) + 0.1 * np.eye(train.shape[1])
    weights = np.linalg.solve(covariance, train.T @ (targets - shares) / len(train))
    return (test @ weights + shares).argmax(1)


def rank(features: np.ndarray) -> float:
    """Returns the effective rank of features (n, d): RankMe (Garrido et al., 2023)."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))
