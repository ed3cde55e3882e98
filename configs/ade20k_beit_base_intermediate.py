r"""Segmentation of ADE20K by BEiT's ViT-B/16 after intermediate fine-tuning, 640 x 640 crops.

Requires a run of configs/beit_base_in22k_finetune.py, or its released weights, converted.

    mim-jax train --config=configs/ade20k_beit_base_intermediate.py

The official README reports 53.6 % mean IoU, 54.3 % with several scales. Not yet run here.
"""

from ml_collections import ConfigDict

from . import ade20k_beit_base


def get_config() -> ConfigDict:
    config = ade20k_beit_base.get_config()
    # upernet_beit_base_12_640_slide_160k_ade20k_pt2ft.py, like all values below
    config.init_from.encoder = "runs/beit_base_in22k_finetune"
    config.model.positions = "none"
    config.model.relative_bias = "own"
    config.model.layer_scale = 0.1
    config.data.size = 640
    config.data.short_side = 640
    config.data.long_side = 2560
    config.optimizer.lr = 3e-5
    config.optimizer.layer_decay = 0.9
    return config
