"""Semantic segmentation: the class of every pixel, from a plain ViT and a decoder.

The parameters of a frozen encoder are buffers: they have no gradient and no optimizer state.

Shapes: b images, H and W of an image, h rows of patches, w columns, d width, k classes.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mim_jax import UserError
from mim_jax.keys import BELOW_ONE, FREE, NOT_NEGATIVE, PER_DEVICE, POSITIVE, Range, Smoke
from mim_jax.models.batch_norm import COLLECTION
from mim_jax.models.setr import SETR, Linear
from mim_jax.models.upernet import FCN, FeaturePyramid, UPerNet, resize, to_maps
from mim_jax.models.vit import ViT
from mim_jax.models.windows import (
    at_least,
    interpolate,
    mean_probabilities,
    nearest,
    sliding_logits,
)
from mim_jax.normalize import MEAN, STD, Mean, Std, denormalize, normalize
from mim_jax.objectives import objective_of, per_example

ROWS = 64  # rows of pixels that are compared at a time, to bound memory

Decoder = Literal["upernet", "setr_pup", "setr_naive", "linear"]


class Segmenter(nn.Module):
    """The encoder, a decoder of the features of some of its blocks, and auxiliary decoders."""

    encoder: ViT
    num_classes: int
    decoder: Decoder
    layers: tuple[int, ...]
    channels: int
    group: int
    dropout: float
    auxiliary_channels: int  # 0: no auxiliary decoders

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        drop_keys: jax.Array | None = None,
        head_keys: jax.Array | None = None,
        training: bool = False,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Maps images (b, H, W, c) to logits (b, H, W, k), and to those of auxiliary decoders.

        Logits are float32 or better. With drop_keys (b,), branches of the encoder are dropped at
        random; with head_keys (b,), channels before each classifier are.
        """
        size = images.shape[1:3]
        tokens = self.encoder(images, drop_keys=drop_keys, layers=self.layers)
        maps = to_maps(tokens, self.encoder.grid(images))
        common: dict[str, Any] = dict(num_classes=self.num_classes, group=self.group)
        if self.decoder == "linear":
            logits = Linear(**common, name="head")(maps[-1], training)
            return resize(logits, size), []
        decoders: dict[str, tuple[Any, dict, jax.Array]]
        common |= dict(dtype=self.encoder.dtype, dropout=self.dropout)
        if self.decoder == "upernet":
            maps = FeaturePyramid(self.group, self.encoder.dtype, name="pyramid")(maps, training)
            head = UPerNet(channels=self.channels, **common, name="head")
            logits = head(maps, training, head_keys)
            decoders = {"auxiliary": (FCN, {}, maps[2])}
        else:
            one: dict[str, Any] = dict(convolutions=1, scale=4)
            kind = {} if self.decoder == "setr_pup" else dict(kernel=1, **one)
            head = SETR(channels=self.channels, **kind, **common, name="head")
            logits = head(maps[-1], training, head_keys)
            one["kernel"] = 3 if self.decoder == "setr_pup" else 1
            decoders = {f"auxiliary_{i}": (SETR, one, x) for i, x in enumerate(maps[:-1])}
        auxiliary = []
        for name, (module, kind, x) in decoders.items() if self.auxiliary_channels else ():
            decoder = module(channels=self.auxiliary_channels, **kind, **common, name=name)
            auxiliary.append(resize(decoder(x, training, head_keys), size))
        return resize(logits, size), auxiliary


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """Classification of every pixel; pixels whose label is not a class are ignored.

    The decoder "upernet" is that of BEiT's and MAE's code: mmsegmentation's UPerHead on a feature
    pyramid of four blocks, with an auxiliary decoder on the third. "setr_pup" is that of BEiT's
    table 3 (Zheng et al., 2021): it decodes the last block, and auxiliary decoders the others.
    "linear" is a linear classifier of each patch: with `frozen`, a probe of dense features.
    """

    head = ("head", "pyramid", "auxiliary", COLLECTION)

    model: ViT
    segmentation_classes: tuple[str, ...]
    segmentation_colors: tuple[tuple[int, int, int], ...]
    image_size: tuple[int, int]  # of training crops and of windows in evaluation
    _: dataclasses.KW_ONLY
    decoder: Annotated[Decoder, "network that classifies the pixels"] = "upernet"
    layers: Annotated[
        tuple,
        NOT_NEGATIVE,
        Smoke(()),
        "blocks whose tokens are decoded, from 0; (): those at a third, a half and two thirds of "
        "the depth, and the last",
    ] = ()
    channels: Annotated[
        int,
        NOT_NEGATIVE,
        Smoke(32),
        "channels of the decoder; 0: the encoder's width, or 256 for SETR",
    ] = 0
    batch_norm: Annotated[
        int,
        Range(2),
        PER_DEVICE,
        "number of images that share statistics of batch normalization; batch_size: SyncBN",
    ] = 16
    dropout: Annotated[float, BELOW_ONE, "rate of dropped channels before the classifier"] = 0.1
    auxiliary_weight: Annotated[float, NOT_NEGATIVE, "weight of the auxiliary decoders' loss"] = 0.4
    auxiliary_channels: Annotated[
        int, POSITIVE, Smoke(16), "channels of the auxiliary decoders"
    ] = 256
    average: Annotated[
        Literal["all", "labeled"],
        "pixels over which the loss is averaged; all: ignored ones count as 0 (mmsegmentation)",
    ] = "all"
    frozen: Annotated[bool, "train only the decoder"] = False
    stride: Annotated[
        float,
        Range(0, 1, above=True),
        FREE,
        "step of sliding windows in evaluation, as a share of data.size",
    ] = 2 / 3
    scales: Annotated[
        tuple, Range(0, above=True), FREE, "image scales over which evaluation averages"
    ] = (1.0,)
    mirror: Annotated[bool, FREE, "evaluation also averages over mirrored images"] = False
    mean: Mean = MEAN
    std: Std = STD

    def __post_init__(self):
        depth, layers = self.model.depth, self.decoded
        if max(layers) >= depth:
            raise UserError(f"objective.layers = {layers} must be blocks from 0 to {depth - 1}.")
        if self.decoder == "upernet" and len(layers) != 4:
            raise UserError(f"objective.layers = {layers} must be four blocks for UPerNet.")
        if not self.scales:
            raise UserError("objective.scales must have at least one scale, for example (1.0,).")

    @property
    def decoded(self) -> tuple[int, ...]:
        """The blocks whose tokens are decoded."""
        return tuple(self.layers) or default_layers(self.model.depth)

    @property
    def window(self) -> tuple[int, int]:
        return self.image_size

    @property
    def step(self) -> tuple[int, int]:
        """Distance between windows in pixels."""
        height, width = (max(1, int(side * self.stride)) for side in self.image_size)
        return height, width

    @functools.cached_property
    def network(self) -> Segmenter:
        return Segmenter(
            encoder=self.model,
            num_classes=len(self.segmentation_classes),
            decoder=self.decoder,
            layers=self.decoded,
            channels=self.channels or (self.model.width if self.decoder == "upernet" else 256),
            group=self.batch_norm,
            dropout=self.dropout,
            auxiliary_channels=self.auxiliary_channels if self.auxiliary_weight else 0,
        )

    def describe(self, images):
        classes, blocks = len(self.segmentation_classes), ", ".join(map(str, self.decoded))
        return f"{self.decoder} on blocks {blocks}, {classes} classes"

    def init(self, rng, batch):
        buffers = self.network.init(rng, normalize(batch["image"], self.mean, self.std))
        params = buffers.pop("params")
        if self.frozen:
            buffers["encoder"] = params.pop("encoder")
        return params, buffers

    def variables(self, params, buffers):
        encoder = buffers["encoder"] if self.frozen else params["encoder"]
        return {"params": params | {"encoder": encoder}, COLLECTION: buffers[COLLECTION]}

    def loss(self, params, buffers, batch, rng, step):
        images = normalize(batch["image"], self.mean, self.std)
        labels = batch["segmentation"]
        drop, drop_head = (per_example(key, batch["index"]) for key in jax.random.split(rng))
        (logits, auxiliary), changed = self.network.apply(
            self.variables(params, buffers),
            images,
            None if self.frozen else drop,
            drop_head,
            True,
            mutable=[COLLECTION],
        )
        labeled = (labels < logits.shape[-1]).sum()
        weight = jnp.maximum(labeled, 1e-12) if self.average == "labeled" else labels.size
        total = cross_entropy(logits, labels).sum()
        auxiliary_loss = sum(cross_entropy(x, labels).sum() for x in auxiliary)
        metrics = {"auxiliary_loss": auxiliary_loss / weight} if auxiliary else {}
        return total + self.auxiliary_weight * auxiliary_loss, weight, (metrics, buffers | changed)

    def score(self, params, buffers, batch):
        """Returns scores (b, H, W, k) of padded images, and whether they are logits."""
        images = normalize(batch["image"], self.mean, self.std)
        variables, sizes = self.variables(params, buffers), sizes_of(batch, "image")

        def logits(images):
            return self.network.apply(variables, images)[0]

        def slide(images, sizes):
            return sliding_logits(logits, images, sizes, window=self.window, stride=self.step)

        if tuple(self.scales) == (1.0,) and not self.mirror:
            return slide(images, sizes), True
        settings = dict(scales=self.scales, flip=self.mirror, window=self.window)
        return mean_probabilities(slide, images, sizes, **settings), False

    def evaluate(self, params, buffers, batch, rng):
        scores, are_logits = self.score(params, buffers, batch)
        image_sizes, label_sizes = (sizes_of(batch, name) for name in ("image", "segmentation"))
        confusion, losses = count(
            scores, image_sizes, batch["segmentation"], label_sizes, are_logits
        )
        return {"confusion": confusion, "loss": losses}

    def summarize(self, means):
        """Returns the metrics over all labeled pixels.

        `by_class` (k, 3) has share, accuracy and IoU of each class. The mean IoU is over the
        classes that occur in the labels or in the predictions, the mean accuracy over those in the
        labels (mmsegmentation).
        """
        confusion = means["confusion"]
        pixels = confusion.sum()
        if not pixels:
            raise UserError("no pixel has a label: choose another data.evaluation_split.")
        right, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        with np.errstate(invalid="ignore"):
            iou, accuracy = right / (truth + predicted - right), right / truth
        return {
            "loss": means["loss"] / pixels,
            "miou": np.nanmean(iou),
            "pixel_accuracy": right.sum() / pixels,
            "class_accuracy": np.nanmean(accuracy),
            "by_class": np.stack([truth / pixels, accuracy, iou], axis=1),
        }

    def pictures(self, params, buffers, batch, rng):
        scores, _ = self.score(params, buffers, batch)
        sizes, shape, labels = sizes_of(batch, "image"), scores.shape[1:3], batch["segmentation"]
        truth = nearest(labels, sizes_of(batch, "segmentation"), sizes, shape)
        inside = jnp.arange(shape[0])[:, None] < sizes[:, 0, None, None]
        inside &= jnp.arange(shape[1]) < sizes[:, 1, None, None]
        prediction = jnp.where(inside, scores.argmax(-1), scores.shape[-1])
        images = at_least(normalize(batch["image"], self.mean, self.std), shape)
        return OrderedDict(
            image=denormalize(images, self.mean, self.std),
            truth=paint(truth, self.segmentation_colors),
            prediction=paint(prediction, self.segmentation_colors),
        )


