r"""Segmentation of CamVid by a small ViT with UPerNet, on 96 x 96 crops: minutes on a CPU.

Requires a run of configs/mae_camvid.py.

    mim-jax train --config=configs/camvid_tiny.py
    mim-jax train --config=configs/camvid_tiny.py --config.init_from.encoder= \
        --workdir=runs/camvid_scratch

The second command is the same recipe from scratch. CamVid (Brostow et al., 2009), 367 training and
101 validation images, must be prepared as docs/segmentation.md describes. No value was tuned. The
results are in docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 8
    config.steps = 200
    config.init_from = dict(encoder="runs/mae_camvid")

    config.model = dict(  # as configs/mae_camvid.py
        width=128,
        depth=6,
        heads=4,
        patch=8,
        positions="learned",
        drop_path=0.1,
        initializer="timm",
    )
    config.objective = dict(
        name="segment",
        decoder="upernet",
        channels=32,
        auxiliary_channels=32,
        batch_norm=8,
        average="labeled",
    )
    config.data = dict(
        name="folder:/data/camvid",
        size=96,
        short_side=120,  # a third of CamVid's 360
        interpolation="bilinear",
        evaluation_interpolation="bilinear",
    )
    config.optimizer = dict(
        name="adamw",
        lr=1e-3,
        weight_decay=0.05,
        undecayed=("cls_token", "positions"),
        warmup_steps=20,
        schedule="mmseg",
    )
    config.evaluate = dict(every_steps=100)
    config.pictures = dict(every_steps=100)
    config.save = dict(every_steps=100)
    return config
