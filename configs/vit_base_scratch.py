r"""ViT-B/16 from scratch on ImageNet-1k for 300 epochs (He et al., 2021, table 11).

    mim-jax train --config=configs/vit_base_scratch.py

The paper reports 82.3 % top-1 (table 3). Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_base_finetune


def get_config() -> ConfigDict:
    config = mae_base_finetune.get_config()
    config.batch_size = 4096  # table 11, like all values below
    config.epochs = 300.0
    config.ema = 0.9999
    config.init_from.encoder = ""
    config.model.positions = "sincos"  # appendix A.1
    config.model.initializer = "mae"  # appendix A.1
    config.objective.head_std = 0.02
    config.objective.erasing = 0.0
    config.optimizer.base_lr = 1e-4
    config.optimizer.min_lr = 0.0
    config.optimizer.b2 = 0.95
    config.optimizer.layer_decay = 1.0
    config.optimizer.weight_decay = 0.3
    config.optimizer.warmup_epochs = 20.0
    return config
