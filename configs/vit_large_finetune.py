r"""Fine-tuning of the supervised ViT-L/16 from ImageNet-21k on ImageNet-1k at 384 x 384.

Requires a run of configs/vit_large_in21k.py.

    mim-jax train --config=configs/vit_large_finetune.py

BEiT's table 1 reports 85.2 % top-1 for it (Bao et al., 2021). Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_finetune


def get_config() -> ConfigDict:
    config = vit_base_finetune.get_config()
    config.init_from.encoder = "runs/vit_large_in21k"
    config.model.size = "L"
    return config
