r"""ViT-L/16 from scratch on ImageNet-1k for 200 epochs (He et al., 2021, table 11).

    mim-jax train --config=configs/vit_large_scratch.py

The paper reports 82.6 % top-1 (table 3). Not yet run here.
"""

from ml_collections import ConfigDict

from . import vit_base_scratch


def get_config() -> ConfigDict:
    config = vit_base_scratch.get_config()
    config.epochs = 200.0
    config.model.size = "L"
    config.model.drop_path = 0.2
    return config
