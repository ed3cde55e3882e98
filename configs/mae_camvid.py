r"""A small MAE on 96 x 96 crops of the 367 training images of CamVid: minutes on a CPU.

    mim-jax train --config=configs/mae_camvid.py

configs/camvid_tiny.py starts from this run. docs/segmentation.md describes the data set; only its
images are used. No value was tuned.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 64
    config.epochs = 100.0

    config.model = dict(width=128, depth=6, heads=4, patch=8)
    config.objective = dict(
        name="mae",
        mask_ratio=0.75,  # He et al., 2021, as the crop's scale and the optimizer
        decoder_width=64,
        decoder_depth=2,
        decoder_heads=4,
    )
    config.data = dict(name="folder:/data/camvid/images", size=96, crop_scale=(0.2, 1.0))
    config.optimizer = dict(
        name="adamw", base_lr=2e-3, b1=0.9, b2=0.95, weight_decay=0.05, warmup_epochs=10.0
    )
    config.evaluate = dict(every_epochs=20.0)
    config.pictures = dict(every_epochs=50.0)
    config.save = dict(every_epochs=20.0)
    return config
