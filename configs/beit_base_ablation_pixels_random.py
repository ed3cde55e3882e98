r"""BEiT ablation: predict pixels, with random masks (Bao et al., 2021, table 4).

    mim-jax train --config=configs/beit_base_ablation_pixels_random.py

The paper reports 80.50 % top-1 after fine-tuning. Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_base_ablation_pixels


def get_config() -> ConfigDict:
    config = beit_base_ablation_pixels.get_config()
    config.objective.sampling = "random"
    return config
