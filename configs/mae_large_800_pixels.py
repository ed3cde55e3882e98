r"""MAE, ViT-L/16, ImageNet-1k, 800 epochs, plain pixels: the baseline of table 1's ablations.

    python -m mim_jax.main --config=configs/mae_large_800_pixels.py
    python -m mim_jax.main --config=configs/mae_large_800_pixels.py --smoke

The paper reports 84.9 % top-1 after fine-tuning, 73.5 % by linear probe. Ours: not yet run.
Its ablations are overrides: --config.objective.mask_ratio=0.5, or decoder_depth, decoder_width.
"""

from ml_collections import ConfigDict

from configs import mae_large_800


def get_config() -> ConfigDict:
    config = mae_large_800.get_config()
    config.objective.target = "pixels"
    return config
