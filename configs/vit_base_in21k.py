r"""Supervised pretraining of ViT-B/16 on ImageNet-21k for 90 epochs (Dosovitskiy et al., 2020).

    mim-jax train --config=configs/vit_base_in21k.py

Differences from the paper: no dropout (table 3: 0.1), and a linear head instead of one with a
hidden layer (section 3.1). Not yet run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 4096  # table 3, like all values without a comment
    config.epochs = 90.0

    config.model = dict(size="B", patch=16, positions="learned")
    config.objective = dict(name="classify", pooling="cls", head_std=0.0, mean=(0.5,), std=(0.5,))
    config.data = dict(
        name="folder:/data/imagenet21k",
        labels="folder",
        size=224,
        crop_scale=(0.05, 1.0),  # its code
    )
    config.optimizer = dict(
        name="adamw",
        lr=1e-3,
        b1=0.9,
        b2=0.999,
        weight_decay=0.03,
        warmup_steps=10_000,
        min_lr=1e-5,  # google-research/vision_transformer, issue 2
        schedule="mmseg",  # table 3: linear decay
        clip_norm=1.0,
    )

    config.evaluate = dict(every_epochs=1.0)
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=1.0)
    return config
