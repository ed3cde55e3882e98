r"""BEiT pretraining of ViT-B/16 with relative positions and LayerScale, as in the official README.

    mim-jax train --config=configs/beit_base_relative.py

After 300 epochs the paper reports 83.22 % top-1 after fine-tuning, against 82.86 % with absolute
positions (tables 4 and 5). A log of the authors over 300 epochs ends at a loss of 6.30 and an
accuracy of 5.0 %. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base


def get_config() -> ConfigDict:
    config = beit_base.get_config()
    config.model.positions = "none"
    config.model.relative_bias = "shared"
    config.model.layer_scale = 0.1
    config.optimizer.undecayed = ("cls_token",)
    return config
