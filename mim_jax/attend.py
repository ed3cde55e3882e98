"""Attention maps: how much each token of an encoder attends to each other token.

Shapes: b images, n patches, h heads, d width of a head, (H, W) an image.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError
from mim_jax.models.attention import split_heads
from mim_jax.models.layers import at_least_float32
from mim_jax.models.transformer import RelativePositionBias
from mim_jax.models.vit import ViT

# Perceptually even colors from dark to light, at equal distances.
HEAT = ("#0b0824", "#3b0f6f", "#8c2981", "#dd4a69", "#fe9f6d", "#fcfdbf")


def attention_maps(encoder: ViT, params: dict, images: jax.Array, layer: int = -1) -> jax.Array:
    """Returns the attention of one block (b, h, 1 + n, 1 + n) by query and key.

    The class token comes first, and each row sums to one. Attention kernels do not store these
    weights, so they are recomputed from the block's queries, keys and relative position bias.

    Args:
        encoder: the network.
        params: its parameters.
        images: (b, H, W, c), normalized.
        layer: the block, from 0; negative numbers count from the last block.

    Raises:
        UserError: if there is no such block.
    """
    if not -encoder.depth <= layer < encoder.depth:
        raise UserError(f"there is no layer {layer}: the encoder has {encoder.depth} blocks.")
    layer %= encoder.depth

    def is_needed(module: nn.Module, method: str) -> bool:
        return module.name == "qkv" or isinstance(module, RelativePositionBias)

    _, variables = encoder.clone(remat="none").apply(
        {"params": params},
        images,
        layers=(layer,),
        capture_intermediates=is_needed,
        mutable=["intermediates"],
    )
    outputs = variables["intermediates"]
    block = outputs[f"block_{layer}"]
    q, k, _ = split_heads(block["qkv"]["__call__"][0], encoder.heads)
    dtype = at_least_float32(q.dtype)
    logits = jnp.einsum("bhmd,bhnd->bhmn", q, k, preferred_element_type=dtype)
    logits = logits * q.shape[-1] ** -0.5
    for owner in (outputs, block):  # a shared bias, and the bias of this block
        if "relative_position_bias" in owner:
            logits += owner["relative_position_bias"]["__call__"][0].astype(dtype)
    return jax.nn.softmax(logits)


def rows_of(
    maps: np.ndarray, grid: tuple[int, int], query: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns the attention of one token: maps (b, h, 1 + n, 1 + n) -> (b, h, rows, columns).

    The token is the patch `query` = (row, column), or the class token if it is None. Attention to
    the class token is left out.
    """
    token = 0
    if query is not None:
        if not all(0 <= place < side for place, side in zip(query, grid, strict=True)):
            raise UserError(
                f"--query={query[0]},{query[1]} is outside the grid of {grid[0]} x {grid[1]} "
                "patches, which are counted from 0."
            )
        token = 1 + query[0] * grid[1] + query[1]
    return maps[:, :, token, 1:].reshape(*maps.shape[:2], *grid)


def heat(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Colors maps (b, rows, columns) >= 0, each scaled by its maximum -> (b, H, W, 3) in [0, 1].

    Each patch is drawn as a rectangle, without interpolation.
    """
    values = values / np.maximum(values.max((1, 2), keepdims=True), 1e-12)
    stops = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in HEAT])
    places = np.linspace(0, 1, len(stops))
    colors = np.stack([np.interp(values, places, stop) for stop in stops.T], axis=-1)
    for axis, side in ((1, size[0]), (2, size[1])):
        colors = np.take(colors, np.arange(side) * colors.shape[axis] // side, axis=axis)
    return colors


def marked(
    images: np.ndarray, query: tuple[int, int], patch: Sequence[int], color=(1.0, 0.1, 0.1)
) -> np.ndarray:
    """Draws a frame around a patch of images (b, H, W, 3), outside the patch if there is room."""
    images, width = images.copy(), max(1, min(images.shape[1:3]) // 80)
    boxes = []
    for place, side, limit in zip(query, patch, images.shape[1:3], strict=True):
        boxes.append((max(0, place * side - width), min(limit, (place + 1) * side + width)))
    (top, bottom), (left, right) = boxes
    for rows in (slice(top, top + width), slice(bottom - width, bottom)):
        images[:, rows, left:right] = color
    for columns in (slice(left, left + width), slice(right - width, right)):
        images[:, top:bottom, columns] = color
    return images
