"""Masked autoencoders (He et al., 2021): see a quarter of the patches, paint the rest.

Shapes: b images, n patches, k visible, m hidden, d width, (p, q) patch, c channels.
"""

import math
from collections import OrderedDict
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import targets
from mim_jax.masking import hide
from mim_jax.models.decoder import Decoder
from mim_jax.models.patches import take
from mim_jax.models.vit import ViT, vit
from mim_jax.normalize import MEAN, STD, denormalize, normalize
from mim_jax.objectives import Objective, per_example


class MAE(nn.Module):
    """Encoder and decoder: the whole network."""

    encoder: ViT
    decoder: Decoder
    mask_tokens: str = "decoder"
    vocabulary: int = 0  # what is predicted of a patch: so many logits, or 0: its p*q*c pixels

    def __call__(self, images, visible, hidden, last: int | None = None):
        """images (b, H, W, c), visible (b, k), hidden (b, m) -> predictions (b, m, p*q*c).

        Hidden patches alone are painted: the loss reads no others. With last=n all are, in the
        order visible, hidden.
        """
        order = jnp.concatenate([visible, hidden], axis=1)
        if self.mask_tokens == "encoder":  # all are encoded, in their own order
            latent = self.encoder(images, masked=jnp.argsort(order, axis=1) >= visible.shape[1])
            latent = jnp.concatenate([latent[:, :1], take(latent[:, 1:], order)], axis=1)
        else:
            latent = self.encoder(images, visible=visible)
        return self.decoder(
            latent,
            order,
            grid=self.encoder.grid(images),
            values=self.vocabulary or math.prod(self.encoder.patch) * images.shape[-1],
            last=last or hidden.shape[1],
        )


def objective(
    model: dict,
    tokenizer: dict | None = None,
    *,
    mask_ratio: float = 0.75,
    sampling: Literal["random", "blockwise", "grid"] = "random",
    mask_tokens: Literal["decoder", "encoder"] = "decoder",
    target: targets.Name = "normalized_pixels",
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    mean: tuple = MEAN,
    std: tuple = STD,
) -> Objective:
    """MAE; mean and std are the data's.

    Its ablations (table 1): `sampling` may be blockwise or grid, `mask_tokens` may stand in the
    encoder already, the `target` may be pixels, or tokens of a frozen `tokenizer`.
    """
    encoder = vit(**model)
    decoder = Decoder(decoder_width, decoder_depth, decoder_heads, encoder.dtype, encoder.remat)
    asked = targets.make(target, encoder.patch, tokenizer, mean=mean, std=std)
    network = MAE(encoder, decoder, mask_tokens, asked.vocabulary)

    def prepare(batch, rng):
        """-> images, normalised, and the indices of visible (b, k) and hidden patches (b, m)."""
        images, rngs = normalize(batch["image"], mean, std), per_example(rng, batch["index"])
        return images, *hide(rngs, encoder.grid(images), mask_ratio, sampling)

    def forward(params, buffers, batch, rng):
        """-> images, hidden (b, m), the answers (b, n, ...), what is predicted (b, m, values)."""
        images, visible, hidden = prepare(batch, rng)
        predicted = network.apply({"params": params}, images, visible, hidden)
        return images, hidden, asked.answers(buffers, batch, images), predicted

    def errors(params, buffers, batch, rng):
        """-> {"loss": (b, m), and what else there is to know}"""
        _, hidden, answers, predicted = forward(params, buffers, batch, rng)
        return asked.errors(predicted, take(answers, hidden))

    def init(rng, batch):
        rng_mask, rng_params = jax.random.split(rng)
        return network.init(rng_params, *prepare(batch, rng_mask))["params"], asked.init(rng, batch)

    def loss(params, buffers, batch, rng, step):
        found = errors(params, buffers, batch, rng)
        error = found.pop("loss")
        return error.sum(), error.size, (jax.tree.map(jnp.mean, found), buffers)

    def evaluate(params, buffers, batch, rng):
        return jax.tree.map(lambda x: x.mean(1), errors(params, buffers, batch, rng))

    def pictures(params, buffers, batch, rng):
        images, hidden, answers, predicted = forward(params, buffers, batch, rng)
        masked = targets.blank(images, encoder.patch, hidden)
        painted = asked.paint(buffers, predicted, answers, hidden, encoder.grid(images))
        return OrderedDict(
            masked=denormalize(masked, mean, std),
            **painted,
            original=denormalize(images, mean, std),
        )

    return Objective(init, loss, evaluate, pictures, needs=asked.needs)
