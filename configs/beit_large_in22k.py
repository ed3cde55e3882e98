r"""BEiT pretraining of ViT-L/16 on ImageNet-22k for 150 epochs, like the released weights.

    mim-jax train --config=configs/beit_large_in22k.py

Released: 86.0 % top-1 on ImageNet-1k after fine-tuning, 87.4 % after intermediate fine-tuning on
ImageNet-22k (get_started_for_image_classification.md). Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_in22k


def get_config() -> ConfigDict:
    config = beit_base_in22k.get_config()
    config.model.size = "L"
    config.model.layer_scale = 1e-5  # README.md
    config.optimizer.clip_norm = 1.0  # table 12; README.md has a command for ViT-B alone
    return config
