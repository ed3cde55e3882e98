"""Configs: every file in configs/ is whole, and mistakes are told in a sentence."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mim_jax import UserError, recipe
from mim_jax.train import initialize

CONFIGS = sorted(Path("configs").glob("*.py"))
EMOJI = "configs/mae_emoji.py"
PARAMETERS = {  # at full size: of the reference where it has the model
    "beit_base": 92_089_856,
    "beit_base_ablation_all": 92_089_856,
    "beit_base_ablation_all_unmasked": 92_089_856,
    "beit_base_ablation_baseline": 92_089_856,
    "beit_base_ablation_pixels": 86_380_800,
    "beit_base_ablation_pixels_random": 86_380_800,
    "beit_base_ablation_random": 92_089_856,
    "beit_base_cifar10": 85_797_130,
    "beit_base_cifar100": 85_866_340,
    "beit_base_finetune": 86_558_440,
    "beit_base_finetune_384": 86_850_280,
    "beit_base_in22k": 91_965_776,
    "beit_base_in22k_finetune": 102_557_713,
    "beit_base_linear": 18_444_000,
    "beit_base_relative": 91_965_776,
    "beit_emoji": 1_282_576,
    "beit_large": 311_674_880,
    "beit_large_finetune": 304_302_056,
    "beit_large_finetune_384": 304_691_176,
    "beit_large_finetune_512": 305_674_728,
    "beit_large_in22k": 311_534_016,
    "beit_large_in22k_finetune": 325_792_593,
    "cifar10_finetune": 1_205_898,
    "cifar10_scratch": 1_205_898,
    "dvae": 97_616_006,
    "dvae_cifar10": 682_608,
    "dvae_emoji": 2_142_144,
    "emoji_finetune": 1_224_201,
    "emoji_linear": 1_161,
    "emoji_scratch": 1_224_201,
    "mae_base": 111_655_680,
    "mae_base_finetune": 86_567_656,
    "mae_base_linear": 769_000,
    "mae_cifar10": 1_437_296,
    "mae_emoji": 1_469_696,
    "mae_huge": 656_613_964,
    "mae_huge_finetune": 632_045_800,
    "mae_huge_finetune_448": 633_028_840,
    "mae_huge_linear": 1_281_000,
    "mae_large": 329_239_296,
    "mae_large_800": 329_239_296,
    "mae_large_800_pixels": 329_239_296,
    "mae_large_finetune": 304_326_632,
    "mae_large_linear": 1_025_000,
    "mae_large_partial": 13_623_272,
    "simmim_base": 86_256_720,
    "vit_base_cifar10": 86_098_186,
    "vit_base_cifar100_scratch": 85_875_556,
    "vit_base_finetune": 86_859_496,
    "vit_base_in21k": 102_594_385,
    "vit_base_scratch": 86_416_360,
    "vit_hybrid_base": 114_685_841,
    "vit_large_scratch": 304_124_904,
}


LABELS = {"cifar10": 10, "cifar100": 100, "emoji": 9, "imagenet2012": 1000}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_built_at_full_size(path, monkeypatch):
    nowhere = ["data.name=emoji", "data.evaluation_split=validation", "data.data_dir="]
    nowhere += ["data.labels=", "init_from.tokenizer=random", "steps=20000"]
    config = recipe.load(str(path), nowhere)
    make, labels = recipe.data.make, LABELS.get(recipe.load(str(path)).data.name, 21_841)
    there = lambda **settings: make(**settings)._replace(num_labels=labels)  # noqa: E731
    monkeypatch.setattr(recipe.data, "make", there)
    run = recipe.build(config)
    state = jax.eval_shape(
        lambda: initialize(run.objective, run.optimizer, run.example, config.seed)
    )
    assert sum(x.size for x in jax.tree.leaves(state.params)) == PARAMETERS[path.stem]
    warms = config.optimizer.warmup_steps or config.optimizer.warmup_epochs
    assert float(run.schedule(0)) == pytest.approx(0 if warms else config.optimizer.lr)
    assert path.read_text().startswith('r"""'), "a config opens with what it is and how it is run"


def test_the_recipe_of_mae_base():
    """Table 8 of the paper and the official code, at ImageNet's size."""
    config = recipe.load("configs/mae_base.py")
    steps_per_epoch = 1_281_167 / config.batch_size
    assert config.optimizer.base_lr * config.batch_size / 256 == pytest.approx(2.4e-3)
    assert recipe.in_steps(config.optimizer, "warmup", steps_per_epoch) == 12_511
    assert int(config.epochs * steps_per_epoch) == 500_455
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.95)
    assert config.data.crop_scale == (0.2, 1.0)


