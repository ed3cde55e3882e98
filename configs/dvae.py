r"""DALL-E's tokenizer with 8192 codes, which BEiT predicts (Ramesh et al., 2021, appendix A).

    mim-jax train --config=configs/dvae.py

The paper trained on 250 million images; this is its recipe on ImageNet. A collapse of the
codebook shows in `perplexity`, `used` and `entropy`. Not yet run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 512  # A.2
    config.steps = 3_000_000  # A.2
    config.ema = 0.999  # A.2; used for evaluation and as the tokenizer

    config.tokenizer = dict(
        kind="dalle",
        vocabulary=8192,  # section 2.1
        width=256,  # A.1, and OpenAI's code
        layers=3,  # 256 x 256 pixels are 32 x 32 tokens; BEiT's 112 x 112 are 14 x 14
        blocks=2,
        codebook=128,
        likelihood="logit_laplace",  # A.3
    )
    config.objective = dict(
        name="dvae",
        temperature=1.0,  # A.2
        min_temperature=1 / 16,
        temperature_steps=150_000,
        kl_weight=6.6,  # beta of A.2: each KL divergence counts 6.6 / 192 of a value's likelihood
        kl_warmup_steps=5_000,
    )
    config.data = dict(
        name="imagenet2012",
        size=256,
        # The paper crops 256 pixels from a square with 9/8 to 12/8 of this side: these shares.
        crop_scale=(0.44, 0.79),
        flip=True,
    )
    config.optimizer = dict(
        name="adamw",
        lr=1e-4,  # A.2
        min_lr=1.25e-6,
        decay_steps=1_200_000,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=1e-4,
    )
    config.evaluate = dict(every_steps=10_000)
    config.pictures = dict(every_steps=10_000)
    config.save = dict(every_steps=2_500)
    return config
