r"""A small tokenizer of the built-in emoji: minutes on two cores, no download.

python -m mim_jax.main --config=configs/dvae_emoji.py --workdir=runs/dvae_emoji
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 32
    config.steps = 2400

    config.tokenizer = dict(
        kind="dalle", likelihood="mse", vocabulary=512, width=256, layers=0, stem=8, blocks=3
    )
    config.objective = dict(
        name="dvae",
        kl_weight=0.05,
        kl_warmup_steps=500,
        temperature_steps=2000,
        balance=1.0,
        window=10,
    )
    config.data = dict(name="emoji", size=64, crop_scale=(0.6, 1.0), flip=True, crop_fraction=1.0)
    config.optimizer = dict(
        name="adamw", lr=1e-3, b1=0.9, b2=0.95, weight_decay=1e-4, warmup_steps=100
    )
    config.evaluate = dict(every_steps=200)
    config.pictures = dict(every_steps=400)
    config.save = dict(every_steps=400)
    return config
