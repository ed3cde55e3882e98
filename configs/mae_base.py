r"""MAE pretraining of ViT-B/16 on ImageNet-1k for 1600 epochs (He et al., 2021, tables 3 and 8).

    mim-jax train --config=configs/mae_base.py

The paper reports 83.6 % top-1 after fine-tuning (table 3; mae_pretrain_vit_base). Not yet run
here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 4096  # table 8
    config.epochs = 1600.0  # table 3; the ablations have 800

    config.model = dict(size="B", patch=16)
    config.objective = dict(
        name="mae",
        mask_ratio=0.75,  # section 4.1
        target="normalized_pixels",  # of the released models (FINETUNE.md); ablations: pixels
        decoder_width=512,  # section 4.1
        decoder_depth=8,  # section 4.1
        decoder_heads=16,  # the official code
    )
    config.data = dict(
        name="imagenet2012",
        size=224,
        crop_scale=(0.2, 1.0),  # main_pretrain.py
        flip=True,  # table 8: RandomResizedCrop, and no color jitter
    )
    config.optimizer = dict(
        name="adamw",
        base_lr=1.5e-4,  # table 8; lr = base_lr x batch / 256
        b1=0.9,
        b2=0.95,  # table 8
        weight_decay=0.05,  # table 8
        warmup_epochs=40.0,  # table 8
    )
    config.evaluate = dict(every_epochs=10.0)  # the reconstruction loss on the validation split
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=1.0)
    return config
