r"""A small BEiT on the built-in emoji: 16 minutes of CPU time, no download.

Requires a run of configs/dvae_emoji.py.

    mim-jax train --config=configs/beit_emoji.py

`evaluate/accuracy_not_blank` is the share of correct predictions at masked patches that have more
than one color: 10.6 % at the end. Always predicting the most frequent token gives 1.2 %
(`evaluate/most_frequent_not_blank`).
"""

from ml_collections import ConfigDict

from . import dvae_emoji


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 32
    config.steps = 2400
    config.init_from = dict(tokenizer="runs/dvae_emoji")

    config.model = dict(
        width=128,
        depth=6,
        heads=4,
        patch=8,
        positions="none",
        relative_bias="shared",
        layer_scale=0.1,
        key_bias=False,
    )
    config.tokenizer = dvae_emoji.get_config().tokenizer
    config.objective = dict(name="beit", num_masked=25, min_block=4, mean=(0.5,), std=(0.5,))
    config.data = dict(
        name="emoji",
        size=64,
        tokenizer_size=64,
        crop_scale=(0.6, 1.0),
        flip=True,
        crop_fraction=1.0,
    )
    config.optimizer = dict(
        name="adamw", lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=3.0
    )
    config.evaluate = dict(every_steps=400)
    config.pictures = dict(every_steps=400)
    config.probe = dict(every_steps=400, images=1340)  # nine categories
    config.save = dict(every_steps=400)
    return config
