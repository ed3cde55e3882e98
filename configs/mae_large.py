r"""MAE, ViT-L/16, ImageNet-1k, 1600 epochs (He et al., 2021, table 3; mae_pretrain_vit_large).

    python -m mim_jax.main --config=configs/mae_large.py --workdir=runs/mae_large
    python -m mim_jax.main --config=configs/mae_large.py --smoke

The paper reports 85.9 % top-1 after fine-tuning (table 3). Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import mae_base


def get_config() -> ConfigDict:
    config = mae_base.get_config()
    config.model.size = "L"
    return config
