r"""Fine-tuning of MoCo v3's ViT-B/16 on CIFAR-100 for 100 epochs.

Requires MoCo v3's weights:

    mim-jax convert vit-b-300ep.pth.tar runs/moco_base --to=mim_jax
    mim-jax train --config=configs/moco_base_cifar100.py

BEiT's table reports 87.1 % top-1 (Bao et al., 2021, appendix), the official code 90.5 %. Not yet
run here.
"""

from ml_collections import ConfigDict

from . import moco_base_finetune


def get_config() -> ConfigDict:
    config = moco_base_finetune.get_config()
    config.epochs = 100.0  # transfer/README.md, like all values below; batch size 8 x 128
    config.objective.erasing = 0.0
    config.objective.mixup = 0.5
    config.objective.mixup_group = 128
    config.data.name, config.data.evaluation_split = "cifar100", "test"
    config.optimizer.base_lr = 1.5e-4  # 3e-4 for 512 images
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_epochs = 3.0
    return config
