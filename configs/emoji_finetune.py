r"""Fine-tuning of the small MAE on 268 labeled emoji.

Requires a run of configs/mae_emoji.py.

    mim-jax train --config=configs/emoji_finetune.py

Accuracy on the validation split at the end: 61.4 %, against 55.1 % from scratch
(emoji_scratch.py). Means of five seeds, each with its best learning rate
(benchmarks/few_labels.py).
"""

from ml_collections import ConfigDict

from . import emoji_scratch


def get_config() -> ConfigDict:
    config = emoji_scratch.get_config()
    config.optimizer.base_lr = 8e-3
    config.init_from = dict(encoder="runs/mae_emoji")
    return config
