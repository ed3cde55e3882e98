r"""ViT-B/16 from scratch on ImageNet-1k, continued at 384 x 384: the baseline of BEiT's table 1.

Requires a run of configs/vit_base_in1k.py.

    mim-jax train --config=configs/vit_base_in1k_finetune.py

BEiT's table 1 reports 77.9 % top-1 for it (Bao et al., 2021). Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_finetune


def get_config() -> ConfigDict:
    config = vit_base_finetune.get_config()
    config.init_from.encoder = "runs/vit_base_in1k"
    return config
