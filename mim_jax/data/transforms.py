"""From encoded bytes to arrays of one size, pixel for pixel as PIL and torchvision do it.

Sizes are (height, width), boxes (left, top, right, bottom). Views take keyword arguments.
"""

import dataclasses
import math
from importlib.util import find_spec
from typing import Literal, get_args

import grain
import numpy as np
from PIL import Image, ImageEnhance

from mim_jax import UserError
from mim_jax.data.decode import decode
from mim_jax.data.randaugment import rand_augment

Interpolation = Literal["bilinear", "bicubic", "lanczos"]
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}
LONGEST = 16  # times a view's aspect: of a longer image evaluation sees a part so long


def width_and_height(image: Image.Image | np.ndarray) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]


def crop(image: Image.Image | np.ndarray, box) -> Image.Image | np.ndarray:
    """The part of an image in a box."""
    if isinstance(image, Image.Image):
        return image.crop(box)
    left, top, right, bottom = box
    return image[top:bottom, left:right]


def resize(
    image: Image.Image | np.ndarray, size, interpolation: str, resizer: str = "pillow"
) -> np.ndarray:
    """An image at another size, with antialias -> array (H, W, c) of the image's own type."""
    shape, kind = (size[1], size[0]), INTERPOLATIONS[interpolation]
    if isinstance(image, Image.Image):
        simd = resizer == "simd" and image.mode in ("L", "RGB")
        image = resize_simd(image, size, interpolation) if simd else image.resize(shape, kind)
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
    """A box (left, top, right, bottom) of a random share `scale` of the area and aspect `ratio`.

    torchvision's RandomResizedCrop: ten tries, then the largest central box of an allowed aspect.
    With `clip`, the first is taken, cut to the image: MAE's for linear probing.
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
    """As Pillow's in a third of the time, but for pixels that differ by one, some in a hundred.

    One side after the other: the width first, unless the height loses more than twice as much, as
    Pillow 13 has it (older ones took the width first always).
    """
    import cykooz_resizer as simd

    filters = {"bicubic": "catmull_rom", "lanczos": "lanczos3"}  # otherwise called
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
    dtype: str = "uint8"
    interpolation: Interpolation
    resizer: str
    tokenizer_size: tuple[int, int] | None

    def sizes(self) -> dict[str, tuple]:
        """{name of a view in the batch: (its size, how it is resized)}. BEiT's, appendix."""
        views = {"image": (self.size, self.interpolation)}
        if self.tokenizer_size:
            views["tokenizer_image"] = self.tokenizer_size, "lanczos"
        return views

    def __post_init__(self):
        if self.resizer == "simd" and not find_spec("cykooz_resizer"):
            raise UserError("data.resizer = 'simd' needs cykooz-resizer: pip install -e '.[simd]'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingView(View, grain.transforms.RandomMap):
    """Colour jitter, random resized crop (with antialias), horizontal flip, RandAugment."""

    crop_scale: tuple[float, float]
    clip_crop: bool
    flip: bool
    color_jitter: float
    randaugment: tuple[float, float] | tuple[()]  # magnitude, deviation
    fill: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        low, high = self.crop_scale if len(self.crop_scale) == 2 else (0, 0)
        if not 0 < low <= high <= 1:
            raise UserError(
                f"data.crop_scale = {self.crop_scale}: say two shares of the area, as (0.2, 1.0)."
            )
        if self.color_jitter < 0:
            raise UserError(
                f"data.color_jitter = {self.color_jitter}: say a strength, as 0.4, or 0 for none."
            )
        if not self.randaugment:
            return
        if len(self.randaugment) != 2 or not 0 <= self.randaugment[0] <= 10:
            raise UserError(
                f"data.randaugment = {self.randaugment}: say a magnitude, 0 to 10, and its "
                "deviation, as (9, 0.5), or () for none."
            )
        if self.channels not in (1, 3) or len(self.fill) != self.channels:
            raise UserError(
                f"data.randaugment is for images of 1 or 3 channels and a data.fill of as many "
                f"values: here are {self.channels} channels and a fill of {self.fill}."
            )
        if self.tokenizer_size:
            raise UserError("data.randaugment and data.tokenizer_size do not go together.")

    def random_map(self, example: dict, rng: np.random.Generator) -> dict:
        image = decode(example["image"], self.channels, self.dtype)
        if self.color_jitter:  # of the whole image: contrast has its mean
            image = color_jitter(image, self.color_jitter, rng)
        box = random_crop_box(width_and_height(image), rng, self.crop_scale, self.clip_crop)
        image = crop(image, box)
        views = {name: resize(image, *how, self.resizer) for name, how in self.sizes().items()}
        if self.flip and rng.random() < 0.5:
            views = {name: view[:, ::-1] for name, view in views.items()}
        if self.randaugment:
            views["image"] = self.augmented(views["image"], rng)
        return example | views

    def augmented(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if image.dtype != np.uint8:
            raise UserError("data.randaugment is for 8-bit images: set it to ().")
        image = Image.fromarray(image if self.channels > 1 else image[..., 0])
        image = np.asarray(rand_augment(image, *self.randaugment, self.fill, rng))
        return image.reshape(*self.size, self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationView(View, grain.transforms.Map):
    """Resize, so that the view is `crop_fraction` of the short side, and central crop."""

    crop_fraction: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.crop_fraction <= 1:
            raise UserError(
                f"data.crop_fraction = {self.crop_fraction}: say a share of the side, up to 1."
            )

    def map(self, example: dict) -> dict:
        image = decode(example["image"], self.channels, self.dtype)
        return example | {name: self.central(image, *how) for name, how in self.sizes().items()}

    def central(self, image, size, interpolation: str) -> np.ndarray:
        height, width = size
        h, w = (int(side / self.crop_fraction) for side in size)
        across, down = width_and_height(image)
        longest = LONGEST * max(size) // min(size) * min(across, down)
        if max(across, down) > longest:  # a line of pixels, say: its middle is enough
            left, top = max(0, across - longest) // 2, max(0, down - longest) // 2
            image = crop(image, (left, top, across - left, down - top))
            across, down = width_and_height(image)
        if across * h > down * w:  # a wide image: its height decides
            w = int(h * across / down)
        else:
            h = int(w * down / across)
        left, top = round((w - width) / 2), round((h - height) / 2)
        image = resize(image, (h, w), interpolation, self.resizer)
        return crop(image, (left, top, left + width, top + height))
