"""Masks: their counts, marginals and shapes against those of the reference generators."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.masking import corrupt, sample

RNG = jax.random.key(0)


def draw(count, grid, number, sampling, **settings):
    """-> `count` masks (count, rows, columns) as numpy."""
    keys = jax.random.split(RNG, count)
    masks = jax.jit(lambda keys: sample(keys, grid, number, sampling, **settings))(keys)
    return np.asarray(masks).reshape(-1, *grid)


def test_blocks_have_the_statistics_of_the_reference():
    """50,000 masks of BEiT's own generator: counts, and how often a place is hidden."""
    masks = draw(50_000, (14, 14), 75, "blockwise", min_block=16)
    counts = masks.sum((1, 2))
    assert counts.max() == 75
    assert 60 <= counts.min() <= 65
    np.testing.assert_allclose(counts.mean(), 74.475, atol=0.03)
    np.testing.assert_allclose((counts == 75).mean(), 0.667, atol=0.01)
    np.testing.assert_allclose((counts < 70).mean(), 0.0037, atol=0.0015)
    share = masks.mean(0)
    np.testing.assert_allclose(share.mean(), 0.38, atol=0.001)
    corners = share[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(corners, 0.042, atol=0.005)
    edges = [share[0, 6:8], share[-1, 6:8], share[6:8, 0], share[6:8, -1]]
    np.testing.assert_allclose(np.mean(edges), 0.191, atol=0.006)
    np.testing.assert_allclose(share[6:8, 6:8], 0.717, atol=0.01)


@pytest.mark.parametrize(
    ("grid", "number", "least", "mean"),
    [((8, 8), 25, 16, 24.53), ((7, 7), 19, 12, 18.49), ((24, 24), 220, 205, 219.24)],
)
def test_blocks_of_other_grids(grid, number, least, mean):
    counts = draw(5_000, grid, number, "blockwise", min_block=16).sum((1, 2))
    assert (counts < least).mean() < 0.002
    assert counts.max() == number
    np.testing.assert_allclose(counts.mean(), mean, atol=0.06)


def test_blocks_are_rectangles_that_leave_a_row_and_a_column():
    """On 7 x 12 no block is seven high; what is hidden is a union of rectangles."""
    masks = draw(2_000, (7, 12), 32, "blockwise", min_block=4)
    first = draw(2_000, (7, 12), 10, "blockwise", min_block=10)  # nearly always one block
    single = [m for m in first if m.sum() == 10 and len(np.unique(m[m.any(1)], axis=0)) == 1]
    assert len(single) > 900
    heights = {int(m.any(1).sum()) for m in single}
    assert heights <= {2, 5}  # 2 x 5 and 5 x 2; 1 x 10 and 10 x 1 are too thin
    assert masks.sum((1, 2)).max() == 32


def test_a_mask_depends_only_on_its_key():
    keys = jax.random.split(RNG, 8)
    for sampling in ("random", "blockwise", "span"):
        masks = sample(keys, (6, 6), 14, sampling, min_block=4)
        alone = sample(keys[3:4], (6, 6), 14, sampling, min_block=4)
        np.testing.assert_array_equal(alone[0], masks[3])
        assert len(np.unique(masks, axis=0)) == 8


def test_random_masking_is_exact_and_uniform():
    masks = draw(20_000, (6, 8), 20, "random")
    assert (masks.sum((1, 2)) == 20).all()
    np.testing.assert_allclose(masks.mean(0), 20 / 48, atol=0.015)


def test_squares_of_simmim():
    masks = draw(1_000, (14, 14), 120, "random", unit=2)
    squares = masks.reshape(-1, 7, 2, 7, 2)
    assert (squares.all((2, 4)) == squares.any((2, 4))).all()
    assert (squares.all((2, 4)).sum((1, 2)) == 30).all()


def test_spans_have_spanbert_s_lengths():
    """On a very wide row hardly a run meets another: geometric with p = 0.2, cut at ten."""
    masks = draw(2_000, (1, 2_000), 10, "span")
    assert (masks.sum((1, 2)) == 10).all()
    lengths = 0.8 ** np.arange(10) * 0.2
    mean = (np.arange(1, 11) * lengths / lengths.sum()).sum()
    assert math.isclose(mean, 3.797, abs_tol=0.001)
    padded = np.pad(masks[:, 0].astype(np.int8), ((0, 0), (1, 1)))
    runs = (np.diff(padded, axis=1) == 1).sum(1)
    # Runs until ten are hidden, the last one cut: as many as a renewal process has.
    draws = np.random.default_rng(0).choice(10, (40_000, 10), p=lengths / lengths.sum()) + 1
    expected = 1 + (np.cumsum(draws, axis=1) < 10).sum(1)
    np.testing.assert_allclose(runs.mean(), expected.mean(), atol=0.08)


def test_spans_lie_in_rows():
    masks = draw(500, (6, 6), 12, "span")
    assert (masks.sum((1, 2)) == 12).all()
    across = masks[:, :, 1:] & masks[:, :, :-1]
    down = masks[:, 1:] & masks[:, :-1]
    assert across.sum() > 1.5 * down.sum()


def test_grid_keeps_one_of_four_patches():
    masks = draw(2, (4, 6), 18, "grid")
    assert np.argwhere(~masks[0]).tolist() == [[y, x] for y in (0, 2) for x in (0, 2, 4)]
    np.testing.assert_array_equal(masks[0], masks[1])


def test_corruption_has_the_given_shares_of_masked_patches():
    keys = jax.random.split(RNG, 2_000)
    masks = sample(keys, (6, 6), 14, "random")
    masked, source = corrupt(keys, masks, (0.8, 0.1, 0.1))
    moved = source != jnp.arange(36)
    assert not (masked & ~masks).any()
    assert not (moved & ~masks).any()
    assert not (moved & masked).any()
    hidden = masks.sum()
    np.testing.assert_allclose(masked.sum() / hidden, 0.8, atol=0.01)
    np.testing.assert_allclose(moved.sum() / hidden, 0.1 * 35 / 36, atol=0.008)
    plain, same = corrupt(keys, masks, (1.0, 0.0, 0.0))
    np.testing.assert_array_equal(plain, masks)
    np.testing.assert_array_equal(same, jnp.broadcast_to(jnp.arange(36), same.shape))
