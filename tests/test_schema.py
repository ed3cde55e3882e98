"""Config keys: defaults, overrides, ranges, rehearsals and trajectories."""

import re

import pytest

from mim_jax import UserError, config_files, recipe, schema

CONFIGS = config_files.files()
EMOJI = "configs/mae_emoji.py"


def test_overrides_take_precedence():
    config = schema.load(EMOJI, ["optimizer.b2=0.99", "data.size=(32,64)", "data.flip=false"])
    assert config.optimizer.b2 == 0.99
    assert config.data.size == (32, 64)
    assert config.data.flip is False
    smoke = schema.load(EMOJI, ["steps=7", "seed=3"], smoke=True)
    assert (smoke.steps, smoke.seed, smoke.model.width) == (7, 3, 64)


def test_a_rehearsal_keeps_as_many_tokens_as_patches():
    config = schema.load(EMOJI, ["data.size=224", "data.tokenizer_size=112"])
    schema.shrink(config)
    assert config.data.size == (32, 32)
    assert config.data.tokenizer_size == (16, 16)
    example = recipe.build(config).example
    assert example["tokenizer_image"].shape == (1, 16, 16, 3)


def test_integers_are_accepted_as_floats():
    assert schema.load(EMOJI, ["optimizer.weight_decay=0"]).optimizer.weight_decay == 0.0
    assert schema.load(EMOJI, ["data.crop_scale=0.5,1"]).data.crop_scale == (0.5, 1)
    for text in ("red,nir , B02", "('red', 'nir', 'B02')"):
        assert schema.load(EMOJI, [f"data.bands={text}"]).data.bands == ("red", "nir", "B02")
    assert schema.load(EMOJI, ["log.wandb=2026"]).log.wandb == "2026"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.bas_lr=1", "no key optimizer.bas_lr: did you mean optimizer.base_lr?"),
        ("base_lr=1", "no key base_lr: did you mean optimizer.base_lr?"),
        ("objective.decoder_dept=1", "did you mean objective.decoder_depth?"),
        ("modell.width=1", "did you mean model.width?"),
        ("nothing.like.it=1", "no key nothing.like.it: `mim-jax keys --config=CONFIG` lists them"),
        ("batch_size=many", "batch_size = 'many' must be int"),
        ("batch_size=1.5", "batch_size = 1.5 must be int"),
        ("data.flip=3", "data.flip = 3 must be bool"),
        ("data.size=large", "data.size = 'large' must be int | tuple"),
        ("data.crop_scale=0.5", "data.crop_scale = 0.5 must be tuple"),
        ("data.crop_scale=a,b", "data.crop_scale = ('a', 'b') must be numbers"),
        ("objective.mean=a,b,c", "objective.mean = ('a', 'b', 'c') must be numbers"),
        ("steps=True", "steps = True must be int"),
        ("model=3", "model is a block: set model.size"),
        ("steps", "--config.steps has no value"),
        ("model.size=XL", "model.size = 'XL' is unknown; did you mean L? Choose one of B,"),
        ("objective.name=mea", "objective.name = 'mea' is unknown; choose one of beit, classify"),
        ("optimizer.name=adam", "'adam' is unknown; did you mean adamw? Choose one of adamw, "),
    ],
)
def test_invalid_overrides(override, sentence):
    with pytest.raises(UserError) as error:
        schema.load(EMOJI, [override])
    assert sentence in str(error.value)


def test_a_size_that_has_no_effect_is_refused():
    with pytest.raises(UserError, match=r"model\.size = 'B' has no effect.*model\.width"):
        schema.load(EMOJI, ["model.size=B"])
    derived = [f"model.{name}=0" for name in ("width", "depth", "heads")]
    assert schema.load(EMOJI, ["model.size=B", *derived]).model.size == "B"
    schema.load("mae_base", ["model.size=L"])
    schema.load(EMOJI, ["model.size=B"], smoke=True)


