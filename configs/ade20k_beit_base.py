r"""Segmentation of ADE20K by BEiT's ViT-B/16 and UPerNet, 160,000 steps of 512 x 512 crops.

Requires a run of configs/beit_base.py, and ADE20K's release (docs/segmentation.md).

    mim-jax train --config=configs/ade20k_beit_base.py

The paper reports 44.9 % mean IoU after 300 epochs of pretraining (table 5). Not yet run here. The
dropout and the auxiliary decoder are the defaults (_base_/models/upernet_beit.py). Multi-scale:

    mim-jax evaluate --config=runs/ade20k_beit_base --config.objective.mirror=true \
        --config.objective.scales="(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)"
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # upernet_beit_base_12_512_slide_160k_ade20k_pt.py, like all values below
    config.batch_size = 16
    config.steps = 160_000
    config.init_from = dict(encoder="runs/beit_base")

    config.model = dict(
        size="B",
        patch=16,
        positions="learned",  # as configs/beit_base.py
        key_bias=False,
        drop_path=0.1,
        initializer="beit",
    )
    config.objective = dict(
        name="segment",
        decoder="upernet",
        layers=(3, 5, 7, 11),
        channels=768,
        batch_norm=16,  # SyncBN over 8 devices of 2 images
        stride=2 / 3,  # 341 of 512, and 426 of 640
    )
    config.data = dict(
        name="folder:/data/ADEChallengeData2016",
        size=512,
        short_side=512,  # _base_/datasets/ade20k.py, as all of this block
        long_side=2048,
        scale_range=(0.5, 2.0),
        class_share=0.75,
        interpolation="bilinear",
        evaluation_interpolation="bilinear",
    )
    config.optimizer = dict(
        name="adamw",
        lr=7e-4,
        schedule="mmseg",
        warmup_steps=1500,
        layer_decay=0.65,
        weight_decay=0.05,
    )
    config.evaluate = dict(every_steps=16_000)  # _base_/schedules/schedule_160k.py
    config.pictures = dict(every_steps=16_000)
    config.save = dict(every_steps=4_000)
    return config
