r"""Fine-tuning BEiT's ViT-B/16 on CIFAR-10 by the paper's recipe for CIFAR-100.

First configs/beit_base.py, then

    python -m mim_jax.main --config=configs/beit_base_cifar10.py

The paper has no figure. Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_base_cifar100


def get_config() -> ConfigDict:
    config = beit_base_cifar100.get_config()
    config.data.name = "cifar10"
    return config
