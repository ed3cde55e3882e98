r"""Fine-tuning the supervised ViT-B/16 on CIFAR-10 at 384 (Dosovitskiy et al., 2020, B.1.1).

First configs/vit_base_in21k.py, then

    python -m mim_jax.main --config=configs/vit_base_cifar10.py

The paper reports 98.95 % top-1 (table 5); lr is the best of 0.001, 0.003, 0.01, 0.03. Ours: not yet
run.
"""

from ml_collections import ConfigDict

from configs import vit_base_finetune


def get_config() -> ConfigDict:
    config = vit_base_finetune.get_config()
    config.steps = 10_000  # table 4
    config.data.name, config.data.evaluation_split = "cifar10", "test"
    config.optimizer.lr = 0.01
    return config
