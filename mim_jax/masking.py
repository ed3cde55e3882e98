"""Masks: which patches are hidden from the encoder, and what replaces them.

Shapes: b images, n patches of a grid (rows, columns), k visible, m hidden.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from mim_jax import UserError

Sampling = Literal["random", "blockwise", "span", "grid", "none"]


def hide(
    rngs: jax.Array, grid: tuple[int, int], ratio: float, sampling: Sampling = "random"
) -> tuple[jax.Array, jax.Array]:
    """Hides a share of the patches of each image, by default uniformly at random (MAE, section 3).

    Args:
        rngs: (b,), one key per image.
        grid: rows and columns of patches.
        ratio: share of the patches to hide.
        sampling: how patches are chosen, see `sample`. If it hides fewer patches, random ones are
            added.

    Returns:
        Indices of visible patches (b, k) and of hidden patches (b, m), both in random order.

    Raises:
        UserError: if no patch or every patch would be hidden.
    """
    n = math.prod(grid)
    noise = jax.vmap(lambda rng: jax.random.uniform(rng, (n,)))(rngs)
    if sampling != "random":
        noise += sample(rngs, grid, n - count_visible(n, ratio), sampling)
    return mask_by_noise(noise, ratio)


def count_visible(n: int, ratio: float) -> int:
    """Returns the number of visible patches out of n: int(n * (1 - ratio)), as in MAE's code."""
    return int(n * (1 - ratio))


def mask_by_noise(noise: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array]:
    """Keeps the patches with the smallest noise (b, n) -> visible (b, k), hidden (b, m)."""
    num_patches = noise.shape[1]
    num_visible = count_visible(num_patches, ratio)
    if not 0 < num_visible < num_patches:
        raise UserError(
            f"objective.mask_ratio = {ratio} leaves {num_visible} of {num_patches} patches "
            "visible: at least one must be visible and one hidden."
        )
    order = jnp.argsort(noise, axis=1)
    return order[:, :num_visible], order[:, num_visible:]


def sample(
    rngs: jax.Array, grid: tuple[int, int], count: int, sampling: Sampling, *, min_block=16, unit=1
) -> jax.Array:
    """Draws one mask per image.

    Args:
        rngs: (b,), one key per image.
        grid: rows and columns of patches.
        count: number of patches to mask.
        sampling: `random`; `blockwise`, rectangles of at least `min_block` patches (BEiT), which
            often masks slightly fewer than `count`; `span`, runs along rows; `grid`, three of every
            2 x 2 patches; `none`.
        min_block: smallest number of patches in a block.
        unit: side of the squares of patches that `random` masks (SimMIM).

    Returns:
        Masks (b, n), true at no more than `count` patches.

    Raises:
        UserError: if no patch or every patch would be masked.
    """
    rows, columns = grid
    if not 0 < count < rows * columns:
        raise UserError(
            f"objective.num_masked = {count} of {rows} x {columns} patches: at least one patch "
            "must be visible and one masked."
        )
    options = dict(blockwise=dict(min_block=min_block), random=dict(unit=unit)).get(sampling, {})
    draw = functools.partial(SAMPLERS[sampling], grid=grid, count=count, **options)
    return jax.vmap(draw)(rngs).reshape(-1, rows * columns)


