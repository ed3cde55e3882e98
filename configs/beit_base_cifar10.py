r"""Fine-tuning of BEiT's ViT-B/16 on CIFAR-10, with the paper's recipe for CIFAR-100.

Requires a run of configs/beit_base.py.

    mim-jax train --config=configs/beit_base_cifar10.py

The paper reports no result on CIFAR-10. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_cifar100


def get_config() -> ConfigDict:
    config = beit_base_cifar100.get_config()
    config.data.name = "cifar10"
    return config
