"""Classification: training from scratch, fine-tuning, and probes of a frozen encoder.

Frozen parameters of the encoder are buffers: they have no gradient and no optimizer state.

Shapes: b images, d width, k classes, l layers.
"""

import dataclasses
import functools
from collections import OrderedDict
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError
from mim_jax.augment import erase, mix, smooth
from mim_jax.keys import NOT_NEGATIVE, PER_DEVICE, SHARE, Range
from mim_jax.models.batch_norm import COLLECTION, BatchNorm
from mim_jax.models.layers import LayerNorm
from mim_jax.models.vit import ViT
from mim_jax.normalize import MEAN, STD, Mean, Std, denormalize, normalize
from mim_jax.objectives import objective_of, per_example

MLP = ("norm2", "fc1", "fc2", "gamma_2")  # the second half of a block


class Classifier(nn.Module):
    """The encoder, pooling of its tokens, and a linear head."""

    encoder: ViT
    num_labels: int
    pooling: str
    batch_norm: int
    head_std: float

    @nn.compact
    def __call__(self, images, drop_keys=None, training: bool = False) -> jax.Array:
        """images (b, H, W, c) -> logits (b, l, k), at least float32; l > 1 only for `layers`."""
        depth = self.encoder.depth
        if self.pooling == "cls":
            pooled = [self.encoder(images, drop_keys=drop_keys)[:, 0]]
        elif self.pooling == "mean":
            (tokens,) = self.encoder(images, drop_keys=drop_keys, layers=(depth - 1,))
            pooled = [LayerNorm(dtype=tokens.dtype.name, name="fc_norm")(tokens[:, 1:].mean(1))]
        else:
            outputs = self.encoder(images, drop_keys=drop_keys, layers=tuple(range(depth)))
            pooled = [jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=1) for x in outputs]
        logits = []
        for i, x in enumerate(pooled):
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            name = f"head_{i}" if self.pooling == "layers" else "head"
            if self.batch_norm:
                # PyTorch's BatchNorm1d(affine=False, eps=1e-6), as in MAE's linear probe.
                norm = BatchNorm(self.batch_norm, 1e-6, affine=False, name=f"{name}_norm")
                x = norm(x, training)
            init = nn.initializers.normal(self.head_std)
            logits.append(nn.Dense(self.num_labels, kernel_init=init, name=name)(x))
        return jnp.stack(logits, axis=1)


def is_tuned(path: tuple[str, ...], depth: int, tuned_blocks: float) -> bool:
    """Returns whether a parameter of an encoder of `depth` blocks is trained."""
    if tuned_blocks < 0:
        return True
    if not path[0].startswith("block_"):
        return path[0] == "norm" and tuned_blocks > 0
    from_the_end = depth - int(path[0].removeprefix("block_"))  # 1 for the last block
    return from_the_end <= tuned_blocks or (from_the_end - tuned_blocks == 0.5 and path[1] in MLP)


