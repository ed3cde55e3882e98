"""Augmentation of batches on the device: random erasing, mixup and CutMix, as in timm.

Shapes: b images of H x W pixels and c channels, k classes.
"""

import math

import jax
import jax.numpy as jnp

from mim_jax import UserError


def erase(images: jax.Array, rngs: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al., 2017): fills a box in some of the images with noise N(0, 1).

    The box covers 2 % to a third of the area and has an aspect of 0.3 to 1 / 0.3. The first of ten
    random boxes that fits is used.

    Args:
        images: (b, H, W, c), normalized.
        rngs: (b,), one key per image.
        probability: probability that an image is changed.
    """

    def one(image, rng):
        rng_box, rng_noise = jax.random.split(rng)
        erased = random_box(rng_box, image.shape[:2], probability)
        return jnp.where(erased[..., None], jax.random.normal(rng_noise, image.shape), image)

    return jax.vmap(one)(images, rngs).astype(images.dtype)


def random_box(rng: jax.Array, size: tuple[int, int], probability: float) -> jax.Array:
    """Returns a mask (H, W) that, with this probability, is true in a random box."""
    height, width = size
    rngs, longest = jax.random.split(rng, 5), math.log(1 / 0.3)
    area = height * width * jax.random.uniform(rngs[0], (10,), minval=0.02, maxval=1 / 3)
    aspect = jnp.exp(jax.random.uniform(rngs[1], (10,), minval=-longest, maxval=longest))
    tall, wide = (jnp.round(jnp.sqrt(x)).astype(int) for x in (area * aspect, area / aspect))
    fits = (tall < height) & (wide < width)
    tall, wide = tall[fits.argmax()], wide[fits.argmax()]
    top = jax.random.randint(rngs[2], (), 0, height - tall + 1)
    left = jax.random.randint(rngs[3], (), 0, width - wide + 1)
    erased = fits.any() & (jax.random.uniform(rngs[4]) < probability)
    return erased & inside(size, top, top + tall, left, left + wide)


def inside(size: tuple[int, int], top, bottom, left, right) -> jax.Array:
    """Returns a mask (H, W) that is true in a box."""
    y, x = jnp.arange(size[0])[:, None], jnp.arange(size[1])
    return (top <= y) & (y < bottom) & (left <= x) & (x < right)


def smooth(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Smooths labels (b,) -> targets (b, k): one-hot, with `smoothing` spread over all classes."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mix(
    images: jax.Array,
    targets: jax.Array,
    rng: jax.Array,
    index: jax.Array,
    *,
    group: int,
    mixup: float,
    cutmix: float,
) -> tuple[jax.Array, jax.Array]:
    """Applies mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019).

    In each group of consecutive rows, the first is mixed with the last, the second with the last
    but one, and so on, all with one share from Beta(mixup, mixup) or Beta(cutmix, cutmix). If
    neither is 0, both methods are equally likely.

    Args:
        images: (b, H, W, c).
        targets: (b, k), probabilities of the classes.
        rng: the key of the step.
        index: (b,), positions of the rows in the global batch.
        group: number of rows in a group.
        mixup: parameter of mixup; 0: none.
        cutmix: parameter of CutMix; 0: none.

    Returns:
        Mixed images (b, H, W, c) and targets (b, k).

    Raises:
        UserError: if `group` does not divide the rows.
    """
    if len(images) % group:
        raise UserError(
            f"objective.mixup_group = {group} does not divide the {len(images)} images that are "
            "processed at once: make it a divisor of batch_size / devices / accumulate."
        )

    def one(images, targets, rng):
        return blend(images, targets, *draw_share(rng, images.shape[1:3], mixup, cutmix))

    rngs = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, index[::group])
    images, targets = (x.reshape(-1, group, *x.shape[1:]) for x in (images, targets))
    images, targets = jax.vmap(one)(images, targets, rngs)
    return images.reshape(-1, *images.shape[2:]), targets.reshape(-1, *targets.shape[2:])


def draw_share(rng: jax.Array, size: tuple[int, int], mixup: float, cutmix: float):
    """Draws the share of each pixel (H, W) that an image keeps, and its average ()."""
    rng_kind, rng_share, rng_y, rng_x = jax.random.split(rng, 4)
    y, x = (jax.random.randint(r, (), 0, n) for r, n in zip((rng_y, rng_x), size, strict=True))
    a, b = (jax.random.beta(rng_share, alpha or 1.0, alpha or 1.0) for alpha in (mixup, cutmix))
    cuts = jax.random.uniform(rng_kind) < (0.5 if mixup and cutmix else bool(cutmix))
    own = cut(size, b, y, x)
    return jnp.where(cuts, own, a), jnp.where(cuts, own.mean(), a)


def cut(size: tuple[int, int], share, y, x) -> jax.Array:
    """Returns an array (H, W), 0 in a box at (y, x) with 1 - share of the area, 1 outside it.

    The box is clipped to the image, so the share of ones can exceed `share`.
    """
    tall, wide = ((side * jnp.sqrt(1 - share)).astype(int) for side in size)
    top, left = y - tall // 2, x - wide // 2
    return 1.0 - inside(size, top, top + tall, left, left + wide)


def blend(images, targets, own: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes images (b, H, W, c) by `own` (H, W) and targets (b, k) by `share`, first with last."""
    own = own[..., None]
    mixed = own * images + (1 - own) * images[::-1]
    return mixed.astype(images.dtype), share * targets + (1 - share) * targets[::-1]
