r"""BEiT, ViT-L/16, ImageNet-22k, 150 epochs, as released (get_started_for_image_classification.md).

    python -m mim_jax.main --config=configs/beit_large_in22k.py

Released: 86.0 % top-1 on ImageNet-1k after fine-tuning, 87.4 % after intermediate fine-tuning.
Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_base_in22k


def get_config() -> ConfigDict:
    config = beit_base_in22k.get_config()
    config.model.size = "L"
    config.model.layer_scale = 1e-5  # README.md
    return config
