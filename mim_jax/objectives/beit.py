"""BEiT (Bao et al., 2021): predict the visual tokens of masked patches.

With pixels instead of tokens this is SimMIM (Xie et al., 2021). The ablations of BEiT's table 4 are
combinations of keys.

Shapes: b images, n patches, m predicted patches, v vocabulary, (p, q) patch, c channels.
"""

import dataclasses
import functools
import math
from collections import OrderedDict
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError, targets
from mim_jax.keys import POSITIVE, SHARE, Smoke
from mim_jax.masking import Sampling, corrupt, sample
from mim_jax.models.dvae import DVAE
from mim_jax.models.layers import Dense
from mim_jax.models.patches import not_blank, patchify, take, unpatchify
from mim_jax.models.transformer import INITS
from mim_jax.models.vit import ViT
from mim_jax.normalize import MEAN, STD, Mean, Std, denormalize, normalize, unit
from mim_jax.objectives import objective_of, per_example


class BEiT(nn.Module):
    """The encoder and a linear head for the predicted patches."""

    encoder: ViT
    vocabulary: int = 0  # number of logits predicted per patch; 0: its p*q*c pixels

    @nn.compact
    def __call__(self, images, masked, places, drop_keys=None):
        """images (b, H, W, c), masked (b, n), places (b, m) -> predictions (b, m, v)."""
        values = self.vocabulary or math.prod(self.encoder.patch) * images.shape[-1]
        tokens = self.encoder(images, masked=masked, drop_keys=drop_keys)
        init = INITS[self.encoder.initializer]
        head = Dense(values, dtype=self.encoder.dtype, wide=True, kernel_init=init, name="head")
        return head(take(tokens[:, 1:], places))


