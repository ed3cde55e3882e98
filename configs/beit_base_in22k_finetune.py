r"""Intermediate fine-tuning of BEiT's ViT-B/16 on ImageNet-22k for 90 epochs (README.md).

Requires a run of configs/beit_base_in22k.py.

    mim-jax train --config=configs/beit_base_in22k_finetune.py

A run that starts from this one gets a new head if its classes differ. Released: 85.2 % top-1 on
ImageNet-1k after fine-tuning at 224 x 224. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_finetune


def get_config() -> ConfigDict:
    config = beit_base_finetune.get_config()
    config.batch_size = 4096  # README.md, like all values below
    config.epochs = 90.0
    config.init_from.encoder = "runs/beit_base_in22k"
    config.model.positions = "none"
    config.model.relative_bias = "own"
    config.model.layer_scale = 0.1
    config.model.drop_path = 0.2
    config.objective.mixup = config.objective.cutmix = 0.0
    config.objective.mean = config.objective.std = (0.5,)
    config.data.name, config.data.labels = "folder:/data/imagenet22k", "folder"
    config.data.fill = (128, 128, 128)
    config.optimizer.lr = 3e-3
    config.optimizer.layer_decay = 0.65
    config.optimizer.undecayed = ("cls_token",)
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.clip_norm = 3.0
    return config
