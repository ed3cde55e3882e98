r"""Linear probe of MAE's ViT-B/16 on ImageNet-1k for 90 epochs (He et al., 2021, table 10).

Requires a run of configs/mae_base.py.

    mim-jax train --config=configs/mae_base_linear.py

The paper reports 68.0 % top-1, the released code 67.8 %. Not yet run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 16384  # table 10
    config.epochs = 90.0  # table 10
    config.init_from = dict(encoder="runs/mae_base")

    config.model = dict(size="B", patch=16)
    config.objective = dict(
        name="classify",
        pooling="cls",  # main_linprobe.py, like all values below
        tuned_blocks=0.0,
        batch_norm=512,  # the official code: the images of a device
        head_std=0.01,
    )
    config.data = dict(name="imagenet2012", size=224, crop_scale=(0.08, 1.0), clip_crop=True)
    config.optimizer = dict(
        name="lars",
        base_lr=0.1,  # table 10
        momentum=0.9,  # table 10
        weight_decay=0.0,  # table 10
        warmup_epochs=10.0,  # table 10
    )

    config.evaluate = dict(every_epochs=1.0)
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=1.0)
    return config