@dataclasses.dataclass(frozen=True, eq=False)
class Classification:
    """Classification into `num_labels` classes (fine-tuning and probes of MAE and BEiT)."""

    head = ("fc_norm", "head", COLLECTION)

    model: ViT
    num_labels: int
    _: dataclasses.KW_ONLY
    pooling: Annotated[
        Literal["mean", "cls", "layers"],
        "input of the head; mean: mean of the patches, then a norm (fine-tuning); cls: the class "
        "token after the final norm; layers: class token and mean of each block, with a head for "
        "each (BEiT's linear probe)",
    ] = "mean"
    batch_norm: Annotated[
        int,
        NOT_NEGATIVE,
        PER_DEVICE,
        "batch normalization of the head's input, over groups of images; 0: none",
    ] = 0
    head_std: Annotated[float, NOT_NEGATIVE, "initial standard deviation of the head"] = 2e-5
    tuned_blocks: Annotated[
        float,
        Range(-1),
        "number of last blocks that are trained; 0: none (a linear probe), 0.5: the MLP of the "
        "last, -1: all",
    ] = -1.0
    smoothing: Annotated[float, SHARE, "label smoothing"] = 0.0
    mixup: Annotated[float, NOT_NEGATIVE, "mixup: parameter of the beta distribution; 0: none"] = (
        0.0
    )
    cutmix: Annotated[
        float, NOT_NEGATIVE, "CutMix: parameter of the beta distribution; 0: none"
    ] = 0.0
    mixup_group: Annotated[
        int, NOT_NEGATIVE, PER_DEVICE, "number of consecutive images mixed with the same share"
    ] = 128
    erasing: Annotated[float, SHARE, "probability of random erasing"] = 0.0
    mean: Mean = MEAN
    std: Std = STD

    def __post_init__(self):
        if self.num_labels < 2:
            number = "only one label" if self.num_labels else "no labels"
            raise UserError(
                f"classify needs images with labels: this data set has {number}. For a folder, set "
                "data.labels to 'folder' or to a CSV file."
            )
        blocks, depth = self.tuned_blocks, self.model.depth
        if blocks != -1 and (blocks % 0.5 or not 0 <= blocks <= depth):
            raise UserError(
                f"objective.tuned_blocks = {blocks:g} must be 0, 0.5, 1, 1.5, ... up to the "
                f"{depth} blocks, or -1 for the whole encoder."
            )
        if (self.mixup or self.cutmix) and (self.mixup_group < 2 or self.mixup_group % 2):
            raise UserError(
                f"objective.mixup_group = {self.mixup_group} must be even, to mix pairs of images."
            )
        if self.batch_norm == 1:
            raise UserError("objective.batch_norm = 1 must be 0 or at least 2.")

    @functools.cached_property
    def network(self) -> Classifier:
        return Classifier(self.model, self.num_labels, self.pooling, self.batch_norm, self.head_std)

    def init(self, rng, batch):
        buffers = self.network.init(rng, normalize(batch["image"], self.mean, self.std))
        params = buffers.pop("params")
        encoder, depth = flatten_dict(params.pop("encoder")), self.model.depth
        for tree, tuned in ((params, True), (buffers, False)):
            part = {
                k: x for k, x in encoder.items() if is_tuned(k, depth, self.tuned_blocks) == tuned
            }
            if part:
                tree["encoder"] = unflatten_dict(part)
        return params, buffers

    def forward(self, params, buffers, images, drop_keys=None, training=False):
        """Returns logits (b, l, k) and buffers."""
        parts = (flatten_dict(tree.get("encoder", {})) for tree in (buffers, params))
        encoder = unflatten_dict({path: x for part in parts for path, x in part.items()})
        variables = {"params": params | {"encoder": encoder}}
        if not self.batch_norm:
            return self.network.apply(variables, images, drop_keys, training), buffers
        variables[COLLECTION] = buffers[COLLECTION]
        logits, changed = self.network.apply(
            variables, images, drop_keys, training, mutable=[COLLECTION]
        )
        return logits, buffers | changed

    def augment(self, batch, rng, group: int):
        """Returns images and targets (b, k) after erasing and mixing groups of images."""
        images = normalize(batch["image"], self.mean, self.std)
        targets = smooth(batch["label"], self.num_labels, self.smoothing)
        rng_erase, rng_mix = jax.random.split(rng)
        if self.erasing:
            images = erase(images, per_example(rng_erase, batch["index"]), self.erasing)
        if self.mixup or self.cutmix:
            images, targets = mix(
                images,
                targets,
                rng_mix,
                batch["index"],
                group=group,
                mixup=self.mixup,
                cutmix=self.cutmix,
            )
        return images, targets

    def loss(self, params, buffers, batch, rng, step):
        rng_augment, rng_drop = jax.random.split(rng)
        images, targets = self.augment(batch, rng_augment, self.mixup_group)
        frozen = self.tuned_blocks == 0
        drop_keys = None if frozen else per_example(rng_drop, batch["index"])
        logits, buffers = self.forward(params, buffers, images, drop_keys, training=True)
        losses = optax.losses.softmax_cross_entropy(logits, targets[:, None])  # (b, l)
        return losses.sum(), len(images), ({}, buffers)

    def predict(self, params, buffers, batch):
        """Returns the logits of the last layer's head (b, k)."""
        images = normalize(batch["image"], self.mean, self.std)
        return self.forward(params, buffers, images)[0][:, -1]

    def evaluate(self, params, buffers, batch, rng):
        images = normalize(batch["image"], self.mean, self.std)
        logits, _ = self.forward(params, buffers, images)
        labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
        likeliest = jax.lax.top_k(logits, min(5, self.num_labels))[1]
        hits = likeliest == labels[..., None]
        classes = jax.nn.one_hot(batch["label"], self.num_labels)
        return {
            "loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": hits[..., 0],
            **({"top5": hits.any(-1)} if self.num_labels > 5 else {}),
            "share": classes,
            "right": hits[..., :1] * classes[:, None],
        }

    def summarize(self, means):
        """Returns the metrics of the best layer; `by_class` (k, 2) has shares and accuracies."""
        if (labeled := means["share"].sum()) < 1 - 1e-6:
            raise UserError(
                f"{1 - labeled:.1%} of the images have a label outside 0 to "
                f"{self.num_labels - 1}: choose another data.evaluation_split."
            )
        best = means["accuracy"].argmax()
        numbers = [name for name in ("loss", "accuracy", "top5") if name in means]
        metrics = {name: means[name][best] for name in numbers}
        if len(means["accuracy"]) > 1:
            layers = enumerate(means["accuracy"], 1)
            metrics |= {f"accuracy_layer_{i}": value for i, value in layers}
            metrics["best_layer"] = best + 1
        by_class = means["right"][best] / means["share"].clip(min=1e-12)
        return metrics | {"by_class": np.stack([means["share"], by_class], axis=1)}

    def pictures(self, params, buffers, batch, rng):
        images, _ = self.augment(batch, rng, group=len(batch["image"]))
        original = normalize(batch["image"], self.mean, self.std)
        return OrderedDict(
            trained=denormalize(images, self.mean, self.std),
            original=denormalize(original, self.mean, self.std),
        )


objective = objective_of(Classification)
