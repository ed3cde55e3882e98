r"""SimMIM pretraining of ViT-B/16 on ImageNet-1k for 800 epochs (Xie et al., 2021).

    mim-jax train --config=configs/simmim_base.py

Random squares of 32 x 32 pixels are masked, and a linear head predicts their colors. All values
are from the official code (vit_base__800ep), except for the schedule: here a cosine, there a step
to a tenth at epoch 700. The paper reports 83.8 % top-1 after fine-tuning (table 6). Not yet run
here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 2048
    config.epochs = 800.0

    config.model = dict(
        size="B",
        patch=16,
        positions="none",
        relative_bias="shared",
        layer_scale=0.1,
        key_bias=False,
        drop_path=0.1,
        initializer="beit",
    )
    config.objective = dict(
        name="beit",
        sampling="random",
        mask_unit=2,
        num_masked=120,  # 30 of 49 squares: 60 %, rounded up
        target="pixels",
        error="absolute",
    )
    config.data = dict(
        name="imagenet2012", size=224, crop_scale=(0.67, 1.0), interpolation="bilinear"
    )
    config.optimizer = dict(
        name="adamw",
        base_lr=5e-5,  # 1e-4 for 512 images
        min_lr=2e-5,
        warmup_epochs=10.0,
        weight_decay=0.05,
        undecayed=("cls_token", "mask_token"),
        clip_norm=5.0,
    )
    config.evaluate = dict(every_epochs=10.0)
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=5.0)
    return config
