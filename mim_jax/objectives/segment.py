"""Semantic segmentation: the class of every pixel, from a plain ViT and a decoder.

A frozen encoder lies among the buffers: it has no gradient and no optimizer state.

Shapes: b images, H and W of an image, h rows of patches, w columns, d width, k classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mim_jax import UserError
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
from mim_jax.normalize import MEAN, STD, denormalize, normalize
from mim_jax.objectives import Objective, per_example

ROWS = 64  # of pixels that are counted at once: their scores for all classes take memory

Head = Literal["upernet", "setr_pup", "setr_naive", "linear"]


class Segmenter(nn.Module):
    """The encoder, a decoder of the features of some of its blocks, and auxiliary decoders."""

    encoder: ViT
    num_classes: int
    head: Head
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
        """images (b, H, W, c) -> logits (b, H, W, k), and those of the auxiliary decoders.

        In float32 or better. With drop_keys (b,) the encoder's branches are dropped, with
        head_keys (b,) channels before each classifier.
        """
        size = images.shape[1:3]
        tokens = self.encoder(images, drop_keys=drop_keys, layers=self.layers)
        maps = to_maps(tokens, self.encoder.grid(images))
        common = dict(num_classes=self.num_classes, group=self.group)
        if self.head == "linear":
            logits = Linear(**common, name="head")(maps[-1], training)
            return resize(logits, size), []
        common |= dict(dtype=self.encoder.dtype, dropout=self.dropout)
        if self.head == "upernet":
            maps = FeaturePyramid(self.group, self.encoder.dtype, name="pyramid")(maps, training)
            head = UPerNet(channels=self.channels, **common, name="head")
            logits = head(maps, training, head_keys)
            beside = {"auxiliary": (FCN, {}, maps[2])}
        else:
            one = dict(convolutions=1, scale=4)
            kind = {} if self.head == "setr_pup" else dict(kernel=1, **one)
            head = SETR(channels=self.channels, **kind, **common, name="head")
            logits = head(maps[-1], training, head_keys)
            one["kernel"] = 3 if self.head == "setr_pup" else 1
            beside = {f"auxiliary_{i}": (SETR, one, x) for i, x in enumerate(maps[:-1])}
        auxiliary = []
        for name, (module, kind, x) in beside.items() if self.auxiliary_channels else ():
            decoder = module(channels=self.auxiliary_channels, **kind, **common, name=name)
            auxiliary.append(resize(decoder(x, training, head_keys), size))
        return resize(logits, size), auxiliary


def objective(
    model: ViT,
    num_classes: int,
    *,
    head: Head = "upernet",
    layers: tuple = (3, 5, 7, 11),
    channels: int = 0,
    batch_norm: int = 16,
    dropout: float = 0.1,
    auxiliary_weight: float = 0.4,
    auxiliary_channels: int = 256,
    average: Literal["all", "labelled"] = "all",
    frozen: bool = False,
    window: int | tuple = 512,
    stride: int | tuple = 341,
    scales: tuple = (1.0,),
    flip: bool = False,
    mean: tuple = MEAN,
    std: tuple = STD,
) -> Objective:
    """Classifies every pixel as one of `num_classes`; other labels are ignored.

    head: "upernet" on maps of four scales (BEiT's and MAE's code), "setr_pup" or "setr_naive"
        (SETR; BEiT's table 3), "linear", a probe of dense features, best with `frozen`.
    layers: the blocks, from 0, whose tokens are decoded, without a norm: four for UPerNet, which
        has one auxiliary decoder on the third; SETR's main decoder has the last, its auxiliary
        ones the others. "linear" has the last.
    channels: of the decoder, 0: the encoder's width for UPerNet, 256 for SETR.
    batch_norm: batch statistics are of so many consecutive images.
    dropout: the rate of channels that are dropped before a classifier.
    average: a loss is the mean over all pixels, where ignored ones count as 0 (mmsegmentation), or
        over those with a label.
    frozen: only the decoder is trained.
    window, stride: evaluation slides a window of the size that was trained over an image, and
        averages logits where windows overlap.
    scales, flip: evaluation averages probabilities over enlarged and mirrored images. Images are
        never made smaller than the window (BEiT's SETR_Resize).
    mean, std: of the data's channels.
    """
    check(model, num_classes, head, layers, batch_norm)
    channels = channels or (model.width if head == "upernet" else 256)
    window, stride = pair(window), pair(stride)
    network = Segmenter(
        encoder=model,
        num_classes=num_classes,
        head=head,
        layers=tuple(layers),
        channels=channels,
        group=batch_norm,
        dropout=dropout,
        auxiliary_channels=auxiliary_channels if auxiliary_weight else 0,
    )

    def init(rng, batch):
        buffers = network.init(rng, normalize(batch["image"], mean, std))
        params = buffers.pop("params")
        if frozen:
            buffers["encoder"] = params.pop("encoder")
        return params, buffers

    def variables(params, buffers):
        encoder = buffers["encoder"] if frozen else params["encoder"]
        return {"params": params | {"encoder": encoder}, COLLECTION: buffers[COLLECTION]}

    def loss(params, buffers, batch, rng, step):
        images, labels = normalize(batch["image"], mean, std), batch["segmentation"]
        drop, drop_head = (per_example(key, batch["index"]) for key in jax.random.split(rng))
        (logits, auxiliary), changed = network.apply(
            variables(params, buffers),
            images,
            None if frozen else drop,
            drop_head,
            True,
            mutable=[COLLECTION],
        )
        labelled = (labels < num_classes).sum()
        weight = jnp.maximum(labelled, 1e-12) if average == "labelled" else labels.size
        total = cross_entropy(logits, labels).sum()
        beside = sum(cross_entropy(x, labels).sum() for x in auxiliary)
        metrics = {"auxiliary_loss": beside / weight} if auxiliary else {}
        return total + auxiliary_weight * beside, weight, (metrics, buffers | changed)

    def score(params, buffers, batch):
        """-> scores (b, H, W, k) of a padded view and whether they are logits."""
        images, sizes = normalize(batch["image"], mean, std), batch["image_size"]

        def logits(images):
            return network.apply(variables(params, buffers), images)[0]

        slide = jax.tree_util.Partial(sliding_logits, logits, window=window, stride=stride)
        if tuple(scales) == (1.0,) and not flip:
            return slide(images, sizes), True
        return mean_probabilities(slide, images, sizes, scales, flip, window), False

    def evaluate(params, buffers, batch, rng):
        scores, are_logits = score(params, buffers, batch)
        labels = batch["segmentation"]
        counts, losses = count(
            scores, batch["image_size"], labels, batch["segmentation_size"], are_logits
        )
        return {"confusion": counts, "loss": losses}

    def pictures(params, buffers, batch, rng):
        scores, _ = score(params, buffers, batch)
        sizes, labels = batch["image_size"], batch["segmentation"]
        shape = scores.shape[1:3]
        truth = nearest(labels, batch["segmentation_size"], sizes, shape)
        inside = jnp.arange(shape[0])[:, None] < sizes[:, 0, None, None]
        inside &= jnp.arange(shape[1]) < sizes[:, 1, None, None]
        ignored = jnp.iinfo(labels.dtype).max
        guess = jnp.where(inside, scores.argmax(-1), ignored)
        images = normalize(batch["image"], mean, std)
        return OrderedDict(
            image=denormalize(at_least(images, shape), mean, std),
            truth=painted(truth, num_classes),
            prediction=painted(guess, num_classes),
        )

    return Objective(init, loss, evaluate, pictures, summarize)


def check(model: ViT, num_classes: int, head: str, layers: Sequence[int], batch_norm: int) -> None:
    """Raises UserError for settings that do not go together."""
    if num_classes < 2:
        raise UserError("segment needs a data set with masks; see mim_jax/data/masks.py.")
    if not layers or min(layers) < 0 or max(layers) >= model.depth:
        raise UserError(
            f"objective.layers = {tuple(layers)} must be blocks from 0 to {model.depth - 1}."
        )
    if head == "upernet" and len(layers) != 4:
        raise UserError(f"objective.layers = {tuple(layers)}: UPerNet takes four blocks.")
    if batch_norm < 2:
        raise UserError(f"objective.batch_norm = {batch_norm} must be at least 2 images.")


def pair(side: int | tuple) -> tuple[int, int]:
    """A size of two sides, from one or two."""
    return (side, side) if isinstance(side, int) else tuple(side)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits (b, H, W, k), labels (b, H, W) -> (b, H, W), 0 where a label is none of 0 to k - 1."""
    labelled = labels < logits.shape[-1]
    known = jnp.where(labelled, labels, 0).astype(jnp.int32)
    values = optax.losses.softmax_cross_entropy_with_integer_labels(logits, known)
    return jnp.where(labelled, values, 0)


def count(
    scores: jax.Array, sizes: jax.Array, labels: jax.Array, label_sizes: jax.Array, logits: bool
) -> tuple[jax.Array, jax.Array]:
    """Scores (b, h, w, k) against labels (b, H, W): confusion (b, k, k) and losses (b,).

    Scores are interpolated to the labels' own resolution. confusion[i, truth, prediction] is a
    number of pixels, losses[i] a sum over them. Labels that are no class do not count.
    """
    num_classes, (height, width) = scores.shape[-1], labels.shape[1:3]
    labels = jnp.pad(  # with a label that is no class
        labels.astype(jnp.int32), ((0, 0), (0, -height % ROWS), (0, 0)), constant_values=num_classes
    )
    columns = jnp.arange(width)

    def add(sums, block):
        rows = block * ROWS + jnp.arange(ROWS)
        x = interpolate(scores, rows, sizes, label_sizes, 0)
        x = interpolate(x, columns, sizes, label_sizes, 1)
        truth = jax.lax.dynamic_slice_in_dim(labels, block * ROWS, ROWS, axis=1)
        true, guessed = (jax.nn.one_hot(y, num_classes) for y in (truth, x.argmax(-1)))
        confusion = jnp.einsum("brwi,brwj->bij", true, guessed)  # exact: below 2^24
        log_probabilities = jax.nn.log_softmax(x) if logits else jnp.log(x.clip(1e-30))
        losses = -(true * log_probabilities).sum((1, 2, 3))
        return (sums[0] + confusion.astype(jnp.int32), sums[1] + losses), None

    zeros = jnp.zeros((len(labels), num_classes, num_classes), jnp.int32)
    zeros = zeros, jnp.zeros(len(labels), scores.dtype)
    sums, _ = jax.lax.scan(add, zeros, jnp.arange(labels.shape[1] // ROWS))
    return sums


def summarize(means: dict) -> dict:
    """Figures over all pixels with a label; `by_class`: share, accuracy and IoU of each class.

    The mean IoU is over the classes that occur in the labels or in the predictions, the mean
    accuracy over those in the labels (mmsegmentation).
    """
    confusion = means["confusion"]
    pixels = confusion.sum()
    if not pixels:
        raise UserError("no pixel has a label: choose another data.evaluation_split.")
    right, truth, guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        iou, accuracy = right / (truth + guessed - right), right / truth
    return {
        "loss": means["loss"] / pixels,
        "miou": np.nanmean(iou),
        "pixel_accuracy": right.sum() / pixels,
        "class_accuracy": np.nanmean(accuracy),
        "by_class": np.stack([truth / pixels, accuracy, iou], axis=1),
    }


def palette(num_classes: int) -> np.ndarray:
    """Colours (k + 1, 3) in [0, 1], of PASCAL VOC, without black.

    Of class i the bits of i + 1, three at a time, are the highest bits of red, green and blue. The
    last colour, black, is for what is ignored.
    """
    index = np.arange(1, num_classes + 1)
    colours = np.zeros((num_classes + 1, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            value = (index >> (3 * bit + channel)) & 1
            colours[:-1, channel] |= value << (7 - bit)
    return colours / 255


def painted(labels: jax.Array, num_classes: int) -> jax.Array:
    """Labels (b, H, W) -> colours (b, H, W, 3), black where they are no class."""
    colours = jnp.asarray(palette(num_classes), jnp.float32)
    return colours[jnp.minimum(labels, num_classes).astype(jnp.int32)]
