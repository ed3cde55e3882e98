"""Fits the parameters of an encoder to images of another size or to other positions.

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
    """Returns the arrays of `saved` for an encoder of the shapes `wanted`: {name: array}.

    Absolute positions and relative position bias are resized from the grid `before` to the grid
    `after`. A shared bias is copied to blocks that have their own. If positions were `fixed`,
    learned ones are initialized with their values. All other arrays keep their shapes.

    Raises:
        UserError: if an array must be resized and one of the grids is unknown (None).
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
                raise UserError(f"{name} cannot be resized: the original image size is unknown.")
    return fitted


def resize_positions(table: np.ndarray, before: Grid, after: Grid) -> np.ndarray:
    """Resizes positions (1, 1 + n, d) with PyTorch's bicubic; the class token's is kept."""
    image = jax.image.resize(
        table[0, 1:].reshape(*before, -1),
        (*after, table.shape[-1]),
        jax.image.ResizeMethod.CUBIC_PYTORCH,
        antialias=False,
    )
    patches = np.asarray(image).reshape(1, -1, table.shape[-1])
    return np.concatenate([table[:, :1], patches], axis=1)


def resize_relative(table: np.ndarray, before: Grid, after: Grid) -> np.ndarray:
    """Resizes a table of relative position bias (r, h) as BEiT's code does.

    The old distances are spread over the new range as a geometric series, which is dense for small
    distances, and interpolated with a bicubic spline. The last three rows, for the class token, are
    kept.
    """
    axes = [spread(*sides) for sides in zip(before, after, strict=True)]
    places, targets = zip(*axes, strict=True)
    image = table[:-3].reshape(2 * before[0] - 1, 2 * before[1] - 1, -1)
    for axis, side in enumerate(before):
        if side == 1:  # a single row is constant along the axis
            image = image.repeat(2, axis)
    kx, ky = (min(3, len(x) - 1) for x in places)

    def resized(column):
        return RectBivariateSpline(*places, column, kx=kx, ky=ky)(*targets).reshape(-1)

    columns = [resized(image[..., head]) for head in range(image.shape[-1])]
    return np.concatenate([np.stack(columns, axis=1), table[-3:]]).astype(table.dtype)


def spread(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns coordinates of the old distances -(before - 1), ..., before - 1 and of the new ones.

    A single old distance gets two coordinates.
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
