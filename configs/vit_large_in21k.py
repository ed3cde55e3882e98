r"""Supervised pretraining of ViT-L/16 on ImageNet-21k for 90 epochs (Dosovitskiy et al., 2020).

    mim-jax train --config=configs/vit_large_in21k.py

The paper trains for 30 and for 90 epochs (table 3). The differences are those of vit_base_in21k.
Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_in21k


def get_config() -> ConfigDict:
    config = vit_base_in21k.get_config()
    config.model.size = "L"  # table 3: otherwise as ViT-B/16
    return config
