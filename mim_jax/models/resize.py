"""The parameters of an encoder for images of another size, or positions of another kind.

Shapes: n patches, d width, h heads, r rows of a table.
"""

from collections.abc import Mapping

import jax
import numpy as np
from scipy.interpolate import RectBivariateSpline

from mim_jax import UserError
from mim_jax.models.patches import sincos2d

POSITIONS, RELATIVE = "positions", "relative_position_bias/table"


Grid = tuple[int, int]  # rows and columns of patches


def fit(
    saved: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple],
    *,
    before: Grid | None,
    after: Grid | None,
    fixed: bool = False,
) -> dict[str, np.ndarray]:
    """What an encoder of the shapes `wanted` can take from what was `saved`: {name: array}.

    Absolute positions and relative position bias are resized from the grid `before` to that
    `after`. A bias that was shared is copied to blocks that have their own. Where positions were
    `fixed`, learned ones begin there. Anything else has the shape that it had. Raises UserError
    where something must be resized and a grid is None: unknown.
    """
    saved, fitted = dict(saved), {}
    if fixed and before:
        saved[POSITIONS] = np.pad(
            sincos2d(before, saved["cls_token"].shape[-1]), ((0, 0), (1, 0), (0, 0))
        ).astype(saved["cls_token"].dtype)
    for name, shape in wanted.items():
        source = RELATIVE if name.endswith(RELATIVE) and name not in saved else name
        if source not in saved:
            continue
        fitted[name] = array = saved[source]
        resize = resize_positions if name == POSITIONS else resize_relative
        if name.endswith((POSITIONS, RELATIVE)) and array.shape[-1] == shape[-1]:
            if before and after and before != after:
                fitted[name] = resize(array, before, after)
            elif array.shape != shape and not (before and after):
                raise UserError(f"{name} cannot be resized: the images' size before is unknown.")
    return fitted


def resize_positions(table: np.ndarray, before: Grid, after: Grid) -> np.ndarray:
    """Positions (1, 1 + n, d) of another grid, by PyTorch's bicubic; the class token's stays."""
    image = jax.image.resize(
        table[0, 1:].reshape(*before, -1),
        (*after, table.shape[-1]),
        jax.image.ResizeMethod.CUBIC_PYTORCH,
        antialias=False,
    )
    patches = np.asarray(image).reshape(1, -1, table.shape[-1])
    return np.concatenate([table[:, :1], patches], axis=1)


def resize_relative(table: np.ndarray, before: Grid, after: Grid) -> np.ndarray:
    """Relative position bias (r, h) of another grid, as BEiT's code does it, side by side.

    The distances that there were are spread as a geometric series, dense where they are small, to
    those that there are to be; between them goes a bicubic spline. The last three rows, of the
    class token, stay.
    """
    axes = [spread(*sides) for sides in zip(before, after, strict=True)]
    places, targets = zip(*axes, strict=True)
    image = table[:-3].reshape(2 * before[0] - 1, 2 * before[1] - 1, -1)
    for axis, side in enumerate(before):
        image = image.repeat(2, axis) if side == 1 else image  # what is one row is so everywhere
    kx, ky = (min(3, len(x) - 1) for x in places)

    def resized(column):
        return RectBivariateSpline(*places, column, kx=kx, ky=ky)(*targets).reshape(-1)

    columns = [resized(image[..., head]) for head in range(image.shape[-1])]
    return np.concatenate([np.stack(columns, axis=1), table[-3:]]).astype(table.dtype)


def spread(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """-> where the distances -(before - 1)..before - 1 go, and those asked for there.

    That of a single patch goes to two places.
    """
    near, far = before - 1, after - 1
    if near == 0:
        return np.array([-1, 1]), np.arange(-far, far + 1)
    if near == far:
        return (np.arange(-near, near + 1),) * 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**near) / (1 - q) > far else (q, high)
    steps = np.cumsum(q ** np.arange(near))
    return np.concatenate([-steps[::-1], [0], steps]), np.arange(-far, far + 1)
