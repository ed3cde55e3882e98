r"""MAE pretraining of ViT-L/16 for 800 epochs on plain pixels (He et al., 2021, table 1).

    mim-jax train --config=configs/mae_large_800_pixels.py

The paper reports 84.9 % top-1 after fine-tuning and 73.5 % by linear probe. The ablations of
table 1 are overrides of this baseline: see docs/papers.md. Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_large_800


def get_config() -> ConfigDict:
    config = mae_large_800.get_config()
    config.objective.target = "pixels"
    return config
