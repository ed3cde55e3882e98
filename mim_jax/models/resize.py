"""The parameters of an encoder for images of another size, or positions of another kind.

Shapes: n patches, d width, h heads, r rows of a table.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from scipy.interpolate import RectBivariateSpline

from mim_jax import UserError
from mim_jax.models.patches import sincos2d

POSITIONS, RELATIVE = "positions", "relative_position_bias/table"


def fit(
    saved: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple],
    grid: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """What an encoder of the shapes `wanted` can take from what was `saved`: {name: array}.

    Absolute positions and relative position bias are resized. A bias that was shared is copied to
    blocks that have their own. Where there were fixed positions on a `grid`, learned ones begin
    there. Anything else has the shape that it had.
    """
    saved, fitted = dict(saved), {}
    if grid and POSITIONS not in saved:
        saved[POSITIONS] = np.pad(sincos2d(grid, saved["cls_token"].shape[-1])[0], ((1, 0), (0, 0)))
        saved[POSITIONS] = saved[POSITIONS][None].astype(saved["cls_token"].dtype)
    for name, shape in wanted.items():
        source = name
        if name.endswith(RELATIVE) and name not in saved:
            source = RELATIVE
        if source not in saved:
            continue
        fitted[name] = saved[source]
        if fitted[name].shape != shape and fitted[name].shape[-1] == shape[-1]:
            if name == POSITIONS:
                fitted[name] = resize_positions(fitted[name], shape[1])
            elif name.endswith(RELATIVE):
                fitted[name] = resize_relative(fitted[name], shape[0])
    return fitted


def square(count: int) -> int:
    """The side of a square grid of so many places."""
    side = math.isqrt(count)
    if side**2 != count:
        raise UserError("positions can be resized from and to square images alone: see data.size.")
    return side


def resize_positions(table: np.ndarray, tokens: int) -> np.ndarray:
    """Positions (1, 1 + n, d) -> (1, tokens, d), by PyTorch's bicubic; the class token's stays."""
    before, after = square(table.shape[1] - 1), square(tokens - 1)
    image = table[0, 1:].reshape(before, before, -1)
    image = jax.image.resize(
        image,
        (after, after, image.shape[-1]),
        jax.image.ResizeMethod.CUBIC_PYTORCH,
        antialias=False,
    )
    patches = np.asarray(image).reshape(1, after**2, -1)
    return np.concatenate([table[:, :1], patches], axis=1)


def resize_relative(table: np.ndarray, rows: int) -> np.ndarray:
    """Relative position bias (r, h) -> (rows, h), as BEiT's code does it.

    The distances that there were are spread as a geometric series, dense where they are small, to
    those that there are to be; between them goes a bicubic spline. The last three rows, of the
    class token, stay.
    """
    before, after = square(len(table) - 3), square(rows - 3)
    near, far = before // 2, after // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**near) / (1 - q) > far else (q, high)
    steps = np.cumsum(q ** np.arange(near))
    places = np.concatenate([-steps[::-1], [0], steps])
    target = np.arange(-far, far + 1)

    def resized(column):
        return RectBivariateSpline(places, places, column.reshape(before, before))(target, target)

    columns = [resized(column).reshape(-1) for column in table[:-3].T]
    return np.concatenate([np.stack(columns, axis=1), table[-3:]]).astype(table.dtype)
