r"""Fine-tuning of BEiT's ViT-B/16 on CIFAR-100, after intermediate fine-tuning on ImageNet-1k.

Requires a run of configs/beit_base_finetune.py.

    mim-jax train --config=configs/beit_base_cifar100_intermediate.py

The paper reports 91.8 % top-1, against 90.1 % without the intermediate step (Bao et al., 2021,
appendix). The head is new, because the classes differ. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_cifar100


def get_config() -> ConfigDict:
    config = beit_base_cifar100.get_config()
    config.init_from.encoder = "runs/beit_base_finetune"
    return config