objective = objective_of(Segmentation)


def default_layers(depth: int) -> tuple[int, ...]:
    """Returns four of `depth` blocks; for 12 and 24 they are those of BEiT's configs."""
    ends = (depth // 3, depth // 2, -(-2 * depth // 3), depth)
    return tuple(max(0, end - 1) for end in ends)


def sizes_of(batch: dict, name: str) -> jax.Array:
    """Returns height and width (b, 2) of the images or masks of a batch, without padding."""
    whole = jnp.broadcast_to(jnp.asarray(batch[name].shape[1:3]), (len(batch[name]), 2))
    return batch.get(f"{name}_size", whole)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the losses (b, H, W) of logits (b, H, W, k), 0 for ignored labels."""
    labeled = labels < logits.shape[-1]
    known = jnp.where(labeled, labels, 0).astype(jnp.int32)
    values = optax.losses.softmax_cross_entropy_with_integer_labels(logits, known)
    return jnp.where(labeled, values, 0)


def count(
    scores: jax.Array, sizes: jax.Array, labels: jax.Array, label_sizes: jax.Array, logits: bool
) -> tuple[jax.Array, jax.Array]:
    """Compares scores (b, h, w, k) with labels (b, H, W) -> confusion (b, k, k), losses (b,).

    Scores are interpolated to the resolution of the labels. confusion[i, truth, prediction] is a
    number of pixels, losses[i] a sum over them. Pixels with an ignored label do not count.
    """
    num_classes, (height, width) = scores.shape[-1], labels.shape[1:3]
    labels = jnp.pad(  # with an ignored label
        labels.astype(jnp.int32), ((0, 0), (0, -height % ROWS), (0, 0)), constant_values=num_classes
    )
    columns = jnp.arange(width)

    def add(sums, block):
        rows = block * ROWS + jnp.arange(ROWS)
        x = interpolate(scores, rows, sizes, label_sizes, 0)
        x = interpolate(x, columns, sizes, label_sizes, 1)
        truth = jax.lax.dynamic_slice_in_dim(labels, block * ROWS, ROWS, axis=1)
        true, predicted = (jax.nn.one_hot(y, num_classes) for y in (truth, x.argmax(-1)))
        confusion = jnp.einsum("brwi,brwj->bij", true, predicted)  # exact: below 2^24
        log_probabilities = jax.nn.log_softmax(x) if logits else jnp.log(x.clip(1e-30))
        losses = -(true * log_probabilities).sum((1, 2, 3))
        return (sums[0] + confusion.astype(jnp.int32), sums[1] + losses), None

    zeros = jnp.zeros((len(labels), num_classes, num_classes), jnp.int32)
    zeros = zeros, jnp.zeros(len(labels), scores.dtype)
    sums, _ = jax.lax.scan(add, zeros, jnp.arange(labels.shape[1] // ROWS))
    return sums


def paint(labels: jax.Array, colors: Sequence[tuple[int, int, int]]) -> jax.Array:
    """Returns the colors (b, H, W, 3) in [0, 1] of labels (b, H, W); ignored labels are black."""
    table = jnp.asarray([*colors, (0, 0, 0)], jnp.float32) / 255
    return table[jnp.minimum(labels, len(colors)).astype(jnp.int32)]
