r"""Fine-tuning of BEiT's ViT-B/16 on ImageNet-1k for 100 epochs (Bao et al., 2021, table 13).

Requires a run of configs/beit_base.py.

    mim-jax train --config=configs/beit_base_finetune.py

The paper reports 83.2 % top-1 (table 1). Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_base_finetune


def get_config() -> ConfigDict:
    config = mae_base_finetune.get_config()
    config.init_from.encoder = "runs/beit_base"
    config.model.key_bias = False
    config.optimizer.base_lr = 0.0
    config.optimizer.lr = 4e-3  # table 13: the best of 2e-3 to 5e-3; README.md
    config.optimizer.warmup_epochs = 20.0  # table 13
    config.optimizer.schedule = "beit"  # utils.py
    return config