def random(rng: jax.Array, *, grid: tuple[int, int], count: int, unit: int = 1) -> jax.Array:
    """Masks squares of `unit` x `unit` patches, uniformly at random."""
    rows, columns = (side // unit for side in grid)
    if (rows * unit, columns * unit) != grid:
        raise UserError(f"objective.mask_unit = {unit} does not divide a grid of {grid}.")
    hidden = jax.random.permutation(rng, rows * columns) < count // unit**2
    return hidden.reshape(rows, columns).repeat(unit, 0).repeat(unit, 1)


def rectangle(grid: tuple[int, int], top, left, height, width) -> jax.Array:
    """Returns a mask of the grid that is true inside a rectangle."""
    y, x = jnp.arange(grid[0])[:, None], jnp.arange(grid[1])[None]
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def blockwise(rng: jax.Array, *, grid: tuple[int, int], count: int, min_block: int) -> jax.Array:
    """Adds rectangles until `count` patches are masked (BEiT, algorithm 1, as in its code).

    A rectangle must add at least one patch and must not exceed `count`. After ten failures in a
    row the mask stays smaller: with a count of 75 out of 196 patches, 74.5 are masked on average.
    """
    aspect = math.log(0.3)

    def unfinished(carry):
        mask, failures, _ = carry
        return (mask.sum() < count) & (failures < 10)

    def block(carry):
        mask, failures, rng = carry
        rng, *keys = jax.random.split(rng, 5)
        missing = count - mask.sum()
        area = min_block + (missing - min_block) * jax.random.uniform(keys[0])
        ratio = jnp.exp(jax.random.uniform(keys[1], minval=aspect, maxval=-aspect))
        height, width = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        top = jnp.floor(jax.random.uniform(keys[2]) * (grid[0] - height + 1))
        left = jnp.floor(jax.random.uniform(keys[3]) * (grid[1] - width + 1))
        more = rectangle(grid, top, left, height, width) & ~mask
        fits = (height < grid[0]) & (width < grid[1])
        fits &= (more.any()) & (more.sum() <= missing)
        return mask | (more & fits), jnp.where(fits, 0, failures + 1), rng

    return jax.lax.while_loop(unfinished, block, (jnp.zeros(grid, bool), 0, rng))[0]


def span(rng: jax.Array, *, grid: tuple[int, int], count: int) -> jax.Array:
    """Adds runs along rows until `count` patches are masked (SpanBERT, Joshi et al., 2019).

    Lengths are geometric with p = 0.2 and at most 10: 3.8 on average, less at the end of a row.
    """
    share = 0.2 * 0.8 ** jnp.arange(10)

    def run(carry):
        mask, rng = carry
        rng, *keys = jax.random.split(rng, 4)
        top, left = (jax.random.randint(k, (), 0, s) for k, s in zip(keys[:2], grid, strict=True))
        length = 1 + jax.random.choice(keys[2], 10, p=share / share.sum())
        more = rectangle(grid, top, left, 1, length) & ~mask
        missing = count - mask.sum()
        return mask | (more & (jnp.cumsum(more, axis=1) <= missing)), rng

    return jax.lax.while_loop(lambda c: c[0].sum() < count, run, (jnp.zeros(grid, bool), rng))[0]


def every_fourth(rng: jax.Array, *, grid: tuple[int, int], count: int) -> jax.Array:
    """Masks all but the first of every 2 x 2 patches (MAE, figure 6), the same in every image."""
    rows, columns = grid
    hidden = rows * columns - -(-rows // 2) * -(-columns // 2)
    if count != hidden:
        raise UserError(
            f"objective.sampling = 'grid' hides {hidden} of {rows} x {columns} patches, not "
            f"{count}: change objective.mask_ratio or objective.num_masked."
        )
    y, x = jnp.arange(rows)[:, None], jnp.arange(columns)[None]
    return (y % 2 > 0) | (x % 2 > 0)


def none(rng: jax.Array, *, grid: tuple[int, int], count: int) -> jax.Array:
    """Masks nothing."""
    return jnp.zeros(grid, bool)


SAMPLERS: dict[str, Callable] = dict(
    random=random, blockwise=blockwise, span=span, grid=every_fourth, none=none
)


def corrupt(rngs: jax.Array, masks: jax.Array, shares: tuple) -> tuple[jax.Array, jax.Array]:
    """Chooses what replaces masked patches, as in BERT (Devlin et al., 2018, section 3.1).

    Args:
        rngs: (b,), one key per image.
        masks: (b, n), true where a patch is masked.
        shares: shares of masked patches that become the mask token, become another patch of the
            image, and stay unchanged.

    Returns:
        Flags (b, n), true where the mask token is used, and indices (b, n) of the patches used
        elsewhere.

    Raises:
        UserError: if the shares do not add up to 1.
    """
    token, other, itself = shares
    if abs(token + other + itself - 1) > 1e-6 or min(shares) < 0:
        raise UserError(f"objective.corruption = {shares} must be three shares with a sum of 1.")
    n = masks.shape[1]

    def draw(rng):
        chance, place = jax.random.split(rng)
        return jax.random.uniform(chance, (n,)), jax.random.randint(place, (n,), 0, n)

    chance, place = jax.vmap(draw)(rngs)
    replaced = masks & (chance >= token) & (chance < token + other)
    return masks & (chance < token), jnp.where(replaced, place, jnp.arange(n))
