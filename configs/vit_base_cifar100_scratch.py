r"""ViT-B/16 from scratch on CIFAR-100: what BEiT is compared with (Bao et al., 2021, appendix).

    python -m mim_jax.main --config=configs/vit_base_cifar100_scratch.py

The paper reports 48.5 % top-1. Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_base_cifar100


def get_config() -> ConfigDict:
    config = beit_base_cifar100.get_config()
    config.init_from.encoder = ""
    config.model.key_bias = True
    config.objective.head_std = 0.02
    config.optimizer.lr = 1e-3
    config.optimizer.layer_decay = 1.0
    return config
