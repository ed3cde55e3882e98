r"""BEiT ablations, baseline: ViT-B/16, 300 epochs (Bao et al., 2021, table 4).

    mim-jax train --config=configs/beit_base_ablation_baseline.py

The paper reports 82.86 % top-1 after fine-tuning. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base


def get_config() -> ConfigDict:
    config = beit_base.get_config()
    config.epochs = 300.0
    return config
