"""BEiT (Bao et al., 2021): predict the visual tokens of hidden patches.

With pixels for tokens it is SimMIM (Xie et al., 2021), and what lies between in BEiT's table 4.

Shapes: b images, n patches, m at most hidden, d width, v vocabulary, (p, q) patch, c channels.
"""

import math
from collections import OrderedDict
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError, targets
from mim_jax.masking import Sampling, corrupt, sample
from mim_jax.models.patches import busy, patchify, take, unpatchify
from mim_jax.models.transformer import INITS, Dense
from mim_jax.models.vit import ViT, vit
from mim_jax.normalize import MEAN, STD, denormalize, normalize, unit
from mim_jax.objectives import Objective, per_example


class BEiT(nn.Module):
    """The encoder, and a linear head on the places that are asked for."""

    encoder: ViT
    vocabulary: int = 0  # what is predicted of a patch: so many logits, or 0: its p*q*c pixels

    @nn.compact
    def __call__(self, images, masked, places, drop_keys=None):
        """images (b, H, W, c), masked (b, n), places (b, m) -> predictions (b, m, v)."""
        values = self.vocabulary or math.prod(self.encoder.patch) * images.shape[-1]
        tokens = self.encoder(images, masked=masked, drop_keys=drop_keys)
        init = INITS[self.encoder.initializer]
        head = Dense(values, dtype=self.encoder.dtype, kernel_init=init, name="head")
        return head(take(tokens[:, 1:], places))


def objective(
    model: dict,
    tokenizer: dict | None = None,
    *,
    sampling: Sampling = "blockwise",
    num_masked: int = 75,
    min_block: int = 16,
    mask_unit: int = 1,
    corruption: tuple = (1.0, 0.0, 0.0),
    recover: Literal["hidden", "all"] = "hidden",
    target: targets.Name = "tokens",
    error: targets.Error = "squared",
    mean: tuple = MEAN,
    std: tuple = STD,
) -> Objective:
    """BEiT: of the patches of an image `num_masked` at most are hidden, in blocks of `min_block`.

    The loss is the mean over all hidden patches of the batch. `corruption` is BERT's: the shares of
    hidden patches that the mask token, another patch, the patch itself stands for. recover="all"
    asks for patches that are seen too; mean and std are the data's.
    """
    if sampling == "none" and recover != "all":
        raise UserError('objective.sampling = "none" hides nothing: say objective.recover="all".')
    encoder = vit(**model)
    asked = targets.make(target, encoder.patch, tokenizer, mean=mean, std=std, error=error)
    network = BEiT(encoder, asked.vocabulary)

    def hide(batch, rng):
        """-> images, what is seen of them, masked (b, n), places (b, m), their weight (b, m)."""
        images = normalize(batch["image"], mean, std)
        rng_mask, rng_corrupt = jax.random.split(rng)
        hidden = sample(
            per_example(rng_mask, batch["index"]), encoder.grid(images), num_masked, sampling,
            min_block=min_block, unit=mask_unit,
        )  # fmt: skip
        masked, source = corrupt(per_example(rng_corrupt, batch["index"]), hidden, corruption)
        patches = take(patchify(images, encoder.patch), source)
        seen = unpatchify(patches, encoder.patch, images.shape[1])
        wanted = jnp.ones_like(hidden) if recover == "all" else hidden
        # As many places for each image, whatever its mask: those that are not wanted weigh nothing.
        count = wanted.shape[1] if recover == "all" else num_masked
        places = jnp.argsort(~wanted, axis=1)[:, :count]
        return images, seen, masked, places, jnp.take_along_axis(wanted, places, axis=1)

    def forward(params, buffers, batch, rng, drop_keys=None):
        """-> images, masked (b, n), places (b, m), weight (b, m), answers (b, n, ...), predicted"""
        images, seen, masked, places, weight = hide(batch, rng)
        predicted = network.apply({"params": params}, seen, masked, places, drop_keys)
        answers = asked.answers(buffers, batch, images)
        return images, masked, places, weight, answers, predicted

    def init(rng, batch):
        _, seen, masked, places, _ = hide(batch, rng)
        rng_params, rng_buffers = jax.random.split(rng)
        params = network.init(rng_params, seen, masked, places)["params"]
        return params, asked.init(rng_buffers, batch)

    def loss(params, buffers, batch, rng, step):
        drop_keys = per_example(jax.random.fold_in(rng, 1), batch["index"])
        *_, places, weight, answers, predicted = forward(params, buffers, batch, rng, drop_keys)
        found = asked.errors(predicted, take(answers, places))
        sums = jax.tree.map(lambda x: (x * weight).sum(), found)
        total, count = sums.pop("loss"), weight.sum()
        means = {name: x / jnp.maximum(count, 1) for name, x in sums.items()}
        return total, count, (means, buffers)

    def evaluate(params, buffers, batch, rng):
        _, _, places, weight, answers, predicted = forward(params, buffers, batch, rng)
        wanted = take(answers, places)
        found = asked.errors(predicted, wanted)
        sums = jax.tree.map(lambda x: (x * weight).sum(1), found) | {"count": weight.sum(1)}
        if not asked.vocabulary:
            return sums
        # Much of a drawing is blank, which is easy to predict: how well is the rest?
        lively = busy(unit(batch["image"]), encoder.patch)
        lively = weight & jnp.take_along_axis(lively, places, axis=1)
        tokens = jax.nn.one_hot(wanted[..., 0], asked.vocabulary)
        return sums | {
            "accuracy_not_blank": (found["accuracy"] * lively).sum(1),
            "count_not_blank": lively.sum(1),
            "tokens_not_blank": (tokens * lively[..., None]).sum(1),
        }

    def summarize(sums):
        """Sums over the hidden patches of an image -> means over all hidden patches."""
        means = {name: sums[name] / sums["count"] for name in ("loss", "accuracy") if name in sums}
        if lively := sums.get("count_not_blank"):
            means["accuracy_not_blank"] = sums["accuracy_not_blank"] / lively
            means["most_frequent_not_blank"] = sums["tokens_not_blank"].max() / lively
        return means

    def pictures(params, buffers, batch, rng):
        images, masked, places, weight, answers, predicted = forward(params, buffers, batch, rng)
        n, grid = masked.shape[1], encoder.grid(images)
        shown = jnp.where(weight, places, n)  # there is no place n: what is not wanted is not put
        blank = targets.blank(images, encoder.patch, jnp.where(masked, jnp.arange(n), n))
        return OrderedDict(
            masked=denormalize(blank, mean, std),
            **asked.paint(buffers, predicted, answers, shown, grid),
            original=denormalize(images, mean, std),
        )

    return Objective(init, loss, evaluate, pictures, summarize, asked.needs)