class Masked(NamedTuple):
    """A batch after masking."""

    images: jax.Array  # (b, H, W, c), normalized
    corrupted: jax.Array  # the same, with some patches replaced by others
    mask_tokens: jax.Array  # (b, n), true where the mask token replaces a patch
    places: jax.Array  # (b, m), indices of patches to predict
    weight: jax.Array  # (b, m), false where `places` is padding


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedImageModeling:
    """Masked image modeling with mask tokens in the encoder (Bao et al., 2021, section 2).

    The loss is the mean over all masked patches of the batch. The corruption is BERT's.
    """

    model: ViT
    tokenizer: DVAE | None = None
    _: dataclasses.KW_ONLY
    sampling: Annotated[Sampling, "how masked patches are chosen"] = "blockwise"
    num_masked: Annotated[int, POSITIVE, Smoke(6), "largest number of masked patches per image"] = (
        75
    )
    min_block: Annotated[int, POSITIVE, Smoke(2), "smallest number of patches in a block"] = 16
    mask_unit: Annotated[int, POSITIVE, "side of the masked squares, in patches (SimMIM)"] = 1
    corruption: Annotated[
        tuple,
        SHARE,
        "shares of masked patches that become the mask token, become another patch, stay unchanged",
    ] = (1.0, 0.0, 0.0)
    recover: Annotated[Literal["hidden", "all"], "patches in the loss: the masked ones, or all"] = (
        "hidden"
    )
    target: Annotated[targets.Name, "prediction target"] = "tokens"
    error: Annotated[targets.Distance, "distance between pixels and their prediction"] = "squared"
    mean: Mean = MEAN
    std: Std = STD

    def __post_init__(self):
        if self.sampling == "none" and self.recover != "all":
            raise UserError('objective.sampling = "none" needs objective.recover = "all".')

    @functools.cached_property
    def truth(self) -> targets.Target:
        statistics = dict(mean=self.mean, std=self.std)
        patch, error = self.model.patch, self.error
        return targets.make(self.target, patch, self.tokenizer, **statistics, distance=error)

    @functools.cached_property
    def network(self) -> BEiT:
        return BEiT(self.model, self.truth.vocabulary)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.truth.needs

    def mask(self, batch, rng) -> Masked:
        encoder = self.model
        images = normalize(batch["image"], self.mean, self.std)
        rng_mask, rng_corrupt = jax.random.split(rng)
        hidden = sample(
            per_example(rng_mask, batch["index"]),
            encoder.grid(images),
            self.num_masked,
            self.sampling,
            min_block=self.min_block,
            unit=self.mask_unit,
        )
        rngs = per_example(rng_corrupt, batch["index"])
        mask_tokens, source = corrupt(rngs, hidden, self.corruption)
        patches = take(patchify(images, encoder.patch), source)
        corrupted = unpatchify(patches, encoder.patch, images.shape[1])
        wanted = jnp.ones_like(hidden) if self.recover == "all" else hidden
        # Masks differ in size: all images have the same number of places, padded with weight 0.
        count = wanted.shape[1] if self.recover == "all" else self.num_masked
        places = jnp.argsort(~wanted, axis=1)[:, :count]
        weight = jnp.take_along_axis(wanted, places, axis=1)
        return Masked(images, corrupted, mask_tokens, places, weight)

    def predict(self, params, buffers, batch, rng, drop_keys=None):
        """Returns the masked batch, predictions (b, m, v) and the targets (b, n, ...)."""
        masked = self.mask(batch, rng)
        predicted = self.network.apply(
            {"params": params}, masked.corrupted, masked.mask_tokens, masked.places, drop_keys
        )
        return masked, predicted, self.truth.compute(buffers, batch, masked.images)

    def init(self, rng, batch):
        masked = self.mask(batch, rng)
        rng_params, rng_buffers = jax.random.split(rng)
        inputs = masked.corrupted, masked.mask_tokens, masked.places
        params = self.network.init(rng_params, *inputs)["params"]
        return params, self.truth.init(rng_buffers, batch)

    def loss(self, params, buffers, batch, rng, step):
        drop_keys = per_example(jax.random.fold_in(rng, 1), batch["index"])
        masked, predicted, truth = self.predict(params, buffers, batch, rng, drop_keys)
        losses = self.truth.loss(predicted, take(truth, masked.places))
        sums = jax.tree.map(lambda x: (x * masked.weight).sum(), losses)
        total, count = sums.pop("loss"), masked.weight.sum()
        means = {name: x / jnp.maximum(count, 1) for name, x in sums.items()}
        return total, count, (means, buffers)

    def evaluate(self, params, buffers, batch, rng):
        """Returns sums over the masked patches of each image, and the number of these patches."""
        masked, predicted, truth = self.predict(params, buffers, batch, rng)
        weight, truth = masked.weight, take(truth, masked.places)
        losses = self.truth.loss(predicted, truth)
        sums = jax.tree.map(lambda x: (x * weight).sum(1), losses) | {"count": weight.sum(1)}
        if not self.truth.vocabulary:
            return sums
        # Much of a drawing is blank and easy to predict: report the other patches separately.
        busy = not_blank(unit(batch["image"]), self.model.patch)
        busy = weight & jnp.take_along_axis(busy, masked.places, axis=1)
        tokens = jax.nn.one_hot(truth[..., 0], self.truth.vocabulary)
        return sums | {
            "accuracy_not_blank": (losses["accuracy"] * busy).sum(1),
            "count_not_blank": busy.sum(1),
            "tokens_not_blank": (tokens * busy[..., None]).sum(1),
        }

    def summarize(self, sums):
        """Turns sums over the masked patches of an image into means over all masked patches."""
        means = {name: sums[name] / sums["count"] for name in ("loss", "accuracy") if name in sums}
        if count := sums.get("count_not_blank"):
            means["accuracy_not_blank"] = sums["accuracy_not_blank"] / count
            means["most_frequent_not_blank"] = sums["tokens_not_blank"].max() / count
        return means

    def pictures(self, params, buffers, batch, rng):
        masked, predicted, truth = self.predict(params, buffers, batch, rng)
        encoder, n = self.model, masked.mask_tokens.shape[1]
        places = jnp.where(masked.weight, masked.places, n)  # `put` ignores place n
        covered = jnp.where(masked.mask_tokens, jnp.arange(n), n)
        blank = targets.blank(masked.images, encoder.patch, covered)
        grid = encoder.grid(masked.images)
        return OrderedDict(
            masked=denormalize(blank, self.mean, self.std),
            **self.truth.paint(buffers, predicted, truth, places, grid),
            original=denormalize(masked.images, self.mean, self.std),
        )


objective = objective_of(MaskedImageModeling)
