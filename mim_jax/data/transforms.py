"""Transforms of images to arrays of one size, with the same pixels as PIL and torchvision.

Sizes are (height, width), boxes (left, top, right, bottom).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

import numpy as np
from PIL import Image, ImageEnhance

from mim_jax import UserError
from mim_jax.data.decode import decode
from mim_jax.data.fields import INTERPOLATIONS, Field
from mim_jax.data.randaugment import rand_augment
from mim_jax.keys import FREE, NOT_NEGATIVE, SHARE, Range

LONGEST = 16  # times the aspect ratio of a field: evaluation uses the middle of longer images


def width_and_height(image: Image.Image | np.ndarray) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]


def crop(image: Image.Image | np.ndarray, box) -> Image.Image | np.ndarray:
    """Returns the part of an image in a box."""
    if isinstance(image, Image.Image):
        return image.crop(box)
    left, top, right, bottom = box
    return image[top:bottom, left:right]


def resize(
    image: Image.Image | np.ndarray, size, interpolation: str, resizer: str = "pillow"
) -> np.ndarray:
    """Resizes an image with antialiasing -> array (H, W, c) of the image's own type."""
    shape, kind = (size[1], size[0]), INTERPOLATIONS[interpolation]
    if isinstance(image, Image.Image):
        if resizer == "simd" and image.mode in ("L", "RGB"):
            image = resize_simd(image, size, interpolation)
        elif image.mode == "RGBA":  # Pillow would multiply the other channels by the fourth
            bands = [band.resize(shape, kind) for band in image.split()]
            image = Image.merge("RGBA", bands)
        else:
            image = image.resize(shape, kind)
        array = np.asarray(image)
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


