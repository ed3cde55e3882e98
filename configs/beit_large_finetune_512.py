r"""BEiT's ViT-L/16, fine-tuned on ImageNet-22k, on ImageNet-1k at 512 x 512 (README.md).

First configs/beit_large_in22k_finetune.py, then

    python -m mim_jax.main --config=configs/beit_large_finetune_512.py

Released: 88.60 % top-1. Ours: not yet run. With --config.data.size=384 it is the one of 88.41 %.
"""

from ml_collections import ConfigDict

from configs import beit_large_in22k_finetune


def get_config() -> ConfigDict:
    config = beit_large_in22k_finetune.get_config()
    config.batch_size = 512  # README.md, as all that follows
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
