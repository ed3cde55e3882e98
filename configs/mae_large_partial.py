r"""Partial fine-tuning of MAE's ViT-L/16: only the last block (He et al., 2021, section 4.3).

Requires a run of configs/mae_large_800_pixels.py.

    mim-jax train --config=configs/mae_large_partial.py

The paper reports 81.0 % top-1, and 79.1 % for the last MLP alone (objective.tuned_blocks=0.5).
With four to six blocks it is close to full fine-tuning. The paper takes the best of 50, 100 and
200 epochs. Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_large_finetune


def get_config() -> ConfigDict:
    config = mae_large_finetune.get_config()
    config.init_from.encoder = "runs/mae_large_800_pixels"
    config.objective.tuned_blocks = 1.0
    config.model.positions = "sincos"  # they are frozen
    config.model.drop_path = 0.1  # table 9
    return config