def random_crop_box(size, rng: np.random.Generator, scale, clip=False, ratio=(3 / 4, 4 / 3)):
    """Draws a box with a random share `scale` of the area and a random aspect `ratio`.

    Like torchvision's RandomResizedCrop: ten tries, then the largest central box of an allowed
    aspect. With `clip` the first box is used, clipped to the image (MAE's linear probe).
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if clip:
            w, h = min(w, width), min(h, height)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize_simd(image: Image.Image, size, interpolation: str) -> Image.Image:
    """Resizes like Pillow in a third of the time; about one pixel in a hundred differs by one.

    The width is resized first, unless the height shrinks by more than twice as much, as in
    Pillow 13 (older versions always resized the width first).
    """
    import cykooz_resizer as simd

    filters = {"bicubic": "catmull_rom", "lanczos": "lanczos3"}  # names in cykooz-resizer
    kind = simd.FilterType[filters.get(interpolation, interpolation)]
    options = simd.ResizeOptions(resize_alg=simd.ResizeAlg.convolution(kind))
    resizer = simd.Resizer()
    height, width = size
    tall = image.height - height > max(0, 2 * (image.width - width))
    for shape in ((image.width, height) if tall else (width, image.height), (width, height)):
        target = Image.new(image.mode, shape, None)
        resizer.resize_pil(image, target, options)
        image = target
    return image


def color_jitter(
    image: Image.Image | np.ndarray, strength: float, rng: np.random.Generator
) -> Image.Image:
    """Scales brightness, contrast and saturation, in random order, by 1 - strength to 1 + strength.

    Equals torchvision's ColorJitter(strength, strength, strength) of a PIL image (BEiT, appendix).
    Raises UserError for an array.
    """
    if not isinstance(image, Image.Image):
        raise UserError("data.color_jitter needs 8-bit images of 1, 3 or 4 channels: set it to 0.")
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(len(kinds)):
        image = kinds[i](image).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
    return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The transform of an example to the image fields of a batch."""

    fields: tuple[Field, ...]
    resizer: Annotated[Literal["pillow", "simd"], "simd is faster; a few pixels differ by one"] = (
        "pillow"
    )

    def __post_init__(self):
        if self.resizer == "simd" and not find_spec("cykooz_resizer"):
            raise UserError(
                "data.resizer = 'simd' needs cykooz-resizer: pip install 'mim-jax[simd]'."
            )

    @property
    def channels(self) -> int:
        return self.fields[0].shape[2]

    @classmethod
    def configured(cls, fields: tuple[Field, ...], settings: Mapping[str, Any]) -> Self:
        """Returns a view of the image fields; settings that it does not have are ignored."""
        images = tuple(field for field in fields if field.interpolation)
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(fields=images, **{k: x for k, x in settings.items() if k in names})

    def decode(self, example: dict) -> Image.Image | np.ndarray:
        """Returns the image of an example, with the channels and the dtype of the fields."""
        return decode(example["image"], self.channels, self.fields[0].dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingView(View):
    """Color jitter, random resized crop, horizontal flip and RandAugment.

    The crop and the flip are drawn once per example and applied to every image field.
    """

    crop_scale: Annotated[
        tuple, SHARE, "smallest and largest share of the area in a random resized crop"
    ] = (0.2, 1.0)
    clip_crop: Annotated[bool, "clip crops to the image instead of drawing again"] = False
    flip: Annotated[bool, "flip half of the images horizontally"] = True
    color_jitter: Annotated[
        float, NOT_NEGATIVE, "strength of jitter in brightness, contrast and saturation"
    ] = 0.0
    randaugment: Annotated[
        tuple,
        NOT_NEGATIVE,
        "magnitude and deviation of RandAugment, for example (9, 0.5); (): none",
    ] = ()
    fill: Annotated[
        tuple, Range(0, 255), "color that RandAugment fills with: 255 x the data's mean"
    ] = (124, 116, 104)

    def __post_init__(self):
        super().__post_init__()
        low, high = self.crop_scale if len(self.crop_scale) == 2 else (0, 0)
        if not 0 < low <= high <= 1:
            raise UserError(
                f"data.crop_scale = {self.crop_scale} must be two shares of the area, for example "
                "(0.2, 1)."
            )
        if not self.randaugment:
            return
        if len(self.randaugment) != 2 or not 0 <= self.randaugment[0] <= 10:
            raise UserError(
                f"data.randaugment = {self.randaugment} must be a magnitude from 0 to 10 and its "
                "deviation, for example (9, 0.5), or () for none."
            )
        if self.channels not in (1, 3) or len(self.fill) != self.channels:
            raise UserError(
                "data.randaugment needs images of 1 or 3 channels and a data.fill with a value for "
                f"each: there are {self.channels} channels and data.fill = {self.fill}."
            )
        if len(self.fields) > 1:
            names = ", ".join(field.name for field in self.fields[1:])
            raise UserError(f"data.randaugment cannot be used together with {names}.")

    def __call__(self, example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = self.decode(example)
        if self.color_jitter:  # before the crop, because contrast depends on the image's mean
            image = color_jitter(image, self.color_jitter, rng)
        box = random_crop_box(width_and_height(image), rng, self.crop_scale, self.clip_crop)
        image = crop(image, box)
        views = {
            field.name: resize(image, field.size, field.interpolation, self.resizer)
            for field in self.fields
        }
        if self.flip and rng.random() < 0.5:
            views = {name: view[:, ::-1] for name, view in views.items()}
        if self.randaugment:
            views = {name: self.augment(view, rng) for name, view in views.items()}
        return views

    def augment(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Applies RandAugment to an image (H, W, c)."""
        if image.dtype != np.uint8:
            raise UserError("data.randaugment needs 8-bit images: set it to ().")
        pixels = Image.fromarray(image if self.channels > 1 else image[..., 0])
        magnitude, deviation = self.randaugment
        pixels = rand_augment(pixels, magnitude, deviation, self.fill, rng)
        return np.asarray(pixels).reshape(image.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationView(View):
    """Resizes so that the view is `crop_fraction` of the short side, then crops the center."""

    crop_fraction: Annotated[
        float, NOT_NEGATIVE, FREE, "share of the short side in evaluation views"
    ] = 0.875

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.crop_fraction <= 1:
            raise UserError(
                f"data.crop_fraction = {self.crop_fraction} must be greater than 0 and at most 1."
            )

    def groups(self, sizes: np.ndarray | None, count: int) -> list[tuple[Sequence[int], Self]]:
        """Returns the first examples as one group, because their views have one shape."""
        return [(range(count), self)]

    def __call__(self, example: dict) -> dict[str, np.ndarray]:
        image = self.decode(example)
        return {field.name: self.central(image, field) for field in self.fields}

    def central(self, image: Image.Image | np.ndarray, field: Field) -> np.ndarray:
        height, width = field.size
        h, w = (int(side / self.crop_fraction) for side in field.size)
        across, down = width_and_height(image)
        longest = LONGEST * max(field.size) // min(field.size) * min(across, down)
        if max(across, down) > longest:  # resizing all of a very long image takes too much memory
            left, top = max(0, across - longest) // 2, max(0, down - longest) // 2
            image = crop(image, (left, top, across - left, down - top))
            across, down = width_and_height(image)
        if across * h > down * w:  # a wide image: limited by its height
            w = int(h * across / down)
        else:
            h = int(w * down / across)
        left, top = round((w - width) / 2), round((h - height) / 2)
        array = resize(image, (h, w), field.interpolation, self.resizer)
        return array[top : top + height, left : left + width]
