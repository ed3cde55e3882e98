r"""Fine-tuning the small MAE of CIFAR-10 on 1000 labelled images.

python -m mim_jax.main --config=configs/mae_cifar10.py --config.data.name=folder:/data/cifar10
python -m mim_jax.main --config=configs/cifar10_finetune.py --config.data.name=folder:/data/cifar10
"""

from ml_collections import ConfigDict

from configs import cifar10_scratch


def get_config() -> ConfigDict:
    config = cifar10_scratch.get_config()
    config.optimizer.update(base_lr=6e-3, layer_decay=0.75)
    config.init_from = dict(encoder="runs/mae_cifar10")
    return config