def test_the_recipe_of_dalles_tokenizer():
    """Appendix A.2: the rate falls for 1.2 of 3 million updates."""
    config = recipe.load("configs/dvae.py", ["data.name=emoji"])
    run = recipe.build(config)
    rates = [float(run.schedule(step)) for step in (0, 600_000, 1_200_000, 2_999_999)]
    assert rates == pytest.approx([1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6])
    assert (run.steps, config.batch_size, config.ema) == (3_000_000, 512, 0.999)


def test_overrides_have_the_last_word():
    config = recipe.load(EMOJI, ["optimizer.b2=0.99", "data.size=(32,64)", "data.flip=false"])
    assert config.optimizer.b2 == 0.99
    assert config.data.size == (32, 64)
    assert config.data.flip is False
    smoke = recipe.load(EMOJI, ["steps=7", "seed=3"], smoke=True)
    assert (smoke.steps, smoke.seed, smoke.model.width) == (7, 3, 64)


def test_a_rehearsal_keeps_as_many_tokens_as_patches():
    config = recipe.load(EMOJI, ["data.size=224", "data.tokenizer_size=112"])
    recipe.shrink(config)
    assert config.data.size == (32, 32)
    assert config.data.tokenizer_size == (16, 16)
    example = recipe.build(config).example
    assert example["tokenizer_image"].shape == (1, 16, 16, 3)


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    assert recipe.load(EMOJI, ["optimizer.weight_decay=0"]).optimizer.weight_decay == 0.0
    assert recipe.load(EMOJI, ["data.crop_scale=0.5,1"]).data.crop_scale == (0.5, 1)
    assert recipe.load(EMOJI, ["log.wandb=2026"]).log.wandb == "2026"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.bas_lr=1", "no key optimizer.bas_lr: did you mean optimizer.base_lr?"),
        ("base_lr=1", "no key base_lr: did you mean optimizer.base_lr?"),
        ("objective.decoder_dept=1", "did you mean objective.decoder_depth?"),
        ("modell.width=1", "did you mean model.width?"),
        ("nothing.like.it=1", "the config has no key nothing.like.it"),
        ("batch_size=many", "batch_size = 'many' must be int"),
        ("batch_size=1.5", "batch_size = 1.5 must be int"),
        ("data.flip=3", "data.flip = 3 must be bool"),
        ("data.size=large", "data.size = 'large' must be int | tuple"),
        ("data.crop_scale=0.5", "data.crop_scale = 0.5 must be tuple"),
        ("steps=True", "steps = True must be int"),
        ("model=3", "model is a block: say model.d"),
        ("steps", "--config.steps has no value"),
        ("model.size=XL", "model.size = 'XL' is unknown; there are B, H, L, S, Ti"),
        ("objective.name=mea", "objective.name = 'mea' is unknown; there are beit, classify"),
        ("optimizer.name=adam", "optimizer.name = 'adam' is unknown; there are adamw"),
    ],
)
def test_overrides_that_cannot_be(override, sentence):
    with pytest.raises(UserError) as error:
        recipe.load(EMOJI, [override])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("batch_size=60", "batch_size = 60 cannot be split over 8 devices"),
        ("accumulate=3", "make it a multiple of 24"),
        ("steps=0", "must say epochs or steps"),
        ("steps=50", "a warm-up of 100 steps does not end before step 50"),
        ("data.name=imagenet", "there is no data set 'imagenet'"),
        ("data.name=mnist", "'mnist' is not prepared in"),
        ("data.split=test", "'emoji' has no split 'test'; it has train, validation"),
        ("data.split=train[:0]", "'train[:0]' of data set 'emoji' is empty"),
        ("data.interpolation=cubic", "there are bicubic, bilinear"),
        ("data.resizer=cv2", "data.resizer = 'cv2' is unknown; there are pillow, simd"),
        ("data.channels=2", "data.channels = 2, but the images of emoji have 3"),
        ("model.dtype=bf16", "model.dtype = 'bf16' is unknown; there are auto, bfloat16, float32"),
        ("optimizer.min_lr=1", "optimizer.min_lr = 1 lies above the rate itself"),
        ("data.name=configs", "there is no data set 'configs': say folder:configs, if this path"),
        ("data.name=./configs", "'./configs' names no data set: say folder:./configs, if this"),
        ("data.name=folder:", "data.name = 'folder:' has no path"),
        ("data.crop_fraction=0", "data.crop_fraction = 0.0"),
        ("data.randaugment=9,", "data.randaugment = (9,): say a magnitude"),
        ("data.color_jitter=-1", "data.color_jitter = -1.0"),
        ("data.crop_scale=1,", "data.crop_scale = (1,)"),
    ],
)
def test_configs_that_cannot_be_run(override, sentence):
    with pytest.raises(UserError) as error:
        recipe.build(recipe.load(EMOJI, [override]))
    assert sentence in str(error.value)


