r"""BEiT ablation: predict pixels instead of visual tokens (Bao et al., 2021, table 4).

    mim-jax train --config=configs/beit_base_ablation_pixels.py

The paper reports 81.04 % top-1 after fine-tuning. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_ablation_baseline


def get_config() -> ConfigDict:
    config = beit_base_ablation_baseline.get_config()
    config.objective.target = "pixels"
    config.data.tokenizer_size = 0
    config.init_from.tokenizer = ""
    return config
