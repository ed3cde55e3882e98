r"""BEiT, ablation: pixels in place of visual tokens. ViT-B/16, 300 epochs.

    python -m mim_jax.main --config=configs/beit_base_ablation_pixels.py

The paper reports 81.04 % top-1 after fine-tuning (Bao et al., 2021, table 4). Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_base_ablation_baseline


def get_config() -> ConfigDict:
    config = beit_base_ablation_baseline.get_config()
    config.objective.target = "pixels"
    config.data.tokenizer_size = 0
    config.init_from.tokenizer = ""
    return config
