"""Sliding windows and interpolation for batches of padded images of different sizes.

All images of a batch (b, H, W, c) are padded to one shape, below and to the right.

Shapes: b images, H and W of a padded image, c channels, k classes.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def at_least(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Pads images (b, H, W, c) with 0 below and to the right to at least `size`."""
    short = [max(0, side - have) for side, have in zip(size, images.shape[1:3], strict=True)]
    return jnp.pad(images, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))


def sliding_logits(
    logits: Callable,
    images: jax.Array,
    sizes: jax.Array,
    *,
    window: tuple[int, int],
    stride: tuple[int, int],
) -> jax.Array:
    """Averages the logits of windows: images (b, H, W, c), sizes (b, 2) -> (b, H, W, k).

    Windows start every `stride` pixels; the last ones end at the border of the image, as in
    mmsegmentation's slide_inference. Logits of padding are arbitrary. Images smaller than the
    window are padded.
    """
    images = at_least(images, window)
    shape = images.shape[1:3]
    counts = [max(0, -(-(s - w) // t)) + 1 for s, w, t in zip(shape, window, stride, strict=True)]
    ends = jnp.maximum(sizes - jnp.asarray(window), 0)  # (b, 2), where the last window begins
    every = jnp.asarray([(i, j) for i in range(counts[0]) for j in range(counts[1])])
    classes = jax.eval_shape(logits, images[:, : window[0], : window[1]])

    def add(sums, place):
        total, weights = sums
        starts = jnp.minimum(place * jnp.asarray(stride), ends)  # (b, 2)
        # A window counts unless the previous one already ended at the end of the image.
        counts_too = ((place == 0) | ((place - 1) * jnp.asarray(stride) < ends)).all(-1)  # (b,)

        def cut(x, start):
            return jax.lax.dynamic_slice(x, (*start, 0), (*window, x.shape[-1]))

        def put(x, part, start):
            return jax.lax.dynamic_update_slice(x, cut(x, start) + part, (*start, 0))

        part = logits(jax.vmap(cut)(images, starts))
        factor = counts_too.astype(part.dtype)[:, None, None, None]
        ones = jnp.broadcast_to(factor, (*part.shape[:3], 1))
        return (
            jax.vmap(put)(total, part * factor, starts),
            jax.vmap(put)(weights, ones, starts),
        ), None

    total = jnp.zeros((len(images), *shape, classes.shape[-1]), classes.dtype)
    weights = jnp.zeros((len(images), *shape, 1), classes.dtype)
    (total, weights), _ = jax.lax.scan(add, (total, weights), every)
    return total / jnp.maximum(weights, 1)


def mean_probabilities(
    slide: Callable,
    images: jax.Array,
    sizes: jax.Array,
    scales: Sequence[float],
    flip: bool,
    window: tuple[int, int],
) -> jax.Array:
    """Averages probabilities (b, H, W, k) over resized and, with `flip`, mirrored images."""
    shape = tuple(max(sides) for sides in zip(images.shape[1:3], window, strict=True))
    total = jnp.zeros(())
    for scale in scales:
        smallest = jnp.minimum(1, (jnp.asarray(window) / sizes).max(1))
        scaled = (sizes * jnp.maximum(scale, smallest)[:, None]).round().astype(jnp.int32)
        scaled_shape = tuple(int(np.ceil(side * max(1, scale))) for side in images.shape[1:3])
        enlarged = bilinear(images, sizes, scaled, scaled_shape)
        for mirrored in (False, True) if flip else (False,):
            view = mirror(enlarged, scaled) if mirrored else enlarged
            logits = slide(view, scaled)
            logits = mirror(logits, scaled) if mirrored else logits
            total += jax.nn.softmax(bilinear(logits, scaled, sizes, shape))
    return total / (len(scales) * (1 + flip))


def mirror(images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Mirrors each of images (b, H, W, c) left to right within its size (b, 2)."""
    columns = sizes[:, 1, None] - 1 - jnp.arange(images.shape[2])
    return jax.vmap(lambda x, columns: x[:, columns.clip(0)])(images, columns)


def bilinear(x: jax.Array, before: jax.Array, after: jax.Array, shape: tuple) -> jax.Array:
    """Resizes x (b, H, W, c) from sizes `before` (b, 2) to sizes `after` -> (b, *shape, c).

    Each image is interpolated separately, without antialias, as PyTorch's interpolate with
    align_corners=False does.
    """
    rows, columns = (jnp.arange(side) for side in shape)
    return interpolate(interpolate(x, rows, before, after, 0), columns, before, after, 1)


def interpolate(
    x: jax.Array, places: jax.Array, before: jax.Array, after: jax.Array, axis: int
) -> jax.Array:
    """Interpolates x (b, H, W, c) at `places` of its rows (axis 0) or columns (axis 1).

    `places` are coordinates after resizing from sizes `before` to `after` (b, 2). Values outside an
    image are arbitrary.
    """

    def one(x, before, after):
        return interpolate_image(x, places, before[axis], after[axis], axis)

    return jax.vmap(one)(x, before, after)


def interpolate_image(x: jax.Array, places: jax.Array, before, after, axis: int) -> jax.Array:
    """Interpolates one image along an axis that is resized from `before` to `after`."""
    source = ((places + 0.5) * before / after - 0.5).clip(0, before - 1)
    low = jnp.floor(source).astype(jnp.int32)
    share = (source - low).astype(x.dtype)
    high = jnp.minimum(low + 1, before - 1)
    share = share.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return jnp.take(x, low, axis) * (1 - share) + jnp.take(x, high, axis) * share


def nearest(labels: jax.Array, before: jax.Array, after: jax.Array, shape: tuple) -> jax.Array:
    """Resizes labels (b, H, W) by nearest neighbor -> (b, *shape), ignored beyond `after`."""

    def one(labels, before, after):
        index = [
            ((jnp.arange(side) + 0.5) * before[i] / after[i]).astype(jnp.int32)
            for i, side in enumerate(shape)
        ]
        inside = (jnp.arange(shape[0])[:, None] < after[0]) & (jnp.arange(shape[1]) < after[1])
        picked = labels[index[0].clip(0, before[0] - 1)][:, index[1].clip(0, before[1] - 1)]
        return jnp.where(inside, picked, jnp.iinfo(labels.dtype).max)

    return jax.vmap(one)(labels, before, after)
