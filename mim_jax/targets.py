"""Prediction targets for masked patches: pixels, normalized pixels, or visual tokens.

Shapes: b images, n patches, m masked patches, (p, q) patch, c channels, v vocabulary.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mim_jax import UserError
from mim_jax.models.dvae import DVAE
from mim_jax.models.patches import patchify, take, unpatchify
from mim_jax.normalize import denormalize, unit

Name = Literal["pixels", "normalized_pixels", "tokens"]
Distance = Literal["squared", "absolute", "huber"]
DISTANCES = {
    "squared": lambda difference: difference**2,
    "absolute": jnp.abs,
    "huber": optax.losses.huber_loss,
}


class Target(NamedTuple):
    """A prediction target for masked patches, as pure functions."""

    vocabulary: int  # number of logits per patch; 0: the p*q*c pixels of a patch are predicted
    init: Callable  # (rng, batch) -> buffers of the target
    compute: Callable  # (buffers, batch, normalized images) -> targets of all patches (b, n, ...)
    loss: Callable  # (predicted (b, m, size), targets (b, m, ...)) -> {"loss": (b, m), ...}
    # (buffers, predicted, targets, masked (b, m), grid) -> {caption: images in [0, 1]}
    paint: Callable
    needs: tuple[str, ...] = ()  # buffers from other runs, see Objective


def make(
    name: Name,
    patch: tuple[int, int],
    tokenizer: DVAE | None,
    *,
    mean: tuple,
    std: tuple,
    distance: Distance = "squared",
) -> Target:
    """Returns a prediction target.

    Args:
        name: pixels, pixels normalized by the statistics of each patch, or visual tokens.
        patch: rows and columns of a patch.
        tokenizer: the dVAE that computes the tokens; required for "tokens" only.
        mean: mean of the images' channels, for pictures.
        std: standard deviation of the images' channels, for pictures.
        distance: distance between predicted and true pixels.

    Raises:
        UserError: if the target is tokens and there is no tokenizer.
    """
    if name != "tokens":
        return pixels(patch, mean, std, normalized=name == "normalized_pixels", distance=distance)
    if tokenizer is None:
        raise UserError('objective.target = "tokens" needs a tokenizer: add a block `tokenizer`.')
    return tokens(patch, tokenizer)


def statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and standard deviation of each patch (unbiased variance, as in PyTorch)."""
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(var + 1e-6)


def pixels(
    patch: tuple[int, int], mean: tuple, std: tuple, *, normalized: bool, distance: Distance
) -> Target:
    """Returns the target of pixels, `normalized` by each patch's mean and variance (MAE)."""

    def scale(patches):
        return statistics(patches) if normalized else (0.0, 1.0)

    def loss(predicted, patches):
        center, deviation = scale(patches)
        difference = predicted.astype(patches.dtype) - (patches - center) / deviation
        return {"loss": DISTANCES[distance](difference).mean(-1)}

    def paint(buffers, predicted, patches, masked, grid):
        # Normalized pixels lack brightness and contrast, so use those of the true patch.
        center, deviation = scale(take(patches, masked))
        caption = "painted, true mean and variance" if normalized else "painted"
        painted = put(patches, masked, predicted.astype(patches.dtype) * deviation + center)
        return {caption: denormalize(unpatchify(painted, patch, grid[0] * patch[0]), mean, std)}

    return Target(
        vocabulary=0,
        init=lambda rng, batch: {},
        compute=lambda buffers, batch, images: patchify(images, patch),
        loss=loss,
        paint=paint,
    )


def tokens(patch: tuple[int, int], tokenizer: DVAE) -> Target:
    """Returns the target of visual tokens that a frozen dVAE computes (BEiT, section 2)."""

    def init(rng, batch):
        if "tokenizer_image" not in batch:
            raise UserError("token targets need data.tokenizer_size, for example 112.")
        views, patches = (batch["tokenizer_image"], batch["image"]), (tokenizer.patch, patch)
        tokens, n = (patchify(*pair).shape[1] for pair in zip(views, patches, strict=True))
        if tokens != n:
            raise UserError(
                f"the tokenizer computes {tokens} tokens, but there are {n} patches: set "
                "data.tokenizer_size so that both numbers are equal."
            )
        return tokenizer.init(rng, unit(batch["tokenizer_image"]))

    def compute(buffers, batch, images):
        tokens = tokenizer.tokens(buffers["tokenizer"], unit(batch["tokenizer_image"]))
        return tokens[..., None]  # (b, n, 1)

    def loss(predicted, targets):
        logits = predicted.astype(jnp.promote_types(predicted.dtype, jnp.float32))
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets[..., 0])
        return {"loss": loss, "accuracy": logits.argmax(-1) == targets[..., 0]}

    def paint(buffers, predicted, targets, masked, grid):
        def decode(tokens):
            return tokenizer.decode(buffers["decoder"], tokens[..., 0], grid)

        completed = put(targets, masked, predicted.argmax(-1)[..., None])
        return {
            "decoded from predicted tokens": decode(completed),
            "decoded from its tokens": decode(targets),
        }

    vocabulary = tokenizer.encoder.vocabulary
    return Target(vocabulary, init, compute, loss, paint, needs=("tokenizer",))


def put(values: jax.Array, places: jax.Array, new: jax.Array) -> jax.Array:
    """Returns values (b, n, d) with the rows at `places` (b, m) replaced; place n is ignored."""
    return values.at[jnp.arange(len(values))[:, None], places].set(new)


def blank(images: jax.Array, patch: tuple[int, int], places: jax.Array) -> jax.Array:
    """Returns images (b, H, W, c) with the patches at `places` (b, m) set to zero."""
    patches = patchify(images, patch)
    zeros = jnp.zeros((*places.shape, patches.shape[-1]), patches.dtype)
    return unpatchify(put(patches, places, zeros), patch, images.shape[1])
