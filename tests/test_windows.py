"""Sliding windows and interpolation of padded images against PyTorch, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="windows are compared with PyTorch's")

from mim_jax.models.windows import (  # noqa: E402
    bilinear,
    mean_probabilities,
    mirror,
    nearest,
    sliding_logits,
)

WINDOW, STRIDE = (8, 12), (5, 7)
SIZES = np.array([[21, 26], [8, 12], [13, 31], [9, 25], [20, 12]])  # odd ones, and of one window
SHAPE = (24, 31)
KERNEL = np.random.default_rng(1).normal(size=(3, 4))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def images() -> np.ndarray:
    """Random images, whose padding is random too: it must not count."""
    return np.random.default_rng(0).normal(size=(len(SIZES), *SHAPE, 3))


def network(x):
    """Logits that depend on where a pixel lies in the window."""
    places = np.arange(x.shape[1])[:, None] + 2.0 * np.arange(x.shape[2])
    return (x * x.mean((1, 2), keepdims=True)) @ KERNEL + places[..., None] * 0.1


def slide(image: np.ndarray) -> np.ndarray:
    """One unpadded image (H, W, 3), as mmsegmentation documents slide_inference."""
    height, width, _ = image.shape
    total, times = np.zeros((height, width, 4)), np.zeros((height, width, 1))
    top = 0
    while True:
        left, bottom = 0, min(top + WINDOW[0], height)
        while True:
            right = min(left + WINDOW[1], width)
            part = np.s_[bottom - WINDOW[0] : bottom, right - WINDOW[1] : right]
            total[part] += network(image[part][None])[0]
            times[part] += 1
            if right == width:
                break
            left += STRIDE[1]
        if bottom == height:
            return total / times
        top += STRIDE[0]


def interpolated(image: np.ndarray, size) -> np.ndarray:
    """(H, W, c) -> (*size, c) by PyTorch."""
    x = torch.from_numpy(np.moveaxis(image, -1, 0).copy())[None]
    size = [int(side) for side in size]
    x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    return np.moveaxis(x[0].numpy(), 0, -1)


def sliding(x, sizes):
    return sliding_logits(network, x, sizes, window=WINDOW, stride=STRIDE)


def test_sliding_windows():
    ours = jax.jit(sliding)(images(), SIZES)
    for x, image, (height, width) in zip(ours, images(), SIZES, strict=True):
        theirs = slide(image[:height, :width])
        np.testing.assert_allclose(x[:height, :width], theirs, atol=1e-10)


def test_images_smaller_than_the_window():
    """They are padded to it with 0."""
    small = images()[:2, :5, :7]
    ours = sliding(small, np.array([[5, 7], [5, 7]]))
    padded = np.pad(small, ((0, 0), (0, 3), (0, 5), (0, 0)))
    np.testing.assert_allclose(ours, network(padded), atol=1e-12)


def test_bilinear():
    after = np.array([[11, 26], [16, 31], [29, 8], [9, 25], [1, 40]])
    ours = bilinear(images(), SIZES, after, (30, 40))
    for x, image, size, to in zip(ours, images(), SIZES, after, strict=True):
        theirs = interpolated(image[: size[0], : size[1]], to)
        np.testing.assert_allclose(x[: to[0], : to[1]], theirs, atol=1e-12)


def test_nearest():
    """As PyTorch's nearest-exact; beyond the size nothing but the type's largest value."""
    labels = np.random.default_rng(0).integers(0, 9, (len(SIZES), *SHAPE)).astype(np.uint8)
    after = np.array([[11, 26], [16, 31], [29, 8], [9, 25], [1, 40]])
    ours = nearest(labels, SIZES, after, (30, 40))
    for x, y, size, to in zip(ours, labels, SIZES, after, strict=True):
        y = torch.from_numpy(y[: size[0], : size[1]].astype(np.float64))[None, None]
        theirs = torch.nn.functional.interpolate(y, [int(t) for t in to], mode="nearest-exact")
        np.testing.assert_array_equal(x[: to[0], : to[1]], theirs[0, 0].numpy())
        assert (x[to[0] :] == 255).all()
        assert (x[:, to[1] :] == 255).all()


def test_mirror():
    ours = mirror(jnp.asarray(images()), jnp.asarray(SIZES))
    for x, image, (height, width) in zip(ours, images(), SIZES, strict=True):
        np.testing.assert_array_equal(x[:height, :width], image[:height, :width][:, ::-1])


def test_scales_and_flips():
    """Probabilities over all views; scales below 1 do not go below the window."""
    scales = (0.5, 1.0, 1.75)
    ours = mean_probabilities(sliding, images(), SIZES, scales, True, WINDOW)
    for x, image, size in zip(ours, images(), SIZES, strict=True):
        image, total = image[: size[0], : size[1]], 0
        for scale in scales:
            view = interpolated(image, np.round(size * max(scale, (WINDOW / size).max())))
            total += softmax(interpolated(slide(view), size))
            total += softmax(interpolated(slide(view[:, ::-1])[:, ::-1], size))
        np.testing.assert_allclose(x[: size[0], : size[1]], total / 6, atol=1e-10)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)
