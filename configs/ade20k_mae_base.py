r"""Segmentation of ADE20K by MAE's ViT-B/16 and UPerNet, 100 epochs of 512 x 512 crops.

Requires a run of configs/mae_base.py, or the released weights, converted.

    mim-jax train --config=configs/ade20k_mae_base.py

The paper reports 48.1 % mean IoU (table 5) and does not name the learning rate; mmsegmentation
reports 48.1 % with the one below. Not yet run here.
"""

from ml_collections import ConfigDict

from . import ade20k_beit_base


def get_config() -> ConfigDict:
    config = ade20k_beit_base.get_config()  # "We use UperNet following the code of [BEiT]": A.4
    config.steps = 0
    config.epochs = 100.0  # A.4
    config.init_from.encoder = "runs/mae_base"
    config.model.key_bias = True  # as configs/mae_base.py
    config.model.initializer = "timm"
    config.model.relative_bias = "own"  # A.4: only in transfer, from zero
    config.optimizer.lr = 1e-4  # mmsegmentation's mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py
    config.optimizer.layer_decay = 0.65  # the same
    return config
