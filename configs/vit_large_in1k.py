r"""Supervised training of ViT-L/16 from scratch on ImageNet-1k at 224 (Dosovitskiy et al., 2020).

    mim-jax train --config=configs/vit_large_in1k.py

The paper's figures are for vit_large_in1k_finetune, which continues this run at 384 x 384. Not
yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_in1k


def get_config() -> ConfigDict:
    config = vit_base_in1k.get_config()
    config.model.size = "L"  # table 3: otherwise as ViT-B/16
    return config
