r"""Linear probe of MAE's ViT-L/16 on ImageNet-1k for 50 epochs (He et al., 2021, FINETUNE.md).

Requires a run of configs/mae_large.py.

    mim-jax train --config=configs/mae_large_linear.py

The paper reports 75.8 % top-1, the released code 76.0 %. Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_base_linear


def get_config() -> ConfigDict:
    config = mae_base_linear.get_config()
    config.epochs = 50.0  # FINETUNE.md: enough
    config.init_from.encoder = "runs/mae_large"
    config.model.size = "L"
    return config
