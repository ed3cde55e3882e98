r"""BEiT ablation: predict all tokens, masked or not (Bao et al., 2021, table 4).

    mim-jax train --config=configs/beit_base_ablation_all.py

The paper reports 82.59 % top-1 after fine-tuning. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_ablation_baseline


def get_config() -> ConfigDict:
    config = beit_base_ablation_baseline.get_config()
    config.objective.recover = "all"
    return config
