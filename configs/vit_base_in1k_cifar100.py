r"""Fine-tuning of ViT-B/16, supervised on ImageNet-1k, on CIFAR-100 at 384 x 384.

Requires a run of configs/vit_base_in1k.py.

    mim-jax train --config=configs/vit_base_in1k_cifar100.py

The row "supervised pre-training" of BEiT's table of CIFAR-100 (Bao et al., 2021, appendix): 87.1
% top-1. All parameters are trained. Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_cifar10


def get_config() -> ConfigDict:
    config = vit_base_cifar10.get_config()
    config.init_from.encoder = "runs/vit_base_in1k"
    config.data.name = "cifar100"  # Dosovitskiy et al., 2020, table 4: the settings of CIFAR-10
    return config
