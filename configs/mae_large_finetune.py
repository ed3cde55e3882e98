r"""Fine-tuning of MAE's ViT-L/16 on ImageNet-1k for 50 epochs (He et al., 2021, FINETUNE.md).

Requires a run of configs/mae_large.py.

    mim-jax train --config=configs/mae_large_finetune.py

The paper reports 85.9 % top-1 (table 3), the released weights have 85.95 %. Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_base_finetune


def get_config() -> ConfigDict:
    config = mae_base_finetune.get_config()
    config.epochs = 50.0
    config.init_from.encoder = "runs/mae_large"
    config.model.size = "L"
    config.model.drop_path = 0.2
    config.optimizer.base_lr = 1e-3
    config.optimizer.layer_decay = 0.75
    return config
