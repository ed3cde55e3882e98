r"""Fine-tuning of the supervised ViT-B/16 on CIFAR-10 at 384 (Dosovitskiy et al., 2020, table 4).

Requires a run of configs/vit_base_in21k.py.

    mim-jax train --config=configs/vit_base_cifar10.py

The paper reports 98.95 % top-1 (table 5), with the best learning rate of 0.001, 0.003, 0.01 and
0.03. Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_finetune


def get_config() -> ConfigDict:
    config = vit_base_finetune.get_config()
    config.steps = 10_000  # table 4
    config.data.name, config.data.evaluation_split = "cifar10", "test"
    config.optimizer.lr = 0.01
    return config
