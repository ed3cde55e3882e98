r"""Segmentation of ADE20K by MAE's ViT-L/16 and UPerNet, 100 epochs of 512 x 512 crops.

Requires a run of configs/mae_large.py, or the released weights, converted.

    mim-jax train --config=configs/ade20k_mae_large.py

The paper reports 53.6 % mean IoU (table 5) and names neither learning rate nor layer decay: those
here are a start, not a reproduction. Not yet run here.
"""

from ml_collections import ConfigDict

from . import ade20k_mae_base


def get_config() -> ConfigDict:
    config = ade20k_mae_base.get_config()
    config.init_from.encoder = "runs/mae_large"
    config.model.size = "L"
    config.model.drop_path = 0.2  # as configs/mae_large_finetune.py, like the layer decay
    config.objective.layers = (7, 11, 15, 23)  # upernet_beit_large_24_640_slide_160k_ade20k.py
    config.objective.channels = 1024  # the same
    config.optimizer.lr = 1e-4  # as configs/ade20k_mae_base.py
    config.optimizer.layer_decay = 0.75
    return config
