r"""A small ViT from scratch on 268 labeled emoji: the baseline of emoji_finetune.

    mim-jax train --config=configs/emoji_scratch.py

Accuracy over nine categories on the validation split at the end: 55.1 %, the mean of five seeds;
the most frequent category is 21.4 %. The learning rate is the best of six
(benchmarks/few_labels.py).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 32
    config.steps = 600

    config.model = dict(
        width=128,
        depth=6,
        heads=4,
        patch=8,
        positions="learned",
        drop_path=0.1,
        initializer="timm",
    )
    config.objective = dict(
        name="classify",
        head_std=0.02,
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        mixup_group=32,
        erasing=0.25,
        mean=(0.5,),
        std=(0.5,),
    )
    config.data = dict(
        name="emoji",
        split="train[:20%]",
        size=64,
        crop_scale=(0.6, 1.0),
        flip=True,
        crop_fraction=1.0,
    )
    config.optimizer = dict(
        name="adamw",
        base_lr=4e-3,
        weight_decay=0.05,
        undecayed=("cls_token", "positions"),
        warmup_steps=60,
    )
    config.evaluate = dict(every_steps=100)
    config.pictures = dict(every_steps=300)
    config.save = dict(every_steps=300)
    return config
