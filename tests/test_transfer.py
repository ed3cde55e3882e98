"""Starting from another run: what is taken, resized, copied, new, ignored, refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mim_jax import UserError, optim, schema
from mim_jax.checkpoint import Checkpoints
from mim_jax.models.patches import sincos2d
from mim_jax.models.resize import resize_positions, resize_relative
from mim_jax.objectives import beit, classify, dvae, mae
from mim_jax.train import initialize
from mim_jax.transfer import compare, encoder_in, start_from

MODEL = dict(width=16, depth=2, heads=2, patch=4, positions="sincos")
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
OPTIMIZER = optim.adamw(lambda step: 1e-3)
BEIT = dict(positions="none", key_bias=False, layer_scale=0.1)
TOKENIZER = dict(kind="small", vocabulary=8, width=8, layers=2, codebook=4)
OBJECTIVES = dict(mae=mae, beit=beit, classify=classify, dvae=dvae)


def config_of(name, model=None, size=16, **objective) -> dict:
    """What a run's config says."""
    networks = {"model": MODEL | (model or {})} if name != "dvae" else {}
    if name in ("beit", "dvae") or objective.get("target") == "tokens":
        networks["tokenizer"] = TOKENIZER
    return networks | {"objective": {"name": name} | objective, "data": {"size": size}}


def begin(config, seed=0, ema=False, num_labels=5):
    """The state that a run of this config begins with."""
    settings = dict(config["objective"])
    module = OBJECTIVES[settings.pop("name")]
    if module is classify:
        settings["num_labels"] = num_labels
    networks = schema.networks(config)
    sides = np.broadcast_to(config["data"]["size"], 2)
    names = ("image", "tokenizer_image") if "tokenizer" in networks else ("image",)
    channels = config["data"].get("channels", 3)
    example = {name: jax.ShapeDtypeStruct((1, *sides, channels), jnp.uint8) for name in names}
    example["index"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    objective = module.objective(**networks, **settings)
    return jax.jit(lambda: initialize(objective, OPTIMIZER, example, seed, ema))()


def save(folder, config, state, class_names=()):
    """A run that saved this state. -> its folder"""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(state)
    checkpoints.close()
    record = {"config": config, "trajectory": {}, "data": {"class_names": class_names}}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def run_of(folder, config, **options):
    """A run that saved its first state. -> its folder, the state"""
    state = begin(config, seed=1, **options)
    return save(folder, config, state), state


def encoder_of(state) -> dict:
    parts = (
        flatten_dict(tree.get("encoder", {}), sep="/") for tree in (state.buffers, state.params)
    )
    return functools.reduce(dict.__or__, parts)


def same(begun, source, but=()):
    a, b = encoder_of(begun), encoder_of(source)
    return all((a[name] == b[name]).all() for name in a.keys() & b if name not in but)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all(), a, b)))


MAE = config_of("mae", **DECODER)
HEAD = classify.Classification.head


def test_only_the_encoder_is_taken(tmp_path, capsys):
    folder, source = run_of(tmp_path, MAE)
    state = begin(MAE)
    begun = start_from(state, "encoder", folder, MAE)
    said = capsys.readouterr().out
    assert "arrays from step 0" in said
    assert f"not taken from {folder}, but random: decoder\n" in said
    assert equal(begun.params["encoder"], source.params["encoder"])
    assert equal(begun.params["decoder"], state.params["decoder"])
    assert begun.step == 0


