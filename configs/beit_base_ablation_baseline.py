r"""BEiT, the baseline of the ablations. ViT-B/16, 300 epochs.

    python -m mim_jax.main --config=configs/beit_base_ablation_baseline.py

The paper reports 82.86 % top-1 after fine-tuning (Bao et al., 2021, table 4). Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_base


def get_config() -> ConfigDict:
    config = beit_base.get_config()
    config.epochs = 300.0
    return config
