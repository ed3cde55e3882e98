r"""Segmentation of ADE20K by BEiT's ViT-L/16 after intermediate fine-tuning, 640 x 640 crops.

Requires a run of configs/beit_large_in22k_finetune.py, or its released weights, converted.

    mim-jax train --config=configs/ade20k_beit_large.py

The official README reports 56.7 % mean IoU, 57.0 % with several scales. Not yet run here.
"""

from ml_collections import ConfigDict

from . import ade20k_beit_base_intermediate


def get_config() -> ConfigDict:
    config = ade20k_beit_base_intermediate.get_config()
    # upernet_beit_large_24_640_slide_160k_ade20k_pt2ft.py, like all values below. Its 320,000
    # iterations of 8 images, two for each update, and 3,000 of warm-up are 160,000 and 1,500 here.
    config.init_from.encoder = "runs/beit_large_in22k_finetune"
    config.model.size = "L"
    config.model.layer_scale = 1e-5  # as the weights; the file has 1e-6, which they replace
    config.model.drop_path = 0.2
    config.objective.layers = (7, 11, 15, 23)
    config.objective.channels = 1024
    config.optimizer.lr = 2e-5
    config.optimizer.layer_decay = 0.95
    return config