def test_config_files_that_cannot_be(tmp_path):
    with pytest.raises(
        UserError, match=r"no config file configs/mae_emojy.py: did you mean .*emoji"
    ):
        recipe.load("configs/mae_emojy.py")

    def load(body):
        path = tmp_path / "configs" / "mine.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(body)
        return recipe.load(str(path))

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text(Path(EMOJI).read_text())
    body = (
        "from configs import {}\ndef get_config():\n    c = {}.get_config()\n    {}\n    return c\n"
    )
    assert load(body.format("mae_emoji", "mae_emoji", "c.model.width = 96")).model.width == 96
    for line, sentence in [
        ("c.model.widht = 96", "no key model.widht: did you mean model.width?"),
        ("c.optimizer.rate = 1.0", "no key optimizer.rate"),
        ("del c.data.size", "the config must say data.size"),
        ("del c.batch_size", "the config must say batch_size"),
        ("del c.objective", "the config has no block 'objective'"),
        ("del c.objective.name", "the config must say objective.name"),
        ("c.model = dict(width='wide')", "model.width = 'wide' must be int"),
        ("del c.model\n    c.model = 3", "model is a block"),
    ]:
        with pytest.raises(UserError) as error:
            load(body.format("mae_emoji", "mae_emoji", line))
        assert f"{tmp_path}/configs/mine.py: " in str(error.value)
        assert sentence in str(error.value)
    for body in ("", "def get_config(): return 3"):
        with pytest.raises(UserError, match=r"get_config\(\)"):
            load(body)


def test_trajectories_differ_by_what_is_learned_alone():
    def trajectory(*overrides):
        config = recipe.load(EMOJI, overrides)
        return recipe.trajectory(config, recipe.build(config).data)

    same = trajectory()
    for override in ("log.every_steps=1", "accumulate=2", "data.threads=3", "model.remat=full"):
        assert trajectory(override) == same
    for override in ("seed=1", "optimizer.b2=0.9", "model.width=96", "data.split=train[:50]"):
        assert trajectory(override) != same


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=0", "1 or more"),
        ("batch_size=-16", "1 or more"),
        ("accumulate=0", "1 or more"),
        ("steps=-5", "0 or more"),
        ("seed=-1", "0 to 4294967295"),
        ("ema=1", "0 or more, and less than 1"),
        ("save.keep=0", "1 or more"),
        ("evaluate.limit=-5", "0 or more"),
        ("probe.images=-5", "0 or more"),
        ("pictures.count=-5", "0 or more"),
        ("data.threads=-1", "0 or more"),
        ("data.channels=0", "1 or more"),
        ("data.size=0", "1 or more"),
        ("data.size=(32,-32)", "1 or more"),
        ("data.size=()", "one number, or two: of rows and of columns"),
        ("data.size=(32,32,3)", "one number, or two: of rows and of columns"),
        ("data.fill=(300,-1,0)", "0 to 255"),
        ("model.patch=0", "1 or more"),
        ("model.width=-64", "0 or more"),
        ("model.drop_path=1.0", "0 or more, and less than 1"),
        ("objective.std=(0,)", "more than 0"),
        ("objective.mask_ratio=1.5", "0 to 1"),
        ("objective.decoder_width=0", "1 or more"),
        ("optimizer.base_lr=-1", "0 or more"),
        ("optimizer.base_lr=1e999", "0 or more"),
        ("optimizer.b1=1", "0 or more, and less than 1"),
        ("optimizer.b2=1.5", "0 or more, and less than 1"),
        ("optimizer.layer_decay=2", "more than 0, and 1 at most"),
        ("optimizer.layer_decay=0", "more than 0, and 1 at most"),
        ("optimizer.clip_norm=-1", "0 or more"),
        ("optimizer.weight_decay=-1", "0 or more"),
    ],
)
def test_numbers_out_of_their_range(override, words):
    key = override.split("=")[0]
    with pytest.raises(UserError, match=rf"^{re.escape(key)} = .*: say {re.escape(words)}\.$"):
        recipe.load(EMOJI, [override])


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("emoji_scratch", "objective.mixup=-0.5", "objective.mixup = -0.5: say 0 or more."),
        ("emoji_scratch", "objective.smoothing=2", "objective.smoothing = 2.0: say 0 to 1."),
        ("emoji_scratch", "objective.erasing=3", "objective.erasing = 3.0: say 0 to 1."),
        ("emoji_scratch", "objective.batch_norm=-2", "objective.batch_norm = -2: say 0 or more."),
        ("dvae_emoji", "objective.window=0", "objective.window = 0: say 1 or more."),
        ("dvae_emoji", "tokenizer.vocabulary=0", "tokenizer.vocabulary = 0: say 1 or more."),
        ("emoji_linear", "optimizer.momentum=1", "say 0 or more, and less than 1."),
    ],
)
def test_numbers_of_other_objectives_out_of_their_range(name, override, sentence):
    with pytest.raises(UserError) as error:
        recipe.load(f"configs/{name}.py", [override])
    assert str(error.value).endswith(sentence)


