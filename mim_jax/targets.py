"""What is asked of hidden patches: their pixels, their pixels normalised, their visual tokens.

Shapes: b images, n patches, m hidden, (p, q) patch, c channels, v vocabulary.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mim_jax import UserError
from mim_jax.models.dvae import DVAE, dvae
from mim_jax.models.patches import patchify, take, unpatchify
from mim_jax.normalize import denormalize, unit

Name = Literal["pixels", "normalized_pixels", "tokens"]
Error = Literal["squared", "absolute", "huber"]
ERRORS = {
    "squared": lambda far: far**2,
    "absolute": jnp.abs,
    "huber": optax.losses.huber_loss,
}


class Target(NamedTuple):
    """A question about hidden patches, as pure functions."""

    vocabulary: int  # how many logits predict a patch; 0: its p*q*c pixels are predicted
    init: Callable  # (rng, batch) -> buffers that it needs
    answers: Callable  # (buffers, batch, normalised images) -> of all patches (b, n, ...)
    errors: Callable  # (predicted (b, m, size), answers (b, m, ...)) -> {"loss": (b, m), ...}
    # (buffers, predicted, answers, hidden (b, m), grid) -> {caption: images in [0, 1]}
    paint: Callable
    needs: tuple[str, ...] = ()  # as of an Objective


def make(
    name: Name,
    patch: tuple[int, int],
    tokenizer: dict | None,
    *,
    mean: tuple,
    std: tuple,
    error: Error = "squared",
) -> Target:
    """The target of a name: pixels, normalized_pixels or tokens."""
    if name == "tokens":
        return tokens(patch, dvae(**(tokenizer or {})))
    return pixels(patch, mean, std, normalized=name == "normalized_pixels", error=error)


def statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of each patch over all its values, the variance unbiased as torch's."""
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(var + 1e-6)


def pixels(patch: tuple, mean: tuple, std: tuple, *, normalized: bool, error: Error) -> Target:
    """The values of a patch; `normalized`: less their mean, by their deviation (MAE, section 3)."""

    def scale(patches):
        return statistics(patches) if normalized else (0.0, 1.0)

    def errors(predicted, patches):
        center, deviation = scale(patches)
        far = predicted.astype(patches.dtype) - (patches - center) / deviation
        return {"loss": ERRORS[error](far).mean(-1)}

    def paint(buffers, predicted, patches, hidden, grid):
        center, deviation = scale(take(patches, hidden))
        # What is painted on a normalised target has no brightness and contrast: it borrows them.
        caption = "painted, true mean and variance" if normalized else "painted"
        painted = put(patches, hidden, predicted.astype(patches.dtype) * deviation + center)
        return {caption: denormalize(unpatchify(painted, patch, grid[0] * patch[0]), mean, std)}

    return Target(
        vocabulary=0,
        init=lambda rng, batch: {},
        answers=lambda buffers, batch, images: patchify(images, patch),
        errors=errors,
        paint=paint,
    )


def tokens(patch: tuple[int, int], tokenizer: DVAE) -> Target:
    """The visual tokens that a frozen dVAE gives the `tokenizer_image` (BEiT, section 2)."""

    def init(rng, batch):
        if "tokenizer_image" not in batch:
            raise UserError("to ask for tokens, the config must say data.tokenizer_size, as 112.")
        views, patches = (batch["tokenizer_image"], batch["image"]), (tokenizer.patch, patch)
        tokens, n = (patchify(*pair).shape[1] for pair in zip(views, patches, strict=True))
        if tokens != n:
            raise UserError(
                f"the tokenizer gives {tokens} tokens for {n} patches: choose "
                "data.tokenizer_size such that these are equal."
            )
        return tokenizer.init(rng, unit(batch["tokenizer_image"]))

    def answers(buffers, batch, images):
        found = tokenizer.tokens(buffers["tokenizer"], unit(batch["tokenizer_image"]))
        return found[..., None]

    def errors(predicted, answers):
        logits = predicted.astype(jnp.promote_types(predicted.dtype, jnp.float32))
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, answers[..., 0])
        return {"loss": loss, "accuracy": logits.argmax(-1) == answers[..., 0]}

    def paint(buffers, predicted, answers, hidden, grid):
        def decode(tokens):
            return tokenizer.decode(buffers["decoder"], tokens[..., 0], grid)

        guessed = put(answers, hidden, predicted.argmax(-1)[..., None])
        return {
            "decoded from predicted tokens": decode(guessed),
            "decoded from its tokens": decode(answers),
        }

    vocabulary = tokenizer.encoder.vocabulary
    return Target(vocabulary, init, answers, errors, paint, needs=("tokenizer",))


def put(values: jax.Array, places: jax.Array, new: jax.Array) -> jax.Array:
    """values (b, n, d) with the rows `places` (b, m) exchanged for new; there is no place n."""
    return values.at[jnp.arange(len(values))[:, None], places].set(new)


def blank(images: jax.Array, patch: tuple[int, int], places: jax.Array) -> jax.Array:
    """images (b, H, W, c) with the patches `places` (b, m) at zero."""
    patches = patchify(images, patch)
    nothing = jnp.zeros((*places.shape, patches.shape[-1]), patches.dtype)
    return unpatchify(put(patches, places, nothing), patch, images.shape[1])
