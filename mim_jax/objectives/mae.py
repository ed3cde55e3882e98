"""Masked autoencoders (He et al., 2021): see a quarter of the patches, paint the rest.

Shapes: b images, n patches, k visible, m hidden, d width, (p, q) patch, c channels.
"""

from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.masking import random_masking
from mim_jax.models.patches import patchify, sincos2d, take, unpatchify
from mim_jax.models.vit import Dense, ViT, transform, vit
from mim_jax.objectives import Objective, denormalize, normalize, per_example


class Decoder(nn.Module):
    """The light transformer that paints patches from the latent of the visible ones."""

    width: int
    depth: int
    heads: int
    dtype: str
    remat: str

    @nn.compact
    def __call__(self, latent, order, *, grid: tuple[int, int], values: int, last: int):
        """latent (b, 1 + k, d), order (b, n) -> the values of the last patches (b, last, p*q*c).

        `order` says where each token lies, visible patches first. Attention does not mind the
        order, so tokens are never shuffled back: the positions are shuffled instead.
        """
        b, n = order.shape
        x = Dense(self.width, dtype=self.dtype, name="embed")(latent)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        hidden = jnp.broadcast_to(mask_token, (b, n + 1 - x.shape[1], self.width))
        positions = take(jnp.asarray(sincos2d(grid, self.width), x.dtype), order)
        patches = jnp.concatenate([x[:, 1:], hidden.astype(x.dtype)], axis=1) + positions
        x = jnp.concatenate([x[:, :1], patches], axis=1)  # the class token has position zero
        x = transform(x, self.depth, self.heads, self.dtype, self.remat, last)
        return Dense(values, dtype=self.dtype, name="pred")(x)


class MAE(nn.Module):
    """Encoder and decoder: the whole network."""

    encoder: ViT
    decoder: Decoder

    def __call__(self, images, visible, hidden, last: int | None = None):
        """images (b, H, W, c), visible (b, k), hidden (b, m) -> painted patches (b, m, p*q*c).

        Hidden patches alone are painted: the loss reads no others. With last=n all are, in the
        order visible, hidden.
        """
        (height, width, c), (p, q) = images.shape[1:], self.encoder.patch
        return self.decoder(
            self.encoder(images, visible),
            jnp.concatenate([visible, hidden], axis=1),
            grid=(height // p, width // q),
            values=p * q * c,
            last=last or hidden.shape[1],
        )


def statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of each patch over all its values, the variance unbiased as torch's."""
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(var + 1e-6)


def objective(
    model: dict,
    *,
    mask_ratio: float = 0.75,
    normalize_target: bool = True,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    mean: tuple = (0.485, 0.456, 0.406),
    std: tuple = (0.229, 0.224, 0.225),
) -> Objective:
    """MAE. `normalize_target` normalises each patch of the target; mean and std are the data's."""
    encoder = vit(**model)
    decoder = Decoder(decoder_width, decoder_depth, decoder_heads, encoder.dtype, encoder.remat)
    network = MAE(encoder, decoder)

    def prepare(batch, rng):
        images = normalize(batch["image"], mean, std)
        num_patches = patchify(images, encoder.patch).shape[1]
        return images, *random_masking(per_example(rng, batch["index"]), num_patches, mask_ratio)

    def forward(params, batch, rng):
        """-> patches (b, n, p*q*c), hidden (b, m), painted (b, m, p*q*c), center and scale."""
        images, visible, hidden = prepare(batch, rng)
        painted = network.apply({"params": params}, images, visible, hidden)
        patches = patchify(images, encoder.patch)
        norm = statistics(take(patches, hidden)) if normalize_target else (0.0, 1.0)
        return patches, hidden, painted.astype(images.dtype), *norm

    def error_of(params, batch, rng):
        """-> mean squared error of each hidden patch (b, m)."""
        patches, hidden, painted, center, scale = forward(params, batch, rng)
        return ((painted - (take(patches, hidden) - center) / scale) ** 2).mean(-1)

    def init(rng, batch):
        rng_mask, rng_params = jax.random.split(rng)
        return network.init(rng_params, *prepare(batch, rng_mask))["params"], {}

    def loss(params, buffers, batch, rng, step):
        error = error_of(params, batch, rng)
        return error.sum(), error.size, ({}, buffers)

    def evaluate(params, buffers, batch, rng):
        return {"loss": error_of(params, batch, rng).mean(1)}

    def pictures(params, buffers, batch, rng):
        patches, hidden, painted, center, scale = forward(params, batch, rng)
        hide = patches.at[jnp.arange(len(patches))[:, None], hidden].set
        # What is painted on a normalised target has no brightness and contrast: it borrows them.
        painted_as = "painted, true mean and variance" if normalize_target else "painted"
        columns = {"masked": hide(0.0), painted_as: hide(painted * scale + center)}
        columns["original"] = patches
        height = batch["image"].shape[1]
        return OrderedDict(
            (caption, denormalize(unpatchify(x, encoder.patch, height), mean, std))
            for caption, x in columns.items()
        )

    return Objective(init, loss, evaluate, pictures)