def test_ranges_are_of_keys_that_there_are():
    there = set().union(*(recipe.flatten(recipe.load(str(path))) for path in CONFIGS))
    assert {*recipe.RANGES, *recipe.PAIRS} <= there


def test_a_mean_may_be_negative_and_blocks_be_all():
    config = recipe.load("configs/emoji_finetune.py", ["objective.mean=(-0.5,0,1)"])
    assert config.objective.mean == (-0.5, 0, 1)
    assert config.objective.tuned_blocks == -1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import nothing_such", "line 1: ModuleNotFoundError: No module named 'nothing_such'"),
        ("def get_config():\n    return name_", "line 2: NameError: name 'name_' is not defined"),
        ("# A README\nwith words", "line 2: SyntaxError"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        recipe.load(str(path))
    assert f"{path}, {sentence}" in str(error.value)


def test_a_run_whose_config_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {')
    with pytest.raises(UserError, match=r"config\.json is damaged: "):
        recipe.load(str(tmp_path))


def test_a_config_is_of_one_objective():
    with pytest.raises(UserError, match=r"it is for mae; for classify write a config of its own"):
        recipe.load(EMOJI, ["objective.name=classify"])


def test_a_tokenizer_is_asked_for():
    with pytest.raises(UserError, match=r"beit needs a trained tokenizer: say --config\.init_from"):
        recipe.build(recipe.load("configs/beit_emoji.py", ["init_from.tokenizer="]))
    recipe.build(recipe.load("configs/beit_base_ablation_pixels.py", ["data.name=emoji"]))


def test_the_rate_is_absolute_or_for_256_images():
    def peak(*overrides):
        run = recipe.build(recipe.load(EMOJI, ["optimizer.warmup_steps=10", *overrides]))
        return float(run.schedule(10)), run.story

    rate, story = peak("optimizer.base_lr=1e-3", "batch_size=64")
    assert rate == pytest.approx(2.5e-4)
    assert "lr = base_lr x batch / 256 = 0.001 x 64 / 256 = 0.00025" in story
    rate, story = peak("optimizer.lr=3e-4", "batch_size=64")
    assert rate == pytest.approx(3e-4)
    assert "lr = 0.0003" in story
    with pytest.raises(UserError, match=r"must say optimizer\.base_lr or optimizer\.lr"):
        peak("optimizer.base_lr=0")


def test_gradients_are_clipped_to_a_norm():
    run = recipe.build(recipe.load(EMOJI, ["optimizer.clip_norm=0.5", "optimizer.weight_decay=0"]))
    params = {"kernel": jnp.ones((2, 2))}
    first = run.optimizer.init(params)

    def after(value):
        return run.optimizer.update({"kernel": jnp.full((2, 2), value)}, first, params)[1]

    for large, small in zip(*(jax.tree.leaves(after(g)) for g in (100.0, 0.25)), strict=True):
        assert jnp.allclose(large, small)  # a norm of 200 becomes one of 0.5
