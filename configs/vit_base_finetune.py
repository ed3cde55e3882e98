r"""Fine-tuning of the supervised ViT-B/16 from ImageNet-21k on ImageNet-1k at 384 x 384.

Requires a run of configs/vit_base_in21k.py.

    mim-jax train --config=configs/vit_base_finetune.py

The paper reports 83.97 % top-1 (Dosovitskiy et al., 2020, table 5), with the best learning
rate of 0.003, 0.01, 0.03 and 0.06. Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_in21k


def get_config() -> ConfigDict:
    config = vit_base_in21k.get_config()
    config.batch_size = 512  # table 4, like all values below
    config.epochs, config.steps = 0.0, 20_000
    config.init_from = dict(encoder="runs/vit_base_in21k")
    config.data.name, config.data.labels, config.data.size = "imagenet2012", "", 384
    config.data.crop_fraction = 1.0
    config.optimizer = dict(name="sgd", lr=0.03, momentum=0.9, warmup_steps=500, clip_norm=1.0)
    return config
