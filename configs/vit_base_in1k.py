r"""Supervised training of ViT-B/16 from scratch on ImageNet-1k at 224 (Dosovitskiy et al., 2020).

    mim-jax train --config=configs/vit_base_in1k.py

The paper's figures are for vit_base_in1k_finetune, which continues this run at 384 x 384.
Difference from table 3: no dropout (the paper has 0.1). Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_in21k


def get_config() -> ConfigDict:
    config = vit_base_in21k.get_config()
    config.epochs = 300.0  # table 3, row "ViT-*, ImageNet", like all values below
    config.data.name, config.data.labels = "imagenet2012", ""
    config.optimizer.lr = 3e-3
    config.optimizer.min_lr = 0.0
    config.optimizer.schedule = "mae"  # a cosine
    config.optimizer.weight_decay = 0.3
    return config
