r"""MAE pretraining of ViT-L/16 on ImageNet-1k for 1600 epochs (He et al., 2021, tables 3 and 8).

    mim-jax train --config=configs/mae_large.py

The paper reports 85.9 % top-1 after fine-tuning (table 3; mae_pretrain_vit_large). Not yet run
here.
"""

from ml_collections import ConfigDict

from . import mae_base


def get_config() -> ConfigDict:
    config = mae_base.get_config()
    config.model.size = "L"
    return config
