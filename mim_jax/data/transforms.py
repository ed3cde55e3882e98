"""From encoded bytes to arrays of one size, pixel for pixel as PIL and torchvision do it.

Sizes are (height, width), boxes (left, top, right, bottom). Views take keyword arguments.
"""

import dataclasses
import math

import grain
import numpy as np
from PIL import Image, ImageEnhance

from mim_jax import UserError
from mim_jax.data.decode import decode

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")
}


def width_and_height(image: Image.Image | np.ndarray) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]


def crop(image: Image.Image | np.ndarray, box) -> Image.Image | np.ndarray:
    """The part of an image in a box."""
    if isinstance(image, Image.Image):
        return image.crop(box)
    left, top, right, bottom = box
    return image[top:bottom, left:right]


def resize(image: Image.Image | np.ndarray, size, interpolation: str) -> np.ndarray:
    """An image at another size, with antialias -> array (H, W, c) of the image's own type."""
    shape, kind = (size[1], size[0]), INTERPOLATIONS[interpolation]
    if isinstance(image, Image.Image):
        array = np.asarray(image.resize(shape, kind))
        return array[..., None] if array.ndim == 2 else array
    pixels = image if image.dtype == np.uint8 else image.astype(np.float32)  # PIL resizes these
    channels = (
        Image.fromarray(channel).resize(shape, kind) for channel in np.moveaxis(pixels, -1, 0)
    )
    array = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        array = array.round().clip(limits.min, limits.max)
    return array.astype(image.dtype)


def random_crop_box(size, rng: np.random.Generator, scale, ratio=(3 / 4, 4 / 3)):
    """A box (left, top, right, bottom) of a random share `scale` of the area and aspect `ratio`.

    torchvision's RandomResizedCrop: ten tries, then the largest central box of an allowed aspect.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in random order, times 1 - strength to 1 + strength.

    torchvision's ColorJitter(strength, strength, strength) of a PIL image (BEiT, appendix).
    """
    if not isinstance(image, Image.Image):
        raise UserError("data.color_jitter is for 8-bit images of 1, 3 or 4 channels: set it to 0.")
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(len(kinds)):
        image = kinds[i](image).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
    return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What all views share. With `tokenizer_size`, the same part of the image is seen twice."""

    size: tuple[int, int]
    channels: int
    interpolation: str
    tokenizer_size: tuple[int, int] | None

    def sizes(self) -> dict[str, tuple]:
        """{name of a view in the batch: (its size, how it is resized)}. BEiT's, appendix."""
        views = {"image": (self.size, self.interpolation)}
        if self.tokenizer_size:
            views["tokenizer_image"] = self.tokenizer_size, "lanczos"
        return views


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingView(View, grain.transforms.RandomMap):
    """Colour jitter, random resized crop (with antialias) and horizontal flip."""

    crop_scale: tuple[float, float]
    flip: bool
    color_jitter: float

    def random_map(self, example: dict, rng: np.random.Generator) -> dict:
        image = decode(example["image"], self.channels)
        if self.color_jitter:  # of the whole image: contrast has its mean
            image = color_jitter(image, self.color_jitter, rng)
        image = crop(image, random_crop_box(width_and_height(image), rng, self.crop_scale))
        views = {name: resize(image, *how) for name, how in self.sizes().items()}
        if self.flip and rng.random() < 0.5:
            views = {name: view[:, ::-1] for name, view in views.items()}
        return example | views


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationView(View, grain.transforms.Map):
    """Resize, so that the view is `crop_fraction` of the short side, and central crop."""

    crop_fraction: float

    def map(self, example: dict) -> dict:
        image = decode(example["image"], self.channels)
        return example | {name: self.central(image, *how) for name, how in self.sizes().items()}

    def central(self, image, size, interpolation: str) -> np.ndarray:
        height, width = size
        h, w = (int(side / self.crop_fraction) for side in size)
        across, down = width_and_height(image)
        if across * h > down * w:  # a wide image: its height decides
            w = int(h * across / down)
        else:
            h = int(w * down / across)
        left, top = round((w - width) / 2), round((h - height) / 2)
        image = resize(image, (h, w), interpolation)
        return crop(image, (left, top, left + width, top + height))
