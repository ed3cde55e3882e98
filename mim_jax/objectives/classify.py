"""Classification: training from scratch, fine-tuning, and linear probes of a frozen encoder.

What of the encoder is frozen lies among the buffers: it has no gradient and no optimizer state.

Shapes: b images, n patches, d width, k classes, l layers.
"""

from collections import OrderedDict
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError
from mim_jax.augment import erase, mix, smooth
from mim_jax.models.transformer import LayerNorm
from mim_jax.models.vit import ViT, vit
from mim_jax.normalize import MEAN, STD, denormalize, normalize
from mim_jax.objectives import Objective, per_example

MLP = ("norm2", "fc1", "fc2", "gamma_2")  # the second half of a block


class BatchNorm(nn.Module):
    """Features at mean 0 and variance 1: PyTorch's BatchNorm1d(affine=False, eps=1e-6).

    Each `group` of consecutive rows has statistics of its own, as those of a device in MAE's code;
    their running average, for evaluation, is of the unbiased variance.
    """

    group: int

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """x (b, d) -> (b, d)"""
        running = {
            name: self.variable("batch_statistics", name, fill, x.shape[1:], x.dtype)
            for name, fill in (("mean", jnp.zeros), ("variance", jnp.ones))
        }
        if not training:
            mean, variance = running["mean"].value, running["variance"].value
            return (x - mean) * jax.lax.rsqrt(variance + 1e-6)
        if len(x) % self.group:
            raise UserError(
                f"objective.batch_norm = {self.group} does not divide the {len(x)} images that are "
                "computed at once: make it a divisor of batch_size / devices / accumulate."
            )
        groups = x.reshape(-1, self.group, x.shape[1])
        mean, variance = groups.mean(1, keepdims=True), groups.var(1, keepdims=True)
        unbiased = variance * self.group / max(self.group - 1, 1)
        for name, now in (("mean", mean), ("variance", unbiased)):
            running[name].value = 0.9 * running[name].value + 0.1 * now.mean((0, 1))
        return ((groups - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape)


class Classifier(nn.Module):
    """The encoder, what is pooled of its tokens, and a linear head."""

    encoder: ViT
    num_labels: int
    pooling: str
    batch_norm: int
    head_std: float

    @nn.compact
    def __call__(self, images, drop_keys=None, training: bool = False) -> jax.Array:
        """images (b, H, W, c) -> logits (b, l, k) in float32 or better; l is 1 but for `layers`."""
        depth = self.encoder.depth
        if self.pooling == "cls":
            pooled = [self.encoder(images, drop_keys=drop_keys)[:, 0]]
        elif self.pooling == "mean":
            (tokens,) = self.encoder(images, drop_keys=drop_keys, layers=(depth - 1,))
            pooled = [LayerNorm(dtype=tokens.dtype, name="fc_norm")(tokens[:, 1:].mean(1))]
        else:
            outputs = self.encoder(images, drop_keys=drop_keys, layers=tuple(range(depth)))
            pooled = [jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=1) for x in outputs]
        logits = []
        for i, x in enumerate(pooled):
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            name = f"head_{i}" if self.pooling == "layers" else "head"
            if self.batch_norm:
                x = BatchNorm(self.batch_norm, name=f"{name}_norm")(x, training)
            init = nn.initializers.normal(self.head_std)
            logits.append(nn.Dense(self.num_labels, kernel_init=init, name=name)(x))
        return jnp.stack(logits, axis=1)