def test_trajectories_differ_only_by_what_is_learned():
    def trajectory(*overrides):
        config = schema.load(EMOJI, overrides)
        return schema.trajectory(config, recipe.build(config).data.fingerprint)

    same = trajectory()
    for override in ("log.every_steps=1", "accumulate=2", "data.threads=3", "model.remat=full"):
        assert trajectory(override) == same
    for override in ("seed=1", "optimizer.b2=0.9", "model.width=96", "data.split=train[:50]"):
        assert trajectory(override) != same


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=0", "at least 1 and at most 16777216"),
        ("batch_size=-16", "at least 1 and at most 16777216"),
        ("accumulate=0", "at least 1"),
        ("steps=-5", "at least 0"),
        ("seed=-1", "at least 0 and at most 4294967295"),
        ("ema=1", "at least 0 and less than 1"),
        ("save.keep=0", "at least 1"),
        ("evaluate.limit=-5", "at least 0"),
        ("probe.images=-5", "at least 0"),
        ("pictures.count=-5", "at least 0"),
        ("data.threads=-1", "at least 0"),
        ("data.channels=0", "at least 1"),
        ("data.size=0", "at least 1 and at most 65536"),
        ("data.size=(32,-32)", "at least 1 and at most 65536"),
        ("data.size=()", "one number, or two: (rows, columns)"),
        ("data.size=(32,32,3)", "one number, or two: (rows, columns)"),
        ("data.fill=(300,-1,0)", "at least 0 and at most 255"),
        ("model.patch=0", "at least 1"),
        ("model.width=-64", "at least 0 and at most 1048576"),
        ("model.drop_path=1.0", "at least 0 and less than 1"),
        ("objective.std=(0,)", "greater than 0"),
        ("objective.mask_ratio=1.5", "at least 0 and at most 1"),
        ("objective.decoder_width=0", "at least 1 and at most 1048576"),
        ("optimizer.base_lr=-1", "at least 0"),
        ("optimizer.base_lr=1e999", "at least 0"),
        ("optimizer.b1=1", "at least 0 and less than 1"),
        ("optimizer.b2=1.5", "at least 0 and less than 1"),
        ("optimizer.layer_decay=2", "greater than 0 and at most 1"),
        ("optimizer.layer_decay=0", "greater than 0 and at most 1"),
        ("optimizer.clip_norm=-1", "at least 0"),
        ("optimizer.weight_decay=-1", "at least 0"),
    ],
)
def test_values_out_of_range(override, words):
    key = override.split("=")[0]
    with pytest.raises(UserError, match=rf"^{re.escape(key)} = .* must be {re.escape(words)}\.$"):
        schema.load(EMOJI, [override])


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("emoji_scratch", "objective.mixup=-0.5", "objective.mixup = -0.5 must be at least 0."),
        (
            "emoji_scratch",
            "objective.smoothing=2",
            "objective.smoothing = 2.0 must be at least 0 and at most 1.",
        ),
        (
            "emoji_scratch",
            "objective.erasing=3",
            "objective.erasing = 3.0 must be at least 0 and at most 1.",
        ),
        (
            "emoji_scratch",
            "objective.batch_norm=-2",
            "objective.batch_norm = -2 must be at least 0.",
        ),
        ("dvae_emoji", "objective.window=0", "objective.window = 0 must be at least 1."),
        (
            "dvae_emoji",
            "tokenizer.vocabulary=0",
            "tokenizer.vocabulary = 0 must be at least 1 and at most 1048576.",
        ),
        ("emoji_linear", "optimizer.momentum=1", "must be at least 0 and less than 1."),
    ],
)
def test_values_of_other_objectives_out_of_range(name, override, sentence):
    with pytest.raises(UserError) as error:
        schema.load(f"configs/{name}.py", [override])
    assert str(error.value).endswith(sentence)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_has_a_meaning(path):
    config = schema.load(str(path))
    keys = schema.keys_of(config)
    assert keys.keys() == schema.flatten(config).keys()
    assert all(key.meaning for key in keys.values())


def test_negative_means_and_all_blocks_are_accepted():
    config = schema.load("configs/emoji_finetune.py", ["objective.mean=(-0.5,0,1)"])
    assert config.objective.mean == (-0.5, 0, 1)
    assert config.objective.tuned_blocks == -1


def test_a_damaged_config_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {')
    with pytest.raises(UserError, match=r"config\.json is damaged: "):
        schema.load(str(tmp_path))


def test_a_hugging_face_folder_is_not_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae"}')
    with pytest.raises(
        UserError,
        match=rf"^{re.escape(str(tmp_path))} is a Hugging Face folder, .* convert it first",
    ):
        schema.load(str(tmp_path))


def test_a_config_is_of_one_objective():
    with pytest.raises(
        UserError, match=r"for mae, and classify has no key objective\.decoder_depth"
    ):
        schema.load(EMOJI, ["objective.name=classify"])
    with pytest.raises(UserError, match=r"did you mean adamw\? Choose one of adamw, lars, sgd\.$"):
        schema.load(EMOJI, ["optimizer.name=adam"])


@pytest.mark.parametrize(
    ("override", "range_"),
    [
        ("steps=99999999999", "less than 4294967296"),
        ("batch_size=99999999999", "at least 1 and at most 16777216"),
        ("model.depth=10000000", "at least 0 and at most 1000"),
        ("model.width=10000000", "at least 0 and at most 1048576"),
        ("objective.decoder_depth=10000000", "at least 1 and at most 1000"),
        ("data.size=1000000000", "at least 1 and at most 65536"),
    ],
)
def test_huge_networks_and_images_are_refused(override, range_):
    """Their arrays do not fit into memory, or tracing them does not end."""
    with pytest.raises(UserError, match=rf"must be {range_}\.$"):
        schema.load(EMOJI, [override])


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"width": "big"}},
        {"model": {"patch": [4, 4, 4]}},
        {"model": {"depth": 10**9}},
        {"model": [1]},
        {"data": {"size": None}},
        {"data": {"bands": 3}},
        {"objective": "mae"},
    ],
)
def test_recorded_networks_of_other_types_are_refused(change):
    config = {"objective": {"name": "other"}, "data": {"size": 8}, "model": {"width": 8}}
    schema.require_networks(config, "model")
    with pytest.raises(UserError, match=next(iter(change))):
        schema.require_networks(config | change, "model")
    with pytest.raises(UserError, match="no block 'data'"):
        schema.require_networks({"objective": {}}, "model")
    with pytest.raises(UserError, match="no block 'tokenizer'"):
        schema.require_networks(config, "tokenizer")
