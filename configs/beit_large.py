r"""BEiT, ViT-L/16, ImageNet-1k, 800 epochs, as in the paper (Bao et al., 2021, table 12).

    python -m mim_jax.main --config=configs/beit_large.py

The paper reports 85.2 % top-1 after fine-tuning (table 1). Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_base


def get_config() -> ConfigDict:
    config = beit_base.get_config()
    config.model.size = "L"
    config.optimizer.clip_norm = 1.0  # table 12
    return config
