r"""Fine-tuning MAE's ViT-H/14 on ImageNet-1k, 50 epochs (He et al., 2021; FINETUNE.md).

First configs/mae_huge.py, then

    python -m mim_jax.main --config=configs/mae_huge_finetune.py

The paper reports 86.9 % top-1 (table 3), the released weights 86.93 %. Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import mae_base_finetune


def get_config() -> ConfigDict:
    config = mae_base_finetune.get_config()
    config.epochs = 50.0
    config.init_from.encoder = "runs/mae_huge"
    config.model.size = "H"
    config.model.patch = 14
    config.model.drop_path = 0.3
    config.objective.mixup_group = 16
    config.optimizer.base_lr = 1e-3
    config.optimizer.layer_decay = 0.75
    return config
