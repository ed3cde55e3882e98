"""What fine-tuning does to images: RandAugment's pixels, erasing, mixup and cutmix, all as timm."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    """Smooth colours and some noise, from 20 to 220."""
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
def test_an_operation_is_timms(name, mode, monkeypatch):
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


def test_at_full_magnitude_no_bit_is_left():
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
