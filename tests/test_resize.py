"""Positions and relative position bias for another grid of patches."""

import jax
import numpy as np
import pytest

from mim_jax import UserError
from mim_jax.models.resize import fit, resize_positions, resize_relative, spread


@pytest.mark.parametrize(
    ("side", "first_row"),
    [
        (6, [-0.76482069, -0.44675392, 0.38913506, 1.37630459, 3.07653684, 4.23410943]),
        (8, [-0.9249654, -0.72730839, -0.42223371, 0.30357823, 0.99629867, 2.25238928, 3.34724071,
             4.02440502]),
    ],
)  # fmt: skip
def test_positions_are_resized_by_pytorchs_bicubic(side, first_row):
    table = np.concatenate([[7.0], np.arange(16) ** 1.5]).reshape(1, 17, 1)
    with jax.enable_x64(True):
        resized = resize_positions(table, (4, 4), (side, side))
    np.testing.assert_allclose(resized[0, 1 : side + 1, 0], first_row, atol=1e-6)
    assert resized[0, 0, 0] == 7


@pytest.mark.parametrize(
    ("side", "rows", "expected"),
    [
        (24, 2212, {1000: 0.094431, 1104: -0.478027}),
        (32, 3972, {1000: 0.963668}),
    ],
)
def test_resized_relative_bias_equals_beit(side, rows, expected):
    """The reference's numbers: 14 x 14 patches to the grids of images of 384 and 512 pixels."""
    table = np.stack([np.sin(0.01 * np.arange(732)), np.zeros(732)], axis=1).astype(np.float32)
    resized = resize_relative(table, (14, 14), (side, side))
    assert resized.shape == (rows, 2)
    for row, value in expected.items():
        assert resized[row, 0] == pytest.approx(value, abs=2e-6)
    total = {24: 361.3015, 32: 816.6048}[side]
    assert resized[:, 0].sum(dtype=np.float64) == pytest.approx(total, abs=2e-4)
    np.testing.assert_allclose(resized[-3:, 0], [0.845133, 0.850437, 0.855655], atol=1e-6)
    assert not resized[:, 1].any()


@pytest.mark.parametrize(("before", "after"), [((3, 5), (4, 6)), ((2, 8), (4, 4))])
def test_positions_of_images_that_are_not_square(before, after):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1, 1 + before[0] * before[1], 2))
    image = torch.tensor(table[:, 1:]).reshape(1, *before, 2).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, size=after, mode="bicubic", align_corners=False)
    with jax.enable_x64(True):
        resized = resize_positions(table, before, after)
        fitted = fit({"positions": table}, {"positions": resized.shape}, before=before, after=after)
    expected = image.permute(0, 2, 3, 1).reshape(1, -1, 2)
    np.testing.assert_allclose(resized[:, 1:], expected, atol=1e-6)
    assert (fitted["positions"] == resized).all()


def test_sides_of_a_relative_bias_are_resized_independently():
    """What depends on the rows alone is, on any grid, what it is on a square one."""
    profile = np.random.default_rng(0).normal(size=27)
    table = np.append(np.repeat(profile, 27), [7.0, 8.0, 9.0])[:, None]
    square = resize_relative(table, (14, 14), (20, 20))[:-3].reshape(39, 39)
    oblong = resize_relative(table, (14, 14), (20, 24))[:-3].reshape(39, 47)
    np.testing.assert_allclose(oblong, np.repeat(square[:, :1], 47, axis=1), atol=1e-9)
    same = resize_relative(table, (14, 14), (14, 24))[:-3].reshape(27, 47)
    np.testing.assert_allclose(same, np.repeat(profile[:, None], 47, axis=1), atol=1e-9)


def test_an_unknown_grid_is_kept_or_refused():
    kept = np.ones((1, 7, 4))
    fitted_params = fit({"positions": kept}, {"positions": (1, 7, 4)}, before=None, after=(2, 3))
    assert (fitted_params["positions"] == kept).all()
    with pytest.raises(UserError, match="positions cannot be resized: the original image size"):
        fit({"positions": kept}, {"positions": (1, 17, 4)}, before=None, after=(4, 4))


@pytest.mark.parametrize(
    ("before", "after"), [((1, 4), (2, 7)), ((1, 4), (1, 7)), ((4, 1), (7, 2))]
)
def test_a_single_row_of_patches_is_repeated(before, after):
    table = np.random.default_rng(0).normal(size=(7 + 3, 2))
    long = resize_relative(
        np.concatenate([np.repeat(table[:-3], 7, 0), table[-3:]]), (4, 4), (7, 7)
    )
    expected = long[:-3].reshape(13, 13, 2)[:, 0]  # one that depends on the rows alone
    fitted_params = resize_relative(table, before, after)[:-3].reshape(
        *(2 * x - 1 for x in after), 2
    )
    along = 1 if before[0] == 1 else 0
    for i in range(fitted_params.shape[1 - along]):
        np.testing.assert_allclose(fitted_params.take(i, 1 - along), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "q", "outermost"),
    [(384, 1.090307446, 22.999934), (512, 1.134917812, 31.000182), (640, 1.168503628, 39.000083)],
)
def test_distances_grow_geometrically(size, q, outermost):
    """The ratio of BEiT's bisection, from 14 x 14 patches of 16 pixels."""
    old, new = spread(14, size // 16)
    assert old[-1] == pytest.approx(outermost, abs=1e-6)
    steps = np.diff(old[13:])
    np.testing.assert_allclose(steps[1:] / steps[:-1], q, rtol=1e-9)
    assert new.tolist() == list(range(1 - size // 16, size // 16))
