"""Masked autoencoders (He et al., 2021): encode the visible patches, reconstruct the hidden ones.

Shapes: b images, n patches, k visible, m hidden, d width, (p, q) patch, c channels.
"""

import math
from collections import OrderedDict
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import targets
from mim_jax.keys import DEPTH, POSITIVE, SHARE, WIDTH, Smoke
from mim_jax.masking import count_visible, hide
from mim_jax.models.decoder import Decoder
from mim_jax.models.dvae import DVAE
from mim_jax.models.patches import take
from mim_jax.models.vit import ViT
from mim_jax.normalize import MEAN, STD, Mean, Std, denormalize, normalize
from mim_jax.objectives import Objective, per_example


class MAE(nn.Module):
    """An encoder of the visible patches and a decoder that predicts the hidden ones."""

    encoder: ViT
    decoder: Decoder
    mask_tokens: str = "decoder"
    vocabulary: int = 0  # number of logits predicted per patch; 0: its p*q*c pixels

    def __call__(self, images, visible, hidden, last: int | None = None):
        """images (b, H, W, c), visible (b, k), hidden (b, m) -> predictions (b, m, p*q*c).

        `visible` and `hidden` are indices of patches. Only hidden patches are predicted, because
        the loss uses no others. With last=n all patches are predicted, visible ones first.
        """
        order = jnp.concatenate([visible, hidden], axis=1)
        if self.mask_tokens == "encoder":  # the encoder gets all patches, in image order
            latent = self.encoder(images, masked=jnp.argsort(order, axis=1) >= visible.shape[1])
            latent = jnp.concatenate([latent[:, :1], take(latent[:, 1:], order)], axis=1)
        else:
            latent = self.encoder(images, visible=visible)  # (b, 1 + k, d)
        return self.decoder(
            latent,
            order,
            grid=self.encoder.grid(images),
            values=self.vocabulary or math.prod(self.encoder.patch) * images.shape[-1],
            last=last or hidden.shape[1],
        )


def objective(
    model: ViT,
    tokenizer: DVAE | None = None,
    *,
    mask_ratio: Annotated[float, SHARE, "masking ratio: share of hidden patches"] = 0.75,
    sampling: Annotated[
        Literal["random", "blockwise", "grid"], "how hidden patches are sampled (table 1f)"
    ] = "random",
    mask_tokens: Annotated[
        Literal["decoder", "encoder"], "the network that gets mask tokens (table 1c)"
    ] = "decoder",
    target: Annotated[targets.Name, "prediction target (table 1d)"] = "normalized_pixels",
    decoder_width: Annotated[int, WIDTH, Smoke(32), "width of the decoder"] = 512,
    decoder_depth: Annotated[int, DEPTH, Smoke(1), "number of decoder blocks"] = 8,
    decoder_heads: Annotated[int, POSITIVE, Smoke(2), "attention heads of the decoder"] = 16,
    mean: Mean = MEAN,
    std: Std = STD,
) -> Objective:
    """Returns the objective of masked autoencoding (He et al., 2021, section 3 and table 1)."""
    decoder = Decoder(decoder_width, decoder_depth, decoder_heads, model.dtype, model.remat)
    target = targets.make(target, model.patch, tokenizer, mean=mean, std=std)
    network = MAE(model, decoder, mask_tokens, target.vocabulary)

    def prepare(batch, rng):
        """Returns normalized images, visible indices (b, k) and hidden indices (b, m)."""
        images, rngs = normalize(batch["image"], mean, std), per_example(rng, batch["index"])
        return images, *hide(rngs, model.grid(images), mask_ratio, sampling)

    def predict(params, buffers, batch, rng):
        """Returns images, hidden (b, m), predictions (b, m, ...) and targets (b, n, ...)."""
        images, visible, hidden = prepare(batch, rng)
        predicted = network.apply({"params": params}, images, visible, hidden)
        return images, hidden, predicted, target.compute(buffers, batch, images)

    def init(rng, batch):
        rng_mask, rng_params = jax.random.split(rng)
        params = network.init(rng_params, *prepare(batch, rng_mask))["params"]
        return params, target.init(rng, batch)

    def losses(params, buffers, batch, rng):
        """Returns the losses of the hidden patches, {"loss": (b, m), ...}."""
        _, hidden, predicted, truth = predict(params, buffers, batch, rng)
        return target.loss(predicted, take(truth, hidden))

    def loss(params, buffers, batch, rng, step):
        metrics = losses(params, buffers, batch, rng)
        error = metrics.pop("loss")
        return error.sum(), error.size, (jax.tree.map(jnp.mean, metrics), buffers)

    def evaluate(params, buffers, batch, rng):
        return jax.tree.map(lambda x: x.mean(1), losses(params, buffers, batch, rng))

    def pictures(params, buffers, batch, rng):
        images, hidden, predicted, truth = predict(params, buffers, batch, rng)
        masked = targets.blank(images, model.patch, hidden)
        painted = target.paint(buffers, predicted, truth, hidden, model.grid(images))
        return OrderedDict(
            masked=denormalize(masked, mean, std),
            **painted,
            original=denormalize(images, mean, std),
        )

    def describe(images):
        n = math.prod(model.grid(images))
        k = count_visible(n, mask_ratio)
        return f"{n - k} of {n} patches are hidden and {k} visible (mask_ratio = {mask_ratio:g})"

    return Objective(
        init, loss, evaluate, pictures, needs=target.needs, head=("decoder",), describe=describe
    )
