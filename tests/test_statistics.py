"""Tests of data/statistics.py and data/examine.py: values, ranges, channels and sizes."""

import shlex

import numpy as np
import pytest
from PIL import Image

from mim_jax import UserError, schema
from mim_jax.data.examine import require_channels, size_warnings
from mim_jax.data.sources import open_sources
from mim_jax.data.statistics import main, observe, range_problem, statistics
from tests.images import encoded, npy, open_tree, pixels, plant, tif

pytestmark = pytest.mark.usefixtures("cache")


def source_of(root, arrays):
    plant(root, {f"{i}.npy": npy(array) for i, array in enumerate(arrays)})
    return open_sources(f"folder:{root}", ("all",))[0]


@pytest.mark.parametrize("dtype, channels", [("uint8", 3), ("uint16", 13), ("float32", 2)])
def test_statistics_equal_numpy(tmp_path, dtype, channels):
    arrays = [pixels(i, 20, 30, channels, np.dtype(dtype).type) // (i + 1) for i in range(9)]
    values = observe(source_of(tmp_path, arrays), channels)
    expected = np.concatenate(arrays).reshape(-1, channels).astype(float)
    expected /= {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    np.testing.assert_allclose(values.mean, expected.mean(0), rtol=1e-9)
    np.testing.assert_allclose(values.std, expected.std(0), rtol=1e-9)
    np.testing.assert_allclose(values.low, expected.min(0), rtol=1e-9)
    np.testing.assert_allclose(values.high, expected.max(0), rtol=1e-9)
    assert (values.images, values.bad) == (9, [])
    assert str(values).startswith(f"{dtype} values from 0 to ")
    mean, std = statistics(f"folder:{tmp_path}", channels=channels, split="all")
    np.testing.assert_array_equal([mean, std], [values.mean, values.std])


def test_the_command_prints_overrides(tmp_path, capsys):
    tree = open_tree(tmp_path / "tree")
    assert main([f"folder:{tree}", "--split=all"]) == 0
    printed = capsys.readouterr()
    assert "1 of 13 images cannot be used" in printed.err
    assert "uint8 values from 0 to 255 in 12 images" in printed.err
    overrides = [word.removeprefix("--config.") for word in shlex.split(printed.out)]
    config = schema.load("configs/mae_emoji.py", overrides)
    assert len(config.objective.mean) == len(config.objective.std) == 3
    assert 0 < min(config.objective.std) < max(config.objective.mean) < 1
    assert main([f"folder:{tree}/empty"]) == 2


NATURAL = np.random.default_rng(0).beta(2, 3, (8, 16, 16, 3))  # shares of the range
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    "values, mean_std",
    [
        (NATURAL * 255, ((0.5,), (0.5,))),  # floats in 0 to 255
        (NATURAL * 10_000, IMAGENET),  # reflectances as floats
        ((NATURAL * 4095).astype(np.uint16), IMAGENET),  # 12 bits in 16
        ((NATURAL * 1000).astype(np.uint16), ((0.5,), (0.5,))),
        ((NATURAL * 10_000).astype(np.int16), IMAGENET),
        ((NATURAL > 0.5).astype(np.uint8), IMAGENET),  # 0 and 1 as integers
        (270 + 20 * NATURAL, ((0.5,), (0.25,))),  # kelvin
        (NATURAL, ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))),  # mean and std for 0 to 255
        (np.concatenate([NATURAL, 255 * NATURAL[:1]]), IMAGENET),  # one image of another range
        (np.stack([NATURAL[..., 0], NATURAL[..., 1], 900 * NATURAL[..., 2]], -1), IMAGENET),
    ],
)
def test_values_that_do_not_match_mean_and_std(tmp_path, values, mean_std):
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    observed = observe(source_of(tmp_path, values), 3)
    problem = range_problem(observed, *mean_std)
    assert "do not fit the images" in problem
    assert f"{observed.dtype} values from" in problem
    assert not range_problem(observed, observed.mean, observed.std)


@pytest.mark.parametrize("mean_std", [IMAGENET, ((0.5,), (0.5,)), ((0.0,), (1.0,))])
def test_usual_values(tmp_path, mean_std):
    """Also dark ones, binary ones, drawings on white, and one constant channel or image."""
    for i, values in enumerate(
        (
            NATURAL * 255,
            NATURAL * 120,
            (NATURAL > 0.5) * 255,
            255 - NATURAL**4 * 255,
            NATURAL * [255, 255, 0],
            NATURAL * 0,
        )
    ):
        source = source_of(tmp_path / f"{i}", values.astype(np.uint8))
        assert not range_problem(observe(source, 3), *mean_std)
    floats = observe(source_of(tmp_path / "float", NATURAL.astype(np.float32) * 2 - 1), 3)
    assert not range_problem(floats, *mean_std)


def test_without_a_usable_image_there_are_no_values(tmp_path):
    plant(tmp_path, {"a.png": encoded(Image.fromarray(pixels()))[:900]})
    (source,) = open_sources(f"folder:{tmp_path}", ("all",))
    with pytest.raises(UserError, match="none of 1 images can be used"):
        observe(source, 3)


# --- Channels and sizes. ---


@pytest.mark.parametrize(
    "content, fitting",
    [
        (encoded(Image.fromarray(pixels())), {1, 3}),
        (encoded(Image.fromarray(pixels(channels=4))), {1, 3, 4}),
        (encoded(Image.fromarray(pixels(channels=1)[..., 0])), {1, 3}),
        (npy(pixels(channels=13)), {13, 30, 40}),  # the length of any axis, if there is one such
        (npy(pixels(channels=1)), {1, 3, 30, 40}),
        (tif(pixels(channels=5), photometric="minisblack", planarconfig="contig"), {5}),
    ],
)
def test_channels_are_required(tmp_path, content, fitting):
    plant(tmp_path, {"a.img": content})
    (source,) = open_sources(f"folder:{tmp_path}", ("all",))
    for channels in (1, 2, 3, 4, 5, 13, 30, 40):
        if channels in fitting:
            require_channels("folder:x", source, channels)
        else:
            with pytest.raises(UserError, match=rf"data.channels = {channels}.* folder:x"):
                require_channels("folder:x", source, channels)


def test_sizes():
    assert size_warnings(1000, 50, 64) == []
    (warning,) = size_warnings(50, 50, 64)
    assert "a batch of 64 is larger than the training split, 50 images" in warning
    (warning,) = size_warnings(1000, 1, 64)
    assert "the evaluation split has one image" in warning
    (warning,) = size_warnings(1000, 3, 64)
    assert "only 3 images" in warning
