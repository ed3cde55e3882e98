"""What fine-tuning does to images: RandAugment's pixels, erasing, mixup and cutmix, all as timm."""

import importlib.util
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, augment
from mim_jax.data.randaugment import OPERATIONS, rand_augment


def of_timm(name):
    """A module of timm.data, alone: the package as a whole imports torchvision."""
    pytest.importorskip("torch")
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("needs timm")
    path = Path(package.origin).parent / "data" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photograph(mode="RGB", size=(60, 40)):
    """Smooth colors and some noise, from 20 to 220."""
    rng, (width, height) = np.random.default_rng(0), size
    y, x = np.mgrid[:height, :width][..., None] / 10
    pixels = 120 + 80 * np.sin(x + np.arange(3)) * np.cos(y) + rng.normal(0, 7, (height, width, 3))
    return Image.fromarray(pixels.clip(20, 220).astype(np.uint8)).convert(mode)


TIMMS = {  # where timm calls an operation otherwise
    **{n: f"{n}Increasing" for n in ("Posterize", "Solarize", "Color", "Contrast", "Brightness")},
    **{"Sharpness": "SharpnessIncreasing", "TranslateX": "TranslateXRel"},
    "TranslateY": "TranslateYRel",
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_timm(name, mode, monkeypatch):
    timm, image = of_timm("auto_augment"), photograph(mode)
    fill = (124, 116, 104)[: len(image.getbands())]
    assert len(OPERATIONS) == len(timm._RAND_INCREASING_TRANSFORMS)
    assert TIMMS.get(name, name) in timm._RAND_INCREASING_TRANSFORMS
    hparams = dict(img_mean=fill if mode == "RGB" else fill[0], interpolation=Image.BICUBIC)
    for magnitude in (0, 3.3, 8.9, 9.9):
        for sign in (-1, 1):
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.5 - 0.1 * sign)
            operation = timm.AugmentOp(TIMMS.get(name, name), 1.0, magnitude, hparams)
            ours = OPERATIONS[name](image, magnitude / 10, sign * magnitude / 10, fill)
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(operation(image)))


def test_posterize_at_full_magnitude_leaves_no_bit():
    """As of timm with the PIL of its time; PIL's posterize now raises."""
    assert not np.asarray(OPERATIONS["Posterize"](photograph(), 1.0, 1.0, ())).any()


def test_two_of_the_operations_each_half_of_the_time(monkeypatch):
    """At magnitudes N(9, 0.5) clipped to 10, every sign and operation as often."""
    done = []
    for name in OPERATIONS:
        note = lambda image, m, v, fill, name=name: done[-1].append((name, m, v)) or image  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, note)
    rng = np.random.default_rng(0)
    for _ in range(6000):
        done.append([])
        rand_augment(photograph(), 9, 0.5, (124, 116, 104), rng)
    counts = np.bincount([len(calls) for calls in done], minlength=3) / 6000
    np.testing.assert_allclose(counts, (0.25, 0.5, 0.25), atol=0.02)
    names, m, v = zip(*(call for calls in done for call in calls), strict=True)
    shares = np.unique(names, return_counts=True)[1] / len(names)
    np.testing.assert_allclose(shares, np.full(15, 1 / 15), atol=0.015)
    assert np.mean(np.sign(v)) == pytest.approx(0, abs=0.04)
    assert max(m) == 1
    assert np.mean(np.equal(m, 1)) == pytest.approx(0.0228, abs=0.01)  # two deviations above
    assert np.median(m) == pytest.approx(0.9, abs=0.005)


# --- On the device. ---


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def boxes_of(masks):
    """masks (b, H, W) -> top, bottom, left, right, each (b,); fails unless each is one box."""
    boxes = []
    for mask in masks:
        y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[y[0] : y[-1] + 1, x[0] : x[-1] + 1].all()
        boxes.append((y[0], y[-1] + 1, x[0], x[-1] + 1))
    return np.array(boxes).T


def deciles(values):
    return np.quantile(values, np.linspace(0.1, 0.9, 9))


def test_erasing_fills_one_box_in_a_quarter_of_the_images():
    images = np.full((4000, 24, 20, 2), 9.0, np.float32)
    erased = np.asarray(jax.jit(augment.erase)(images, keys(4000), 0.25))
    changed = erased != 9
    done = changed.any((1, 2, 3))
    assert done.mean() == pytest.approx(0.25, abs=0.02)
    assert (changed[..., 0] == changed[..., 1]).all()
    boxes_of(changed[done][..., 0])
    noise = erased[changed]
    np.testing.assert_allclose((noise.mean(), noise.std()), (0, 1), atol=0.01)
    assert len(np.unique(noise)) > 0.99 * noise.size  # each pixel, channel and image its own
    bfloat16 = augment.erase(jnp.zeros((2, 8, 8, 3), jnp.bfloat16), keys(2), 1.0)
    assert bfloat16.dtype == jnp.bfloat16


