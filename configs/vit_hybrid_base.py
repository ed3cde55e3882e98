r"""The hybrid R50 + ViT-B/16, supervised, ImageNet-21k, 90 epochs (Dosovitskiy et al., 2020).

    python -m mim_jax.main --config=configs/vit_hybrid_base.py

A ViT on the features of a ResNet-50. Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import vit_base_in21k


def get_config() -> ConfigDict:
    config = vit_base_in21k.get_config()
    config.model.stem = "resnet50"
    return config
