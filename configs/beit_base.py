r"""BEiT pretraining of ViT-B/16 on ImageNet-1k for 800 epochs (Bao et al., 2021, table 12).

Requires a tokenizer, from configs/dvae.py or converted (`mim-jax convert`).

    mim-jax train --config=configs/beit_base.py

The paper reports 83.2 % top-1 after fine-tuning (table 1). Not yet run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 2048  # table 12
    config.epochs = 800.0  # table 12; the ablations have 300
    config.init_from = dict(tokenizer="runs/dvae")

    config.model = dict(
        size="B",
        patch=16,
        positions="learned",  # section 2.5: neither relative positions nor LayerScale
        key_bias=False,  # the official code
        drop_path=0.1,  # table 12
        initializer="beit",
    )
    config.tokenizer = dict(kind="dalle", vocabulary=8192)  # as in configs/dvae.py, and DALL-E's
    config.objective = dict(
        name="beit",
        sampling="blockwise",  # algorithm 1
        num_masked=75,  # section 2.2: 40 %; 75 of 196 in the official code
        min_block=16,  # algorithm 1
        target="tokens",
    )
    config.data = dict(
        name="imagenet2012",
        size=224,
        tokenizer_size=112,  # datasets.py: the same crop, by Lanczos
        crop_scale=(0.08, 1.0),  # datasets.py
        color_jitter=0.4,  # table 12
    )
    config.optimizer = dict(
        name="adamw",
        lr=1.5e-3,  # table 12, for this batch
        min_lr=1e-5,  # table 12
        warmup_epochs=10.0,  # table 12
        schedule="beit",  # utils.py
        weight_decay=0.05,  # table 12
        undecayed=("cls_token", "positions"),  # modeling_pretrain.py
        clip_norm=3.0,  # table 12
    )
    config.evaluate = dict(every_epochs=10.0)  # loss and accuracy at masked patches
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=1.0)
    return config
