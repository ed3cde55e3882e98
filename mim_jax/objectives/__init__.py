"""What to learn. One file here is one objective; the file's name is its name in a config."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.normalize import normalize


class Objective(NamedTuple):
    """What to learn, as pure functions: what optax.GradientTransformation is for how to step.

    `batch` is a dict of arrays (b, ...): `image`, `index`, and where they apply `label` and `mask`.
    `params["encoder"]` is the ViT. `buffers` is carried but not trained. All randomness of an
    example is drawn by `per_example(rng, batch["index"])`, whatever device it lies on.
    """

    init: Callable  # (rng, batch)                  -> params, buffers
    # A sum and its weight: the step adds both over microbatches and devices, and divides once.
    # Metrics are means over the same weight. A buffer that changes must change by a mean over rows.
    loss: Callable  # (params, buffers, batch, rng, step) -> total (), weight (), (metrics, buffers)
    evaluate: Callable  # (params, buffers, batch, rng) -> {name: (b, ...)}, averaged by the loop
    pictures: Callable  # (params, buffers, batch, rng) -> {caption: images (b, H, W, c) in [0, 1]}
    summarize: Callable = lambda means: means  # {name: mean} -> {name: number or array}
    needs: tuple[str, ...] = ()  # buffers that another run must have trained
    warn: Callable = lambda step, metrics: ""  # what is wrong after a step, and what to change


def per_example(rng: jax.Array, index: jax.Array) -> jax.Array:
    """One key an example: rng (), index (b,) -> keys (b,)."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, index)


def whole_images(encoder: nn.Module, mean: tuple, std: tuple) -> Callable:
    """An encoder as a function (params, images (b, H, W, c)) -> tokens (b, 1 + n, d).

    Nothing is hidden, nothing dropped. Images are integers in their type's range or floats in
    [0, 1]; tokens are normalised where params have a last norm.
    """

    def encode(params: dict, images: jax.Array) -> jax.Array:
        layers = () if "norm" in params else (encoder.depth - 1,)
        images = normalize(jnp.asarray(images), mean, std)
        tokens = encoder.apply({"params": params}, images, layers=layers)
        return tokens[0] if layers else tokens

    return encode
