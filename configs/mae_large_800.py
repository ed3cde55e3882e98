r"""MAE pretraining of ViT-L/16 for 800 epochs: "pixel (w/ norm)" (He et al., 2021, table 1d).

    mim-jax train --config=configs/mae_large_800.py

The paper reports 85.4 % top-1 after fine-tuning and 73.9 % by linear probe. Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_large


def get_config() -> ConfigDict:
    config = mae_large.get_config()
    config.epochs = 800.0
    return config
