r"""Fine-tuning of MAE's ViT-B/16 on ImageNet-1k for 100 epochs (He et al., 2021, FINETUNE.md).

Requires a run of configs/mae_base.py.

    mim-jax train --config=configs/mae_base_finetune.py

The paper reports 83.6 % top-1 (table 3), the released weights have 83.66 %. Not yet run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 1024  # FINETUNE.md, like all values below
    config.epochs = 100.0
    config.init_from = dict(encoder="runs/mae_base")

    config.model = dict(size="B", patch=16, positions="learned", drop_path=0.1, initializer="timm")
    config.objective = dict(
        name="classify",
        pooling="mean",
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        mixup_group=32,  # the official code: the images of a device
        erasing=0.25,
    )
    config.data = dict(
        name="imagenet2012", size=224, crop_scale=(0.08, 1.0), randaugment=(9.0, 0.5)
    )
    config.optimizer = dict(
        name="adamw",
        base_lr=5e-4,  # table 9 has 1e-3 and a decay of 0.75, for targets that are not normalized
        min_lr=1e-6,
        layer_decay=0.65,
        weight_decay=0.05,
        undecayed=("cls_token", "positions"),
        warmup_epochs=5.0,
    )

    config.evaluate = dict(every_epochs=1.0)
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=1.0)
    return config
