r"""Segmentation of ADE20K by BEiT's ViT-B/16 and SETR-PUP, the task layer of the paper's table 3.

Requires a run of configs/beit_base.py.

    mim-jax train --config=configs/ade20k_beit_base_setr.py

The paper reports 45.6 % mean IoU, 47.7 % after intermediate fine-tuning. Not yet run here.
"""

from ml_collections import ConfigDict

from . import ade20k_beit_base


def get_config() -> ConfigDict:
    config = ade20k_beit_base.get_config()  # table 14 has the same steps, batch, decay and crops
    config.objective.decoder = "setr_pup"
    config.objective.channels = 256  # Zheng et al., 2021, and mmsegmentation's setr_pup
    config.objective.dropout = 0.0  # mmsegmentation's setr_pup
    config.objective.layers = (3, 5, 7, 11)  # not published: those of the UPerNet recipe
    config.optimizer.lr = 1e-3  # table 14
    return config