def objective(
    model: dict,
    num_labels: int,
    *,
    pooling: Literal["mean", "cls", "layers"] = "mean",
    batch_norm: int = 0,
    head_std: float = 2e-5,
    tuned_blocks: float = -1.0,
    smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mixup_group: int = 128,
    erasing: float = 0.0,
    mean: tuple = MEAN,
    std: tuple = STD,
) -> Objective:
    """Which of `num_labels` classes an image is of.

    pooling: "mean" of the patches after the last block, then a norm of its own (fine-tuning, MAE
        and BEiT); "cls": the class token after the encoder's norm; "layers": class token and mean
        of the patches after each block, with a head for each (BEiT's linear probe).
    batch_norm: what the head is given is normalised (MAE's linear probe), by the statistics of so
        many consecutive images.
    tuned_blocks: how many of the last blocks are trained beside the head. 0 is a linear probe, 0.5
        the MLP of the last block, 1.5 that of the last but one and all after it, -1: everything.
    mixup, cutmix: their betas; each `mixup_group` consecutive images are mixed by one share.
    head_std, smoothing, erasing: the head's deviation at first, label smoothing, the probability
        of random erasing. mean and std are the data's.
    """
    encoder = vit(**model)
    if num_labels < 2:
        there = "one label alone" if num_labels else "no labels"
        raise UserError(f"classify needs images with labels: this data set has {there}.")
    if tuned_blocks != -1 and (tuned_blocks % 0.5 or not 0 <= tuned_blocks <= encoder.depth):
        raise UserError(
            f"objective.tuned_blocks = {tuned_blocks:g}: say 0, 0.5, 1, 1.5, ... of the "
            f"{encoder.depth} blocks, or -1 for the whole encoder."
        )
    if (mixup or cutmix) and (mixup_group < 2 or mixup_group % 2):
        raise UserError(
            f"objective.mixup_group = {mixup_group}: images are mixed in pairs, say an even number."
        )
    if batch_norm == 1:
        raise UserError("objective.batch_norm = 1: say 0, or 2 images at least.")
    network = Classifier(encoder, num_labels, pooling, batch_norm, head_std)

    def tuned(path: tuple[str, ...]) -> bool:
        """Whether a parameter of the encoder is trained."""
        if tuned_blocks < 0:
            return True
        if not path[0].startswith("block_"):
            return path[0] == "norm" and tuned_blocks > 0
        behind = encoder.depth - int(path[0].removeprefix("block_"))  # 1: the last block
        return behind <= tuned_blocks or (behind - tuned_blocks == 0.5 and path[1] in MLP)

    def init(rng, batch):
        buffers = network.init(rng, normalize(batch["image"], mean, std))
        params = buffers.pop("params")
        whole = flatten_dict(params.pop("encoder"))
        for tree, is_here in ((params, True), (buffers, False)):
            if part := {path: x for path, x in whole.items() if tuned(path) == is_here}:
                tree["encoder"] = unflatten_dict(part)
        return params, buffers

    def forward(params, buffers, images, drop_keys=None, training=False):
        """-> logits (b, l, k), buffers"""
        parts = (flatten_dict(tree.get("encoder", {})) for tree in (buffers, params))
        whole = unflatten_dict({k: v for part in parts for k, v in part.items()})
        variables = {"params": params | {"encoder": whole}}
        if not batch_norm:
            return network.apply(variables, images, drop_keys, training), buffers
        name = "batch_statistics"
        logits, changed = network.apply(
            variables | {name: buffers[name]}, images, drop_keys, training, mutable=[name]
        )
        return logits, buffers | changed

    def augmented(batch, rng, group=mixup_group):
        """-> images and targets (b, k), as they are trained on."""
        images = normalize(batch["image"], mean, std)
        targets = smooth(batch["label"], num_labels, smoothing)
        rng_erase, rng_mix = jax.random.split(rng)
        if erasing:
            images = erase(images, per_example(rng_erase, batch["index"]), erasing)
        if mixup or cutmix:
            shares = dict(group=group, mixup=mixup, cutmix=cutmix)
            images, targets = mix(images, targets, rng_mix, batch["index"], **shares)
        return images, targets

    def loss(params, buffers, batch, rng, step):
        rng_augment, rng_drop = jax.random.split(rng)
        images, targets = augmented(batch, rng_augment)
        drop_keys = None if tuned_blocks == 0 else per_example(rng_drop, batch["index"])
        logits, buffers = forward(params, buffers, images, drop_keys, training=True)
        found = optax.losses.softmax_cross_entropy(logits, targets[:, None])  # (b, l)
        return found.sum(), len(images), ({}, buffers)

    def evaluate(params, buffers, batch, rng):
        logits, _ = forward(params, buffers, normalize(batch["image"], mean, std))
        labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
        likeliest = jax.lax.top_k(logits, min(5, num_labels))[1]
        hits = likeliest == labels[..., None]
        classes = jax.nn.one_hot(batch["label"], num_labels)
        return {
            "loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": hits[..., 0],
            "top5": hits.any(-1),
            "share": classes,
            "right": hits[..., :1] * classes[:, None],
        }

    def summarize(means):
        """The figures of the best layer; `by_class`: of each class the share and the accuracy."""
        if (known := means["share"].sum()) < 1 - 1e-6:
            raise UserError(
                f"{1 - known:.1%} of the images have a label that is none of 0 to "
                f"{num_labels - 1}: choose another data.evaluation_split; some have no labels."
            )
        best = means["accuracy"].argmax()
        numbers = {name: means[name][best] for name in ("loss", "accuracy", "top5")}
        if len(means["accuracy"]) > 1:
            layers = enumerate(means["accuracy"], 1)
            numbers |= {f"accuracy_layer_{i}": value for i, value in layers}
            numbers["best_layer"] = best + 1
        by_class = means["right"][best] / means["share"].clip(min=1e-12)
        return numbers | {"by_class": np.stack([means["share"], by_class], axis=1)}

    def pictures(params, buffers, batch, rng):
        images, _ = augmented(batch, rng, group=len(batch["image"]))
        return OrderedDict(
            trained=denormalize(images, mean, std),
            original=denormalize(normalize(batch["image"], mean, std), mean, std),
        )

    return Objective(init, loss, evaluate, pictures, summarize)
