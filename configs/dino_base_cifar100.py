r"""Fine-tuning of DINO's ViT-B/16 on CIFAR-100 for 1000 epochs.

Requires DINO's weights:

    mim-jax convert dino_vitbase16_pretrain.pth runs/dino_base --to=mim_jax
    mim-jax train --config=configs/dino_base_cifar100.py

BEiT's table reports 91.7 % top-1 (Bao et al., 2021, appendix), and 90.8 % for DeiT's weights:
--config.init_from.encoder=runs/deit_base. Not yet run here.
"""

from ml_collections import ConfigDict

from . import dino_base_finetune


def get_config() -> ConfigDict:
    config = dino_base_finetune.get_config()
    config.batch_size = 768  # facebookresearch/dino, issues 81 and 144, like all values below
    config.epochs = 1000.0
    config.objective.erasing = 0.0
    config.objective.mixup_group = 96  # 768 images on 8 devices
    config.data.name, config.data.evaluation_split = "cifar100", "test"
    config.optimizer.base_lr = 0.0
    config.optimizer.lr = 7.5e-6  # 5e-6 for 512 images
    config.optimizer.min_lr = 0.0
    return config
