"""Starting from another run: what is resized, copied, new, ignored, refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mim_jax import UserError, optim
from mim_jax.checkpoint import Checkpoints, init_part
from mim_jax.models.patches import sincos2d
from mim_jax.models.resize import fit, resize_positions, resize_relative
from mim_jax.objectives import beit, classify, mae
from mim_jax.train import initialize

MODEL = dict(width=16, depth=2, heads=2, patch=4)
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
OPTIMIZER = optim.adamw(lambda step: 1e-3)
BEIT = dict(positions="none", key_bias=False, layer_scale=0.1)


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
        resized = resize_positions(table, 1 + side**2)
    np.testing.assert_allclose(resized[0, 1 : side + 1, 0], first_row, atol=1e-6)
    assert resized[0, 0, 0] == 7


@pytest.mark.parametrize(
    ("side", "rows", "expected"),
    [
        (24, 2212, {1000: 0.094431, 1104: -0.478027}),
        (32, 3972, {1000: 0.963668}),
    ],
)
def test_relative_bias_is_resized_as_beits(side, rows, expected):
    """The reference's numbers: 14 x 14 patches to the grids of images of 384 and 512 pixels."""
    table = np.stack([np.sin(0.01 * np.arange(732)), np.zeros(732)], axis=1).astype(np.float32)
    resized = resize_relative(table, (2 * side - 1) ** 2 + 3)
    assert resized.shape == (rows, 2)
    for row, value in expected.items():
        assert resized[row, 0] == pytest.approx(value, abs=2e-6)
    total = {24: 361.3015, 32: 816.6048}[side]
    assert resized[:, 0].sum(dtype=np.float64) == pytest.approx(total, abs=2e-4)
    np.testing.assert_allclose(resized[-3:, 0], [0.845133, 0.850437, 0.855655], atol=1e-6)
    assert not resized[:, 1].any()


def test_other_than_squares_are_refused():
    with pytest.raises(UserError, match="square images alone"):
        resize_positions(np.zeros((1, 7, 4)), 17)
    kept = np.ones((1, 7, 4))
    assert (fit({"positions": kept}, {"positions": (1, 7, 4)})["positions"] == kept).all()


def begin(objective, size=16, seed=0, ema=False):
    example = {
        "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8),
        "index": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    return jax.jit(lambda: initialize(objective, OPTIMIZER, example, seed, ema))()


def run_of(objective, folder, size=16, seed=1, **model):
    """A run that saved its first state. -> its folder, the state"""
    checkpoints = Checkpoints(folder, keep=1)
    state = begin(objective, size, seed)
    checkpoints.save(state)
    checkpoints.close()
    record = {"model": {"positions": "sincos", "patch": 4} | model, "data": {"size": size}}
    (folder / "config.json").write_text(json.dumps({"config": record}))
    return folder, state


def encoder_of(state) -> dict:
    parts = (
        flatten_dict(tree.get("encoder", {}), sep="/") for tree in (state.buffers, state.params)
    )
    return functools.reduce(dict.__or__, parts)


def same(begun, source, but=()):
    a, b = encoder_of(begun), encoder_of(source)
    return all((a[name] == b[name]).all() for name in a.keys() & b if name not in but)


@pytest.mark.parametrize("size", [16, 24])
def test_fine_tuning_begins_at_maes_positions(size, tmp_path, capsys):
    folder, source = run_of(mae.objective(MODEL, **DECODER), tmp_path)
    tuned = classify.objective(MODEL | dict(positions="learned"), 5)
    begun = init_part(begin(tuned, size, ema=True), "encoder", folder)
    said = capsys.readouterr().out
    assert "encoder: 28 arrays from step 0" in said
    assert "ignored: norm/bias, norm/scale" in said
    assert same(begun, source)
    table = np.pad(sincos2d((4, 4), 16)[0], ((1, 0), (0, 0)))[None]
    if size != 16:
        table = resize_positions(table, 37)
    np.testing.assert_allclose(begun.params["encoder"]["positions"], table, atol=1e-6)
    assert (begun.ema["encoder"]["positions"] == begun.params["encoder"]["positions"]).all()


def test_a_shared_bias_is_copied_to_each_block(tmp_path, capsys):
    tokenizer = dict(kind="small", vocabulary=8, width=8, layers=2, codebook=4)
    objective = beit.objective(
        MODEL | BEIT | dict(relative_bias="shared"), tokenizer, target="pixels", min_block=2,
        num_masked=6,
    )  # fmt: skip
    folder, source = run_of(objective, tmp_path, positions="none")
    table = jax.random.normal(jax.random.key(0), (52, 2))
    changed = source.params["encoder"] | {"relative_position_bias": {"table": table}}
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(
        source._replace(step=jnp.int32(1), params=source.params | {"encoder": changed})
    )
    checkpoints.close()
    own = classify.objective(MODEL | BEIT | dict(relative_bias="own"), 5)
    for size, expected in ((16, table), (24, resize_relative(np.asarray(table), 124))):
        begun = init_part(begin(own, size), "encoder", folder)
        for i in range(2):
            found = begun.params["encoder"][f"block_{i}"]["relative_position_bias"]["table"]
            np.testing.assert_array_equal(found, expected)
        assert same(begun, source)
    said = capsys.readouterr().out
    assert "ignored: mask_token, norm/bias, norm/scale" in said
    with pytest.raises(UserError, match=r"another model: .* first relative_position_bias/table"):
        init_part(begin(classify.objective(MODEL | BEIT, 5)), "encoder", folder)


@pytest.mark.parametrize("blocks", [0.0, 1.0, 1.5])
def test_a_frozen_part_is_loaded_too_and_goes_on(blocks, tmp_path):
    """From MAE to a probe or partial fine-tuning, and from there to whatever comes next."""
    folder, source = run_of(mae.objective(MODEL, **DECODER), tmp_path / "mae")
    probe = classify.objective(MODEL, 5, pooling="cls", tuned_blocks=blocks)
    begun = init_part(begin(probe), "encoder", folder)
    assert same(begun, source)
    checkpoints = Checkpoints(tmp_path / "probe", keep=1)
    checkpoints.save(begun)
    checkpoints.close()
    after = init_part(begin(mae.objective(MODEL, **DECODER)), "encoder", tmp_path / "probe")
    assert same(after, source)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (dict(width=32), r"first embed/bias: here \(32,\), there \(16,\)"),
        (dict(patch=8), r"first embed/kernel: here \(192, 16\), there \(48, 16\)"),
        (dict(depth=3), r"12 arrays differ, first block_2/fc1/bias: here \(64,\), there None"),
        (dict(depth=1), r"12 arrays differ, first block_1/fc1/bias: here None, there \(64,\)"),
        (dict(layer_scale=0.1), "4 arrays differ, first block_0/gamma_1"),
    ],
)
def test_another_model_is_refused(model, sentence, tmp_path):
    folder, _ = run_of(mae.objective(MODEL, **DECODER), tmp_path)
    with pytest.raises(UserError, match=sentence):
        init_part(begin(classify.objective(MODEL | model, 5)), "encoder", folder)