@pytest.mark.parametrize("size", [16, 24, (16, 24)])
def test_fine_tuning_starts_from_the_positions_of_mae(size, tmp_path, capsys):
    folder, source = run_of(tmp_path, MAE)
    tuned = config_of("classify", dict(positions="learned"), size)
    begun = start_from(begin(tuned, ema=True), "encoder", folder, tuned)
    said = capsys.readouterr().out
    assert "encoder: 28 arrays from step 0" in said
    assert ("resized: positions" in said) == (size != 16)
    assert "ignored: norm/bias, norm/scale" in said
    assert same(begun, source)
    table = np.pad(sincos2d((4, 4), 16)[0], ((1, 0), (0, 0)))[None]
    if size != 16:
        table = resize_positions(table, (4, 4), (np.broadcast_to(size, 2) // 4).tolist())
    np.testing.assert_allclose(begun.params["encoder"]["positions"], table, atol=1e-6)
    assert (begun.ema["encoder"]["positions"] == begun.params["encoder"]["positions"]).all()


def test_learned_positions_keep_their_places(tmp_path):
    """8 x 2 patches and 4 x 4 are as many: the arrays have the same shape."""
    folder, source = run_of(tmp_path, config_of("mae", dict(positions="learned"), (32, 8)))
    tuned = config_of("classify", dict(positions="learned"))
    begun = start_from(begin(tuned), "encoder", folder, tuned)
    table = np.asarray(source.params["encoder"]["positions"])
    expected = resize_positions(table, (8, 2), (4, 4))
    np.testing.assert_array_equal(begun.params["encoder"]["positions"], expected)


def test_a_shared_bias_is_copied_to_each_block(tmp_path, capsys):
    config = config_of(
        "beit", BEIT | dict(relative_bias="shared"), target="pixels", min_block=2, num_masked=6
    )
    source = begin(config, seed=1)
    table = jax.random.normal(jax.random.key(0), (52, 2))
    changed = source.params["encoder"] | {"relative_position_bias": {"table": table}}
    folder = save(tmp_path, config, source._replace(params=source.params | {"encoder": changed}))
    resized = resize_relative(np.asarray(table), (4, 4), (6, 6))
    for size, expected in ((16, table), (24, resized)):
        own = config_of("classify", BEIT | dict(relative_bias="own"), size)
        begun = start_from(begin(own), "encoder", folder, own)
        for i in range(2):
            copied = begun.params["encoder"][f"block_{i}"]["relative_position_bias"]["table"]
            np.testing.assert_array_equal(copied, expected)
        assert same(begun, source)
    said = capsys.readouterr().out
    assert "ignored: mask_token, norm/bias, norm/scale" in said
    assert "head" not in said
    without = config_of("classify", BEIT)
    with pytest.raises(
        UserError, match=r"a different network: .* first relative_position_bias/table"
    ):
        start_from(begin(without), "encoder", folder, without)


@pytest.mark.parametrize("blocks", [0.0, 1.0, 1.5])
def test_frozen_parts_are_loaded_and_continue(blocks, tmp_path):
    """From MAE to a probe or partial fine-tuning, and from there to whatever comes next."""
    folder, source = run_of(tmp_path / "mae", MAE)
    probe = config_of("classify", pooling="cls", tuned_blocks=blocks)
    begun = start_from(begin(probe), "encoder", folder, probe)
    assert same(begun, source)
    after = start_from(begin(MAE), "encoder", save(tmp_path / "probe", probe, begun), MAE)
    assert same(after, source)


@pytest.mark.parametrize(
    ("settings", "labels", "taken"),
    [
        (dict(), 5, "fc_norm/bias, fc_norm/scale, head/bias, head/kernel"),
        (dict(), 6, "fc_norm/bias, fc_norm/scale"),
        (dict(pooling="cls"), 5, "new"),
    ],
)
def test_the_head_of_a_classifier_is_copied(settings, labels, taken, tmp_path, capsys):
    """As in BEiT's code: it is left where its shape differs, its norm never."""
    config = config_of("classify")
    state = begin(config, seed=1)
    folder = save(
        tmp_path, config, state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
    )
    tuned = config_of("classify", **settings)
    begun = start_from(begin(tuned, num_labels=labels), "encoder", folder, tuned, HEAD)
    assert f"head: {taken}\n" in capsys.readouterr().out
    assert ("fc_norm" in taken) == (
        "fc_norm" in begun.params and (begun.params["fc_norm"]["scale"] == 2).all()
    )
    assert ("head" in taken) == (begun.params["head"]["bias"] == 1).all()


def test_classes_of_a_head_are_matched_by_name(tmp_path, capsys):
    config = config_of("classify", head_std=1.0)
    source = begin(config, seed=1, num_labels=3)
    folder = save(tmp_path, config, source, ["cat", "dog", "eel"])
    start = functools.partial(start_from, begin(config, num_labels=3), "encoder", folder, config)
    for names, order in ((["eel", "cat", "dog"], [2, 0, 1]), (["cat", "dog", "eel"], [0, 1, 2])):
        head = start(HEAD, names).params["head"]
        for name, x in source.params["head"].items():
            np.testing.assert_array_equal(head[name], np.asarray(x)[..., order])
    capsys.readouterr()
    other = start(HEAD, ["cat", "dog", "elk"])
    assert "the classes differ, for example eel, elk" in capsys.readouterr().out
    assert (other.params["head"]["kernel"] != source.params["head"]["kernel"]).any()
    assert equal(other.params["fc_norm"], source.params["fc_norm"])
    with pytest.raises(UserError, match=r"cannot evaluate: .* has no params|has no head/bias"):
        start(HEAD, ["cat", "dog", "elk"], True)


def of_bands(bands, **objective):
    config = config_of("classify", mean=(0.5,), std=(0.5,), **objective)
    config["data"] |= dict(channels=len(bands), bands=bands)
    return config


def test_bands_are_matched_by_name(tmp_path, capsys):
    """Where images have the bands in common, an encoder computes the same."""
    before = of_bands(("red", "green", "nir"))
    folder, source = run_of(tmp_path, before)
    after = of_bands(("nir", "swir", "red", "green"))
    state = begin(after)
    begun = start_from(state, "encoder", folder, after)
    said = capsys.readouterr().out
    assert "bands matched: nir, red, green; new: swir" in said
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32)
    images[..., 1] = 0
    encoders = (schema.networks(config)["model"] for config in (after, before))
    ours, theirs = (
        encoder.apply({"params": run.params["encoder"]}, x, layers=(1,))[0]
        for encoder, run, x in zip(
            encoders, (begun, source), (images, images[..., [2, 3, 0]]), strict=True
        )
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    kernel = begun.params["encoder"]["embed"]["kernel"].reshape(16, 4, -1)
    initial = state.params["encoder"]["embed"]["kernel"].reshape(16, 4, -1)
    assert (kernel[:, 1] == initial[:, 1]).all()
    # fewer bands
    fewer = of_bands(("green",))
    kernel = start_from(begin(fewer), "encoder", folder, fewer).params["encoder"]["embed"]["kernel"]
    expected = source.params["encoder"]["embed"]["kernel"].reshape(16, 3, -1)[:, 1]
    np.testing.assert_array_equal(kernel, expected)
    assert "bands matched: green; dropped: red, nir" in capsys.readouterr().out


def test_statistics_of_bands_are_compared_by_name(tmp_path, capsys):
    before = of_bands(("red", "nir"))
    before["objective"] |= dict(mean=(0.1, 0.2), std=(0.3, 0.4))
    folder, _ = run_of(tmp_path, before)
    after = of_bands(("nir", "blue", "red"))
    after["objective"] |= dict(mean=(0.2, 0.9, 0.1), std=(0.4, 0.9, 0.5))
    start_from(begin(after), "encoder", folder, after)
    error = capsys.readouterr().err
    assert "objective.std" in error
    assert "(0.4, 0.3), this run's is (0.4, 0.5), for the bands nir, red" in error
    assert "objective.mean" not in error


def test_bands_that_cannot_be_matched(tmp_path):
    folder, _ = run_of(tmp_path, of_bands(("red", "nir")))
    after = of_bands(("a", "b"))
    with pytest.raises(UserError, match="red, nir; none of them is among"):
        start_from(begin(after), "encoder", folder, after)
    encoders = (encoder_in(of_bands(bands)) for bands in (("nir", "red"), ("red", "nir")))
    with pytest.raises(UserError, match="are red, nir, in this order"):
        compare(*encoders, folder)


def test_the_head_of_a_probe_is_copied_with_its_statistics(tmp_path):
    """A linear probe is whole, as it must be to be measured; what lacks anything is not."""
    probe = config_of("classify", pooling="cls", tuned_blocks=0.0, batch_norm=2, head_std=1.0)
    folder, source = run_of(tmp_path / "probe", probe)
    begun = start_from(begin(probe), "encoder", folder, probe, HEAD, strict=True)
    assert equal((begun.params, begun.buffers), (source.params, source.buffers))
    folder, _ = run_of(tmp_path / "mae", MAE)
    with pytest.raises(UserError, match="has no batch_statistics/head_norm/mean, which this"):
        start_from(begin(probe), "encoder", folder, probe, HEAD, strict=True)


@pytest.mark.parametrize("target", ["normalized_pixels", "tokens"])
def test_a_pretraining_continues_with_its_decoder(target, tmp_path, capsys):
    """Not with its tokenizer, whose decoder has the same name; that is another key's."""
    config = config_of("mae", **DECODER, target=target)
    folder, source = run_of(tmp_path / "mae", config)
    state = begin(config)
    begun = start_from(state, "encoder", folder, config, ("decoder",))
    assert equal(begun.params, source.params)
    assert equal(begun.buffers, state.buffers)
    arrays = len(jax.tree.leaves(source.params["decoder"]))
    assert f"head: {arrays} arrays of decoder\n" in capsys.readouterr().out
    wider = config_of("mae", **DECODER | dict(decoder_width=24), target=target)
    begun = start_from(begin(wider), "encoder", folder, wider, ("decoder",))
    assert equal(begun.params["encoder"], source.params["encoder"])
    assert "head: new\n" in capsys.readouterr().out


def test_a_tokenizer_is_found_beside_maes_own_decoder(tmp_path):
    """Both have a part called decoder. From a tokenizer's run, and from one MAE to another."""
    tokens = config_of("mae", **DECODER, target="tokens")
    folder, source = run_of(tmp_path / "dvae", config_of("dvae"))
    state = begin(tokens)
    begun = start_from(state, "tokenizer", folder, tokens)
    assert equal(begun.buffers, source.params)
    assert equal(begun.params, state.params)
    again = start_from(state, "tokenizer", save(tmp_path / "mae", tokens, begun), tokens)
    assert equal(again.buffers, source.params)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (dict(width=32), r"first embed/bias: \(32,\) in this run, \(16,\) in"),
        (dict(width=32, depth=3), r"set --config.model.width=16 --config.model.depth=2\.$"),
        (dict(patch=8), r"first embed/kernel: \(192, 16\) in this run, \(48, 16\) in"),
        (dict(patch=(2, 8)), r"its model.patch is \(4, 4\), this run's is \(2, 8\)"),
        (dict(depth=3), r"12 arrays differ, first block_2/fc1/bias: \(64,\) in this run, None in"),
        (dict(depth=1), r"12 arrays differ, first block_1/fc1/bias: None in this run, \(64,\) in"),
        (dict(layer_scale=0.1), "4 arrays differ, first block_0/gamma_1"),
        (dict(heads=4), "its model.heads is 2, this run's is 4"),
        (dict(positions="none"), "its model.positions is 'sincos', this run's is 'none'"),
    ],
)
def test_another_model_is_refused(model, sentence, tmp_path):
    folder, _ = run_of(tmp_path, MAE)
    config = config_of("classify", model)
    with pytest.raises(UserError, match=sentence):
        start_from(begin(config), "encoder", folder, config)


