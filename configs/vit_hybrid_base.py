r"""Supervised pretraining of the hybrid R50 + ViT-B/16 on ImageNet-21k for 90 epochs.

    mim-jax train --config=configs/vit_hybrid_base.py

The ViT gets the features of a ResNet-50 instead of patches (Dosovitskiy et al., 2020, section
3.1). Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_in21k


def get_config() -> ConfigDict:
    config = vit_base_in21k.get_config()
    config.model.stem = "resnet50"
    return config
