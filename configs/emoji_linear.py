r"""Linear probe of the small MAE on 268 labeled emoji.

Requires a run of configs/mae_emoji.py.

    mim-jax train --config=configs/emoji_linear.py

Accuracy on the validation split at the end: 51.9 %, against 32.5 % for a random encoder
(--config.init_from.encoder=). One run each.
"""

from ml_collections import ConfigDict

from . import emoji_scratch


def get_config() -> ConfigDict:
    config = emoji_scratch.get_config()
    config.init_from = dict(encoder="runs/mae_emoji")
    config.model = dict(width=128, depth=6, heads=4, patch=8)
    config.objective = dict(
        name="classify",
        pooling="cls",
        batch_norm=32,
        tuned_blocks=0.0,
        head_std=0.01,
        mean=(0.5,),
        std=(0.5,),
    )
    config.optimizer = dict(name="lars", base_lr=10.0, warmup_steps=60)
    return config
