r"""ViT-B/16 from scratch on CIFAR-100: BEiT's baseline (Bao et al., 2021, appendix).

    mim-jax train --config=configs/vit_base_cifar100_scratch.py

The paper reports 48.5 % top-1 and no settings. These are the ones for fine-tuning, without layer
decay and with a lower learning rate. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_cifar100


def get_config() -> ConfigDict:
    config = beit_base_cifar100.get_config()
    config.init_from.encoder = ""
    config.model.initializer = "beit_finetune"  # modeling_finetune.py
    config.optimizer.lr = 1e-3  # not in the paper
    config.optimizer.layer_decay = 1.0
    return config
