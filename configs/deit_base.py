r"""DeiT-B/16 from scratch on ImageNet-1k for 300 epochs (Touvron et al., 2020).

    mim-jax train --config=configs/deit_base.py

The paper reports 81.8 % top-1. Its repeated augmentation is missing here. Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_base_finetune


def get_config() -> ConfigDict:
    config = mae_base_finetune.get_config()  # mixup, CutMix, erasing, RandAugment: as DeiT's
    config.epochs = 300.0  # main.py, like all values below
    config.init_from.encoder = ""
    config.objective.pooling = "cls"
    config.objective.head_std = 0.02
    config.objective.mixup_group = 64  # the images of a device
    config.optimizer.base_lr = 2.5e-4  # 5e-4 for 512 images
    config.optimizer.min_lr = 1e-5
    config.optimizer.layer_decay = 1.0
    return config
