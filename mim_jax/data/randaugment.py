"""RandAugment (Cubuk et al., 2019) with PIL, in timm's variant that MAE and BEiT fine-tune with.

timm calls it `rand-m9-mstd0.5-inc1`: two of 15 operations, each applied with probability 1/2, and
every operation is stronger for a larger magnitude.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


def rand_augment(
    image: Image.Image, magnitude: float, deviation: float, fill: tuple, rng: np.random.Generator
) -> Image.Image:
    """Applies two random operations to an image of mode L or RGB.

    Args:
        magnitude, deviation: mean and standard deviation of the magnitude, clipped to 0 to 10.
        fill: color of the pixels that come from outside the image, one value per channel.
    """
    operations = list(OPERATIONS.values())
    for i in rng.integers(len(operations), size=2):
        if rng.random() < 0.5:
            m = min(max(rng.normal(magnitude, deviation), 0), 10) / 10
            image = operations[i](image, m, m * rng.choice((-1, 1)), fill)
    return image


def point(change):
    """Returns an operation that maps every value of an image by change(value, m)."""
    return lambda image, m, *_: image.point(
        [change(x, m) for x in range(256)] * len(image.getbands())
    )


def posterize(x, m):
    """Keeps the 4 to 0 highest bits of a value. PIL's posterize does not support 0 bits (black)."""
    step = 2 ** (4 + int(m * 4))
    return x // step * step


def rotate(image, m, v, fill):
    return image.rotate(v * 30, Image.Resampling.BICUBIC, fillcolor=fill)


def enhance(kind):
    """Returns an operation that scales a quality of an image, by PIL's ImageEnhance."""
    return lambda image, m, v, fill: kind(image).enhance(max(0.1, 1 + v * 0.9))


def affine(matrix):
    """Returns an affine operation; matrix(v, width, height) gives PIL's six coefficients."""
    kind, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return lambda image, m, v, fill: image.transform(
        image.size, kind, matrix(v, *image.size), bicubic, fillcolor=fill
    )


OPERATIONS = {  # (image, m, v, fill): m is the magnitude in [0, 1], v is m with a random sign
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "Rotate": rotate,
    "Posterize": point(posterize),
    "Solarize": lambda image, m, *_: ImageOps.solarize(image, 256 - int(m * 256)),
    "SolarizeAdd": point(lambda x, m: min(255, x + int(m * 110)) if x < 128 else x),
    "Color": enhance(ImageEnhance.Color),
    "Contrast": enhance(ImageEnhance.Contrast),
    "Brightness": enhance(ImageEnhance.Brightness),
    "Sharpness": enhance(ImageEnhance.Sharpness),
    "ShearX": affine(lambda v, width, height: (1, v * 0.3, 0, 0, 1, 0)),
    "ShearY": affine(lambda v, width, height: (1, 0, 0, v * 0.3, 1, 0)),
    "TranslateX": affine(lambda v, width, height: (1, 0, v * 0.45 * width, 0, 1, 0)),
    "TranslateY": affine(lambda v, width, height: (1, 0, 0, 0, 1, v * 0.45 * height)),
}