def test_erased_boxes_equal_timm():
    torch, size = pytest.importorskip("torch"), (48, 40)
    draw = jax.vmap(lambda rng: augment.random_box(rng, size, 1.0))
    random.seed(0)
    erase = of_timm("random_erasing").RandomErasing(1.0, mode="pixel", device="cpu")
    ours = np.asarray(jax.jit(draw)(keys(8000)))
    theirs = (erase(torch.full((8000, 1, *size), 9.0)) != 9).all(1).numpy()
    statistics = []
    for top, bottom, left, right in (boxes_of(ours), boxes_of(theirs)):
        tall, wide = bottom - top, right - left
        places = (top + bottom) / 96, (left + right) / 80
        statistics.append([deciles(x) for x in (tall * wide / 1920, np.log(tall / wide), *places)])
    np.testing.assert_allclose(*statistics, atol=0.05)


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("center", [None, (0, 31), (23, 5), (11, 16)])
def test_mixing_equals_timm(share, center, monkeypatch):
    """Pixels and targets, also where the box is cut off by the border."""
    torch, timm = pytest.importorskip("torch"), of_timm("mixup")
    rng, size = np.random.default_rng(0), (24, 32)
    images = rng.normal(size=(6, *size, 3)).astype(np.float32)
    labels = np.array([3, 0, 6, 6, 1, 2])
    own = augment.cut(size, share, *center) if center else jnp.full(size, share)
    of_targets = own.mean() if center else share
    ours = augment.blend(images, augment.smooth(labels, 7, 0.1), own, of_targets)
    monkeypatch.setattr(np.random, "rand", lambda: 0.4 if center else 0.6)
    monkeypatch.setattr(np.random, "beta", lambda a, b: share)
    drawn = iter(center or ())
    monkeypatch.setattr(np.random, "randint", lambda *args, **kwargs: next(drawn))
    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    mixed, targets = timm.Mixup(0.8, 1.0, num_classes=7)(pixels, torch.tensor(labels))
    np.testing.assert_allclose(ours[0], mixed.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(ours[1], targets.numpy(), atol=1e-6)


def shares(mixup, cutmix):
    """4000 draws, of pixels (count, H, W); those of targets are their means."""
    draw = jax.vmap(lambda rng: augment.draw_share(rng, (20, 20), mixup, cutmix))
    own, share = jax.jit(draw)(keys(4000))
    np.testing.assert_allclose(own.mean((1, 2)), share, atol=1e-5)
    return np.asarray(own)


def test_shares_are_drawn_from_their_distributions():
    mixup, cutmix, both = shares(0.8, 0.0), shares(0.0, 1.0), shares(0.8, 1.0)
    assert (np.ptp(mixup, (1, 2)) == 0).all()
    rng = np.random.default_rng(0)
    drawn = rng.beta(0.8, 0.8, 100_000)
    np.testing.assert_allclose(deciles(mixup[:, 0, 0]), deciles(drawn), atol=0.03)
    assert set(np.unique(cutmix)) == {0, 1}
    side = (20 * np.sqrt(1 - rng.random(100_000))).astype(int)
    y, x = rng.integers(20, size=(2, 100_000))
    areas = 1.0
    for at in (y, x):
        start = at - side // 2
        areas = areas * (np.minimum(start + side, 20) - np.maximum(start, 0)) / 20
    np.testing.assert_allclose(deciles(1 - cutmix.mean((1, 2))), deciles(areas), atol=0.03)
    assert (np.ptp(both, (1, 2)) == 0).mean() == pytest.approx(0.5, abs=0.04)


def test_groups_are_mixed_independently_of_their_place():
    rng, index = jax.random.key(1), jnp.arange(24)
    images = jax.random.normal(jax.random.key(2), (24, 8, 8, 3))
    targets = augment.smooth(jnp.arange(24) % 5, 5, 0.0)
    settings = dict(group=4, mixup=0.8, cutmix=1.0)
    mixed, mixed_targets = augment.mix(images, targets, rng, index, **settings)
    for first in range(0, 24, 8):  # as on three devices
        rows = slice(first, first + 8)
        part = augment.mix(images[rows], targets[rows], rng, index[rows], **settings)
        np.testing.assert_allclose(part[0], mixed[rows], atol=1e-6)
        np.testing.assert_allclose(part[1], mixed_targets[rows], atol=1e-6)
    shares = np.asarray(mixed_targets).max(1).reshape(6, 4)
    np.testing.assert_allclose(shares[:, :2], shares[:, :1:-1], atol=1e-6)  # partners
    assert len(np.unique(shares.round(4))) >= 5  # and each group its own share
    with pytest.raises(UserError, match="mixup_group = 5 does not divide the 24 images"):
        augment.mix(images, targets, rng, index, group=5, mixup=0.8, cutmix=1.0)
