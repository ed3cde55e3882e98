r"""BEiT, ablation: no blockwise masking. ViT-B/16, 300 epochs.

    python -m mim_jax.main --config=configs/beit_base_ablation_random.py

The paper reports 82.77 % top-1 after fine-tuning (Bao et al., 2021, table 4). Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_base_ablation_baseline


def get_config() -> ConfigDict:
    config = beit_base_ablation_baseline.get_config()
    config.objective.sampling = "random"
    return config
