r"""A small tokenizer of the built-in emoji with 512 codes: 12 minutes on one core, no download.

    mim-jax train --config=configs/dvae_emoji.py

On the validation split, at the end, 71 % of the codes are used, the perplexity is 278 in cells of
more than one color, and the squared error is 69 % below that of cells filled with their mean
color.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 16
    config.steps = 3600

    config.tokenizer = dict(
        kind="dalle",
        likelihood="mse",  # white can be predicted exactly: a learned scale would go to zero
        vocabulary=512,
        width=256,
        stem=8,  # convolutions at full resolution are slow on a CPU
        layers=0,
        blocks=3,
    )
    config.objective = dict(
        name="dvae",
        temperature_steps=3000,
        kl_weight=0.01,  # squared errors are small compared with the logarithm of a density
        kl_warmup_steps=500,
        balance=1.0,  # against unused codes
        window=20,
    )
    config.data = dict(name="emoji", size=64, crop_scale=(0.6, 1.0), flip=True, crop_fraction=1.0)
    config.optimizer = dict(
        name="adamw", lr=2e-3, b1=0.9, b2=0.95, weight_decay=1e-4, warmup_steps=100
    )
    config.evaluate = dict(every_steps=600)
    config.pictures = dict(every_steps=600)
    config.save = dict(every_steps=600)
    return config
