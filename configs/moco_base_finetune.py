r"""Fine-tuning of MoCo v3's ViT-B/16 on ImageNet-1k for 150 epochs with DeiT's recipe.

Requires MoCo v3's weights:

    mim-jax convert vit-b-300ep.pth.tar runs/moco_base --to=mim_jax
    mim-jax train --config=configs/moco_base_finetune.py

The official code reports 83.2 % top-1 (Chen et al., 2021; README.md). Not yet run here.
"""

from ml_collections import ConfigDict

from . import deit_base


def get_config() -> ConfigDict:
    config = deit_base.get_config()  # README.md: DeiT's defaults
    config.epochs = 150.0  # README.md
    config.init_from.encoder = "runs/moco_base"
    return config
