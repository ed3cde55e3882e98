"""From encoded bytes to arrays of one size, pixel for pixel as PIL and torchvision do it."""

import math

import grain
import numpy as np
from PIL import Image

from mim_jax.data.decode import decode

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def to_array(image: Image.Image) -> np.ndarray:
    """-> (H, W, c) uint8."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


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


class TrainingView(grain.transforms.RandomMap):
    """Random resized crop (with antialias) and horizontal flip."""

    def __init__(self, size, channels, crop_scale, flip, interpolation):
        self.height, self.width = size
        self.channels, self.crop_scale, self.flip = channels, crop_scale, flip
        self.interpolation = INTERPOLATIONS[interpolation]

    def random_map(self, example: dict, rng: np.random.Generator) -> dict:
        image = decode(example["image"], self.channels)
        box = random_crop_box(image.size, rng, self.crop_scale)
        image = image.crop(box).resize((self.width, self.height), self.interpolation)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return example | {"image": to_array(image)}


class EvaluationView(grain.transforms.Map):
    """Resize, so that the view is `crop_fraction` of the short side, and central crop."""

    def __init__(self, size, channels, crop_fraction, interpolation):
        self.height, self.width = size
        self.channels, self.crop_fraction = channels, crop_fraction
        self.interpolation = INTERPOLATIONS[interpolation]

    def map(self, example: dict) -> dict:
        image = decode(example["image"], self.channels)
        h, w = (int(side / self.crop_fraction) for side in (self.height, self.width))
        if image.width * h > image.height * w:  # a wide image: its height decides
            w = int(h * image.width / image.height)
        else:
            h = int(w * image.height / image.width)
        image = image.resize((w, h), self.interpolation)
        left, top = round((w - self.width) / 2), round((h - self.height) / 2)
        image = image.crop((left, top, left + self.width, top + self.height))
        return example | {"image": to_array(image)}
