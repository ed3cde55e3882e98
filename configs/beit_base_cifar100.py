r"""Fine-tuning of BEiT's ViT-B/16 on CIFAR-100 for 150 epochs (Bao et al., 2021, table 13).

Requires a run of configs/beit_base.py.

    mim-jax train --config=configs/beit_base_cifar100.py

The paper reports 90.1 % top-1 (appendix). Its repeated augmentation is missing in the official
code and here. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_finetune


def get_config() -> ConfigDict:
    config = beit_base_finetune.get_config()
    config.batch_size = 512  # table 13, like all values below
    config.epochs = 150.0
    config.objective.erasing = 0.0
    config.data.name, config.data.evaluation_split = "cifar100", "test"
    config.optimizer.weight_decay = 0.3
    return config
