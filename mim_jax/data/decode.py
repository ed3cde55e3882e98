"""From the bytes of a file to an image."""

import io

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(encoded: bytes, channels: int) -> Image.Image | np.ndarray:
    """An image with so many 8-bit channels; or, of anything else, an array (H, W, c)."""
    return Image.open(io.BytesIO(encoded)).convert(MODES[channels])