def test_fixed_positions_are_for_one_grid(tmp_path):
    """MAE's code interpolates the table; the fixed one of another grid is another."""
    folder, _ = run_of(tmp_path, MAE)
    config = config_of("classify", size=24, tuned_blocks=0.0)
    with pytest.raises(UserError, match=r"fixed positions for 4 x 4 patches, .*positions=learned"):
        start_from(begin(config), "encoder", folder, config)


def test_a_wrong_source_is_named(tmp_path):
    tokenizer, _ = run_of(tmp_path / "dvae", config_of("dvae"))
    encoder, _ = run_of(tmp_path / "mae", MAE)
    with pytest.raises(
        UserError, match=r"init_from.encoder: .* no encoder; it has decoder, tokenizer"
    ):
        start_from(begin(MAE), "encoder", tokenizer, MAE)
    tokens = config_of("mae", **DECODER, target="tokens")
    with pytest.raises(UserError, match=r"init_from.tokenizer: .* it has decoder, encoder\."):
        start_from(begin(tokens), "tokenizer", encoder, tokens)
    with pytest.raises(UserError, match="this objective has no tokenizer; it has decoder, encoder"):
        start_from(begin(MAE), "tokenizer", tokenizer, MAE)
    with pytest.raises(UserError, match="has no checkpoints"):
        start_from(begin(MAE), "encoder", tmp_path, MAE)


def test_different_image_statistics_are_reported(tmp_path, capsys):
    saw = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    folder, _ = run_of(tmp_path, MAE | {"objective": MAE["objective"] | saw})
    config = config_of("classify", dict(positions="learned"), **saw)
    start_from(begin(config), "encoder", folder, config)
    assert not capsys.readouterr().err
    config["objective"]["std"] = (0.2, 0.2, 0.2)
    start_from(begin(config), "encoder", folder, config)
    assert "objective.std of" in (said := capsys.readouterr().err)
    assert "is (0.5, 0.5, 0.5), this run's is (0.2, 0.2, 0.2)" in said
    assert "mean" not in said
