"""The built-in emoji with masks that are derived from their colors."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mim_jax.data.classes import Classes
from mim_jax.data.sources import Source

EMOJI = Classes(
    names=("background", "gray", "red", "yellow", "green", "blue"),
    colors=(
        (230, 230, 230),
        (90, 90, 90),
        (220, 60, 50),
        (240, 200, 60),
        (80, 170, 80),
        (60, 110, 210),
    ),
    values=(0, 1, 2, 3, 4, 5),
    ignored=(255,),
)


def add_masks(source: Source) -> Source:
    """Returns the built-in emoji with masks derived from their colors."""
    count = len(source.examples)
    return source._replace(
        examples=EmojiMasks(source.examples),
        num_labels=0,
        fingerprint=source.fingerprint | {"name": "emoji with masks"},
        classes=EMOJI,
        sizes=np.full((count, 2), 64, np.int32),
    )


class EmojiMasks:
    """Examples of the emoji, with masks: by hue, or gray, or white as the background."""

    def __init__(self, examples: Sequence[dict]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict:
        encoded = self.examples[i]["image"]
        hue, saturation, value = np.moveaxis(
            np.asarray(Image.open(io.BytesIO(encoded)).convert("HSV")), -1, 0
        )
        ends = np.array([20, 50, 130, 215])  # of the hues red, yellow, green and blue, out of 256
        values = 2 + np.searchsorted(ends, hue, side="right") % 4
        values[saturation < 50] = 1
        values[(saturation < 12) & (value > 230)] = 255  # between white and the other colors
        values[(saturation == 0) & (value == 255)] = 0
        mask = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(mask, "PNG")
        return {"image": encoded, "mask": mask.getvalue()}
