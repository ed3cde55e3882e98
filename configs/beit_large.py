r"""BEiT pretraining of ViT-L/16 on ImageNet-1k for 800 epochs (Bao et al., 2021, table 12).

    mim-jax train --config=configs/beit_large.py

The paper reports 85.2 % top-1 after fine-tuning (table 1). Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base


def get_config() -> ConfigDict:
    config = beit_base.get_config()
    config.model.size = "L"
    config.optimizer.clip_norm = 1.0  # table 12
    return config
