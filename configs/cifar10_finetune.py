r"""Fine-tuning of the small MAE on 1000 labeled images of CIFAR-10.

Requires a run of configs/mae_cifar10.py.

    mim-jax train --config=configs/cifar10_finetune.py

49.3 % of the test images are classified correctly at the end, against 32.9 % from scratch: means
of five seeds, each with its best learning rate (benchmarks/few_labels.py).
"""

from ml_collections import ConfigDict

from . import cifar10_scratch


def get_config() -> ConfigDict:
    config = cifar10_scratch.get_config()
    config.optimizer.update(base_lr=6e-3, layer_decay=0.75)
    config.init_from = dict(encoder="runs/mae_cifar10")
    return config
