r"""Fine-tuning of BEiT's ViT-L/16 from ImageNet-22k on ImageNet-1k at 512 x 512 (README.md).

Requires a run of configs/beit_large_in22k_finetune.py.

    mim-jax train --config=configs/beit_large_finetune_512.py

Released: 88.60 % top-1; with --config.data.size=384 88.41 %. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_large_in22k_finetune


def get_config() -> ConfigDict:
    config = beit_large_in22k_finetune.get_config()
    config.batch_size = 512  # README.md, like all values below
    config.epochs = 30.0
    config.init_from.encoder = "runs/beit_large_in22k_finetune"
    config.model.drop_path = 0.4
    config.data.name, config.data.labels = "imagenet2012", ""
    config.data.size = 512
    config.data.crop_fraction = 1.0
    config.optimizer.lr = 2e-5
    config.optimizer.layer_decay = 0.9
    config.optimizer.weight_decay = 1e-8
    config.optimizer.clip_norm = 0.0
    return config
