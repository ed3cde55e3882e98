r"""Fine-tuning the small MAE on 268 of the built-in emoji: three minutes on two cores.

    python -m mim_jax.main --config=configs/mae_emoji.py
    python -m mim_jax.main --config=configs/emoji_finetune.py

Everything else is as in emoji_scratch.py.
"""

from ml_collections import ConfigDict

from configs import emoji_scratch


def get_config() -> ConfigDict:
    config = emoji_scratch.get_config()
    config.init_from = dict(encoder="runs/mae_emoji")
    return config
