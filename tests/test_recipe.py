"""Building runs: every config at full size, and configs that cannot be run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mim_jax import UserError, config_files, recipe, schema
from mim_jax.train import initialize

CONFIGS = config_files.files()
EMOJI = "configs/mae_emoji.py"
PARAMETERS = {  # at full size: of the reference where it has the model
    "ade20k_beit_base": 163_277_612,
    "ade20k_beit_base_intermediate": 163_407_980,
    "ade20k_beit_large": 441_271_084,
    "ade20k_beit_base_setr": 95_435_096,
    "ade20k_mae_base": 163_858_796,
    "ade20k_mae_large": 441_423_660,
    "beit_base": 92_089_856,
    "beit_base_ablation_all": 92_089_856,
    "beit_base_ablation_all_unmasked": 92_089_856,
    "beit_base_ablation_baseline": 92_089_856,
    "beit_base_ablation_pixels": 86_380_800,
    "beit_base_ablation_pixels_random": 86_380_800,
    "beit_base_ablation_random": 92_089_856,
    "beit_base_cifar10": 85_797_130,
    "beit_base_cifar100": 85_866_340,
    "beit_base_cifar100_intermediate": 85_866_340,
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
    "camvid_tiny": 1_635_606,
    "cifar10_finetune": 1_205_898,
    "cifar10_scratch": 1_205_898,
    "deit_base": 86_567_656,
    "dino_base_cifar100": 85_875_556,
    "dino_base_finetune": 86_567_656,
    "dvae": 97_616_006,
    "dvae_cifar10": 682_608,
    "dvae_emoji": 2_142_144,
    "emoji_finetune": 1_224_201,
    "emoji_linear": 1_161,
    "emoji_scratch": 1_224_201,
    "mae_base": 111_655_680,
    "mae_base_finetune": 86_567_656,
    "mae_base_linear": 769_000,
    "mae_camvid": 1_335_616,
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
    "moco_base_cifar100": 85_875_556,
    "moco_base_finetune": 86_567_656,
    "simmim_base": 86_256_720,
    "vit_base_cifar10": 86_098_186,
    "vit_base_cifar100_scratch": 85_866_340,
    "vit_base_finetune": 86_859_496,
    "vit_base_in1k": 86_567_656,
    "vit_base_in1k_cifar100": 86_167_396,
    "vit_base_in1k_finetune": 86_859_496,
    "vit_base_in21k": 102_594_385,
    "vit_base_scratch": 86_416_360,
    "vit_hybrid_base": 114_685_841,
    "vit_large_finetune": 304_715_752,
    "vit_large_in1k": 304_326_632,
    "vit_large_in1k_finetune": 304_715_752,
    "vit_large_in21k": 325_688_657,
    "vit_large_scratch": 304_124_904,
}


CLASSES = {"ade20k": 150, "camvid": 11}  # of pixels
LABELS = {"cifar10": 10, "cifar100": 100, "emoji": 9, "imagenet2012": 1000}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_built_at_full_size(path, monkeypatch):
    nowhere = ["data.name=emoji", "data.evaluation_split=validation", "data.data_dir="]
    nowhere += ["data.labels=", "init_from.tokenizer=random", "steps=20000"]
    config = schema.load(str(path), nowhere)
    make, labels = recipe.data.make, LABELS.get(schema.load(str(path)).data.name, 21_841)

    def there(**settings):
        data = dataclasses.replace(make(**settings), num_labels=labels)
        if not data.segmentation_classes:
            return data
        names = tuple(map(str, range(CLASSES[path.stem.split("_")[0]])))
        classes = data.train.classes._replace(names=names, colors=((0, 0, 0),) * len(names))
        return dataclasses.replace(data, train=data.train._replace(classes=classes))

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
    config = schema.load("configs/mae_base.py")
    steps_per_epoch = 1_281_167 / config.batch_size
    assert config.optimizer.base_lr * config.batch_size / 256 == pytest.approx(2.4e-3)
    assert recipe.in_steps(config.optimizer, "warmup", steps_per_epoch) == 12_511
    assert int(config.epochs * steps_per_epoch) == 500_455
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.95)
    assert config.data.crop_scale == (0.2, 1.0)


def test_the_recipe_of_dalles_tokenizer():
    """Appendix A.2: the rate falls for 1.2 of 3 million updates."""
    config = schema.load("configs/dvae.py", ["data.name=emoji"])
    run = recipe.build(config)
    rates = [float(run.schedule(step)) for step in (0, 600_000, 1_200_000, 2_999_999)]
    assert rates == pytest.approx([1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6])
    assert (run.steps, config.batch_size, config.ema) == (3_000_000, 512, 0.999)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("batch_size=60", "batch_size = 60 cannot be split over 8 devices"),
        ("accumulate=3", "make it a multiple of 24"),
        ("steps=0", "must set epochs or steps"),
        ("data.name=imagenet", "there is no data set 'imagenet'"),
        ("data.name=mnist", "'mnist' is not prepared in"),
        ("data.split=test", "'emoji' has no split 'test'; it has train, validation"),
        ("data.split=train[:0]", "'train[:0]' of data set 'emoji' is empty"),
        ("data.interpolation=cubic", "did you mean bicubic? Choose one of bicubic, bilinear"),
        ("data.resizer=cv2", "data.resizer = 'cv2' is unknown; choose one of pillow, simd"),
        ("data.channels=2", "data.channels = 2, but the images of emoji have 3"),
        (
            "model.dtype=bf16",
            "model.dtype = 'bf16' is unknown; did you mean bfloat16? Choose one of auto,",
        ),
        ("optimizer.min_lr=1", "optimizer.min_lr = 1 must not exceed the learning rate"),
        (
            "data.name=configs",
            "there is no data set 'configs': set data.name to folder:configs for this",
        ),
        (
            "data.name=./configs",
            "'./configs' is not a data set: set it to folder:./configs for this",
        ),
        ("data.name=folder:", "data.name = 'folder:' has no path"),
        ("data.crop_fraction=0", "data.crop_fraction = 0.0"),
        ("data.randaugment=9,", "data.randaugment = (9,) must be a magnitude"),
        ("data.color_jitter=-1", "data.color_jitter = -1.0"),
        ("data.crop_scale=1,", "data.crop_scale = (1,)"),
    ],
)
def test_invalid_configs(override, sentence):
    with pytest.raises(UserError) as error:
        recipe.build(schema.load(EMOJI, [override]))
    assert sentence in str(error.value)


def test_a_missing_tokenizer_is_reported():
    with pytest.raises(UserError, match=r"beit needs a trained tokenizer: set --config\.init_from"):
        recipe.build(schema.load("configs/beit_emoji.py", ["init_from.tokenizer="]))
    recipe.build(schema.load("configs/beit_base_ablation_pixels.py", ["data.name=emoji"]))


def test_the_rate_is_absolute_or_for_256_images():
    def peak(*overrides):
        run = recipe.build(schema.load(EMOJI, ["optimizer.warmup_steps=10", *overrides]))
        return float(run.schedule(10)), run.summary

    rate, summary = peak("optimizer.base_lr=1e-3", "batch_size=64")
    assert rate == pytest.approx(2.5e-4)
    assert "lr = base_lr x batch / 256 = 0.001 x 64 / 256 = 0.00025" in summary
    rate, summary = peak("optimizer.lr=3e-4", "batch_size=64")
    assert rate == pytest.approx(3e-4)
    assert "lr = 0.0003" in summary
    with pytest.raises(UserError, match=r"must set optimizer\.base_lr or optimizer\.lr"):
        peak("optimizer.base_lr=0")


def test_gradients_are_clipped_to_a_norm():
    run = recipe.build(schema.load(EMOJI, ["optimizer.clip_norm=0.5", "optimizer.weight_decay=0"]))
    params = {"kernel": jnp.ones((2, 2))}
    first = run.optimizer.init(params)

    def after(value):
        return run.optimizer.update({"kernel": jnp.full((2, 2), value)}, first, params)[1]

    for large, small in zip(*(jax.tree.leaves(after(g)) for g in (100.0, 0.25)), strict=True):
        assert jnp.allclose(large, small)  # a norm of 200 becomes one of 0.5


def test_a_short_run_of_a_long_recipe_shortens_the_warm_up():
    run = recipe.build(schema.load(EMOJI, ["steps=50"]))
    assert "50, including 5 of warm-up (the recipe's 100 do not fit)" in run.summary
    assert float(run.schedule(5)) == pytest.approx(max(map(run.schedule, range(50))))
    assert "do not fit" not in recipe.build(schema.load(EMOJI, ["steps=101"])).summary
