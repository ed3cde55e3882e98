r"""BEiT pretraining of ViT-B/16 on ImageNet-22k for 150 epochs, like the released weights.

    mim-jax train --config=configs/beit_base_in22k.py

Released: 83.7 % top-1 on ImageNet-1k after fine-tuning, 85.2 % after intermediate fine-tuning on
ImageNet-22k (get_started_for_image_classification.md). Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_relative


def get_config() -> ConfigDict:
    config = beit_base_relative.get_config()
    config.epochs = 150.0  # README.md
    config.data.name = "folder:/data/imagenet22k"
    config.data.evaluation_split = "validation"
    config.objective.mean = config.objective.std = (0.5,)  # the released weights
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.warmup_steps = 10_000  # README.md
    return config
