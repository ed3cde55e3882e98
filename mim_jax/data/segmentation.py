"""Transforms of an image together with its mask, as in mmsegmentation.

An image is an array (H, W, c), labels are an array (H, W). Sizes are (height, width). Masks are
resized by nearest neighbor, images by Pillow with antialiasing, whereas mmsegmentation uses OpenCV
without antialiasing.
"""

import dataclasses
from collections import defaultdict
from typing import Annotated

import numpy as np
from PIL import Image

from mim_jax import UserError
from mim_jax.data.classes import Classes
from mim_jax.data.masks import read_values
from mim_jax.data.transforms import View, resize
from mim_jax.keys import NOT_NEGATIVE, SHARE, Range, Smoke

TRIES = 10  # crops to draw; the last one is used if none is suitable


def fitted(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Returns the largest size of the same aspect within both limits (mmcv's rescale_size)."""
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes labels (H, W): each pixel gets the label at its center."""
    rows, columns = (
        ((np.arange(after) + 0.5) * before / after).astype(int)
        for after, before in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def random_crop(
    image: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    class_share: float,
    ignore_label: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Crops both at random, so that no class has `class_share` or more of the labeled pixels.

    Up to ten more crops are drawn; if none is suitable, the last one is used (mmsegmentation's
    RandomCrop with cat_max_ratio). An image that is smaller than `size` is not cropped.
    """
    height, width = labels.shape
    rows, columns = min(size[0], height), min(size[1], width)
    for _ in range(TRIES + 1):
        top = int(rng.integers(height - rows + 1))
        left = int(rng.integers(width - columns + 1))
        part = np.s_[top : top + rows, left : left + columns]
        if class_share >= 1:
            break
        values, counts = np.unique(labels[part], return_counts=True)
        counts = counts[values != ignore_label]
        if len(counts) > 1 and counts.max() < class_share * counts.sum():
            break
    return image[part], labels[part]


def random_flip(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mirrors both with a probability of one half."""
    return (image[:, ::-1], labels[:, ::-1]) if rng.random() < 0.5 else (image, labels)


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue of an image (H, W, 3) in uint8.

    Each has a probability of one half, as in mmsegmentation's PhotoMetricDistortion: brightness
    +-32, contrast and saturation times 0.5 to 1.5, hue +-36 degrees; contrast comes second or last.
    Hues have Pillow's 256 steps instead of OpenCV's 180.
    """

    def linear(x: np.ndarray, gain: float = 1, offset: float = 0) -> np.ndarray:
        return np.clip(x.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)

    def contrast(x: np.ndarray) -> np.ndarray:
        return linear(x, gain=rng.uniform(0.5, 1.5)) if rng.integers(2) else x

    if rng.integers(2):
        image = linear(image, offset=rng.uniform(-32, 32))
    contrast_first = rng.integers(2)
    if contrast_first:
        image = contrast(image)
    saturation = rng.uniform(0.5, 1.5) if rng.integers(2) else None
    hue = rng.integers(-18, 18) if rng.integers(2) else None
    if saturation is not None or hue is not None:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        if saturation is not None:
            hsv[..., 1] = linear(hsv[..., 1], gain=saturation)
        if hue is not None:
            hsv[..., 0] += np.uint8(round(hue * 256 / 180) % 256)  # wraps around
        image = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return image if contrast_first else contrast(image)


def pad(array: np.ndarray, size: tuple[int, int], fill: int | np.ndarray) -> np.ndarray:
    """Pads or crops an array below and to the right to a size."""
    array = array[: size[0], : size[1]]
    padded = np.empty((*size, *array.shape[2:]), array.dtype)
    padded[...] = fill
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationView(View):
    """The base of views of an image and its mask, with fields `image` and `segmentation`."""

    classes: Classes
    short_side: Annotated[
        int, NOT_NEGATIVE, Smoke(0), "short side of the resized images; 0: that of data.size"
    ] = 0
    long_side: Annotated[
        int, NOT_NEGATIVE, Smoke(0), "largest long side; 0: four times the short side"
    ] = 0
    fill: Annotated[
        tuple, Range(0, 255), Smoke((128,)), "color of padding: 255 x the data's mean"
    ] = (124, 116, 104)

    def __post_init__(self):
        super().__post_init__()
        if len(self.fill) not in (1, self.channels):
            raise UserError(
                f"data.fill = {self.fill} must have one value, or one for each of the "
                f"{self.channels} channels."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of training crops, and the smallest size of evaluation images."""
        return self.fields[0].size

    @property
    def padding(self) -> np.ndarray:
        """The color of padding, in the type of the images."""
        dtype = np.dtype(self.fields[0].dtype)
        limit = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
        return (np.asarray(self.fill) / 255 * limit).astype(dtype)

    def limits(self, scale: float = 1) -> tuple[int, int]:
        """The sides that an image is resized to, times a scale."""
        short = self.short_side or min(self.size)
        return int(short * scale), int((self.long_side or 4 * short) * scale)

    def pair(self, example: dict, scale: float = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the resized image, its labels in their own size, and resized."""
        image = self.decode(example)
        labels = self.classes.labels(read_values(example["mask"]))
        size = fitted(labels.shape, *self.limits(scale))
        image = resize(image, size, self.fields[0].interpolation, self.resizer)
        return image, labels, resize_labels(labels, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationTrainingView(SegmentationView):
    """Random scale, crop, flip and photometric distortion, then padding with ignored pixels."""

    scale_range: Annotated[
        tuple, Range(0, above=True), "smallest and largest random scale of the images"
    ] = (0.5, 2.0)
    class_share: Annotated[
        float, SHARE, "crops in which a class has more of the labeled pixels are drawn again"
    ] = 0.75
    flip: Annotated[bool, "flip half of the images horizontally"] = True
    distortion: Annotated[bool, "random brightness, contrast, saturation and hue"] = True

    def __post_init__(self):
        super().__post_init__()
        low, high = self.scale_range if len(self.scale_range) == 2 else (0, 0)
        if not 0 < low <= high:
            raise UserError(
                f"data.scale_range = {self.scale_range} must be two factors, for example "
                "(0.5, 2.0)."
            )
        if self.distortion and (self.channels != 3 or self.fields[0].dtype != "uint8"):
            raise UserError("data.distortion needs 8-bit images of 3 channels: set it to False.")

    def __call__(self, example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, _, labels = self.pair(example, rng.uniform(*self.scale_range))
        ignore = self.classes.ignore_label
        image, labels = random_crop(
            image, labels, self.size, rng, class_share=self.class_share, ignore_label=ignore
        )
        if self.flip:
            image, labels = random_flip(image, labels, rng)
        if self.distortion:
            image = distort(image, rng)
        return {
            "image": pad(image, self.size, self.padding),
            "segmentation": pad(labels, self.size, ignore),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationEvaluationView(SegmentationView):
    """A whole image, resized, and its labels in their own size, both padded.

    Examples of one batch share a shape: `groups` collects examples of one shape. The fields
    `image_size` and `segmentation_size` are the sizes of an image and its labels without padding.
    """

    shapes: tuple[tuple[int, int], tuple[int, int]] = (
        (0, 0),
        (0, 0),
    )  # shapes of images and labels

    def groups(
        self, sizes: np.ndarray | None, count: int
    ) -> list[tuple[list[int], "SegmentationEvaluationView"]]:
        """Groups the first examples by shape -> [(their indices, the view of these)].

        `sizes` (n, 2) are those of the images. The largest group comes first.

        Raises ValueError if the sizes are unknown.
        """
        if sizes is None:
            raise ValueError("the sizes of images with masks must be known")
        members = defaultdict(list)
        for i, (height, width) in enumerate(np.asarray(sizes[:count]).tolist()):
            h, w = fitted((height, width), *self.limits())
            shape = max(next_side(h), self.size[0]), max(next_side(w), self.size[1])
            members[shape, (next_side(height), next_side(width))].append(i)
        return [
            (indices, dataclasses.replace(self, shapes=shapes))
            for shapes, indices in sorted(members.items(), key=lambda item: -len(item[1]))
        ]

    def __call__(self, example: dict) -> dict[str, np.ndarray]:
        image, labels, _ = self.pair(example)
        shape, label_shape = self.shapes
        return {
            "image": pad(image, shape, self.padding),
            "image_size": np.minimum(image.shape[:2], shape).astype(np.int32),
            "segmentation": pad(labels, label_shape, self.classes.ignore_label),
            "segmentation_size": np.minimum(labels.shape, label_shape).astype(np.int32),
        }


def next_side(side: int) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, ... that is at least `side`.

    This bounds the number of shapes, and thereby of compiled programs.
    """
    power = 1 << max(0, side - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= side else power
