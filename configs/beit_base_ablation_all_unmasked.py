r"""BEiT ablation: predict all tokens of an unmasked image (Bao et al., 2021, table 4).

    mim-jax train --config=configs/beit_base_ablation_all_unmasked.py

The paper reports 81.67 % top-1 after fine-tuning. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_ablation_all


def get_config() -> ConfigDict:
    config = beit_base_ablation_all.get_config()
    config.objective.sampling = "none"
    return config
